"""A host loses its power, or its network for 90 s, in each state of a change. The table in docs/faults.md is made of
``CASES``: ``python tests/lab/test_faults.py`` writes it, and a unit test says when it is old.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command import opsctl, succeeds
from conftest import NAME, LabFleet, lab_of_a_module, unwatched
from test_crashes import POINTS

from opsctl.engines.events import discard
from opsctl.fleet.inventory import read_fleet
from opsctl.lab import laboratory, network, state
from opsctl.lab.load import Load, target
from opsctl.lab.model import write_model
from opsctl.releases.remote import HOST_PROGRAM

pytestmark = [pytest.mark.lab, pytest.mark.slow]

HOST, UNIT = "gpu-1", "inference@chat.0.service"
LINK = "/srv/opsctl/chat/current.0"
DROP_IN = f"/run/systemd/system/{UNIT}.d/hold.conf"  # gone with the boot
NETWORK_AWAY_S = 90
HELD_S = 25

POWER, NETWORK = "power cut", "no network for 90 s"
STAGING, STOPPED, FLIPPED, GATE, IDLE = "staging", "between stop and flip", "between flip and start", "gate", "idle"


@dataclass(frozen=True)
class Case:
    """``exits``: how the command may end. ``then``: what the host serves as soon as it is back, before anybody acts."""

    fault: str
    state: str
    exits: tuple[int, ...]
    then: tuple[str, ...]
    designed: str


CASES = [
    Case(POWER, STAGING, (0, 8), ("v1", "v2"), "what was fetched stays; the run goes on with the rest"),
    Case(POWER, STOPPED, (7, 8), ("v1",), "undone at boot, before the instance starts"),
    Case(POWER, FLIPPED, (7, 8), ("v1",), "undone at boot, before the instance starts"),
    Case(POWER, GATE, (7, 8), ("v1",), "a release that did not pass its gate is undone at boot"),
    Case(POWER, IDLE, (0,), ("v1",), "the instance starts by itself on the release it had"),
    Case(NETWORK, STAGING, (0, 5, 8), ("v1", "v2"), "the host waits for the gateway; it and the controller go on"),
    Case(NETWORK, STOPPED, (0, 7, 8), ("v1", "v2"), "the cutover needs nobody: it ends by itself"),
    Case(NETWORK, FLIPPED, (0, 7, 8), ("v1", "v2"), "the cutover needs nobody: it ends by itself"),
    Case(NETWORK, GATE, (0, 7, 8), ("v1", "v2"), "the cutover needs nobody: it ends by itself"),
    Case(NETWORK, IDLE, (0,), ("v1",), "nothing happens to it; requests go elsewhere"),
]
PAGE = Path(__file__).resolve().parents[2] / "docs/faults.md"


def page() -> str:
    """docs/faults.md."""
    rows = "\n".join(f"| {case.fault} | {case.state} | {', '.join(map(str, case.exits))} | {' or '.join(case.then)} | "
                     f"{case.designed} |" for case in CASES)
    points = "\n".join(f"| `{' '.join(command)}` | `{moment}` | {seconds:g} |" for command, moment, seconds in POINTS)
    others = "\n".join(f"| {fault} | {seen} | `tests/lab/{test}` |" for fault, seen, test in OTHERS)
    return f"""\
# What was tried: faults and states

Each line is a test on real machines: `update-model --version v2` moves a fleet from v1 while clients stream, and at the
named moment of the first host the fault happens to it. In every one of them the other host serves throughout, no client
loses a stream on it, and afterwards `opsctl resume` (or the same command) brings the whole fleet to v2.
Made from `tests/lab/test_faults.py`; `pytest -m slow tests/lab/test_faults.py` runs them.

| fault | state | exit code | serves when it is back | by design |
|---|---|---|---|---|
{rows}

## The controller

Killed with SIGKILL when it had just said this, so many seconds later; then the same command again, in a third of the
cases by a second operator from another home. Packages, holds, units, files with hashes, `current.*`, drains, locks,
ledger and the load balancer's weights are those of an undisturbed run (`pytest -m slow tests/lab/test_crashes.py`).

| command | when it had said | and s |
|---|---|---|
{points}

## And

| fault | what was seen | test |
|---|---|---|
{others}
"""


OTHERS = [
    ("two operators start at once", "the second is told who is at work (4)", "test_operators.py"),
    ("the holder of the locks is suspended, and wakes up", "another goes on after a minute; it does nothing more (4)",
     "test_operators.py"),
    ("Ctrl-C, and a second one", "heard at once, 130, `opsctl resume` goes on", "test_operators.py"),
    ("every machine loses power the moment a verb says done",
     "what it said is so (provision, update, rollback, drain, hold)",
     "test_durable.py"),
    ("the gateway has no power during a rollback", "it goes back; the gateway learns of it later",
     "test_gateway_off.py"),
    ("a disk fills while it is staged", "that host fails, the others have it, what serves is untouched",
     "test_staging.py"),
    ("a release does not fit one disk", "refused before the first byte (5)", "test_rollouts.py"),
    ("a file is corrupted on the gateway after signing", "refused (5)", "test_rollouts.py"),
    ("a release does not start, answers nonsense, or is slow", "undone, what was moved goes back (6)",
     "test_rollouts.py"),
    ("the agent is dead", "paused before the host is touched (8)", "test_rollouts.py"),
    ("an engine hangs", "paused at the drain's deadline, the instance is back in service (8)", "test_rollouts.py"),
]


@dataclass(frozen=True)
class Fleet:
    lab: LabFleet

    def sh(self, script: str, timeout_s: float = 60) -> str:
        done = self.lab.run(HOST, ["sudo", "timeout", str(timeout_s), "sh", "-c", script], timeout_s=timeout_s + 10)
        assert done.returncode == 0, f"{script}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, host: str) -> dict[str, Any]:
        done = self.lab.run(host, ["sudo", HOST_PROGRAM, "state", "--json"])
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)["instances"][0]
        return found

    def hold(self, step: str) -> None:
        """The engine's unit waits there once, the first time that it leaves v1."""
        script = f"if ! test -e /run/held; then touch /run/held; exec sleep {HELD_S}; fi"
        if step == "ExecStartPre":
            script = f'case "$$(readlink {LINK})" in */v2-*) {script};; esac'
        self.sh(f"rm -f /run/held; mkdir -p {DROP_IN.rpartition('/')[0]} && cat >{DROP_IN} <<'END' && "
                f"systemctl daemon-reload\n[Service]\n{step}=/bin/sh -c '{script}'\nEND")

    def until(self, condition: str) -> Callable[[], None]:
        def wait() -> None:
            self.sh(f"until {condition}; do sleep 0.05; done", 120)
        return wait


@pytest.fixture(scope="module")
def fleet(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    name = f"{NAME}-fault"
    directory = tmp_path_factory.mktemp("faults") / "fleet"
    with lab_of_a_module(name, 2, directory) as found:
        unwatched(found.directory)
        succeeds("bundle", "build", inventory=found.inventory)
        for version, size in (("v1", "small"), ("v2", "mid")):
            write_model(directory / f"{version}.gguf", size)
            succeeds("model", "import", directory / f"{version}.gguf", "--service", "chat", "--version", version,
                     inventory=found.inventory)
        succeeds("provision", inventory=found.inventory)
        laboratory.snapshot(name, "serving", discard)
        succeeds("stage", "--version", "v2", inventory=found.inventory)
        laboratory.snapshot(name, "staged", discard)
        yield Fleet(found)


def reached(fleet: Fleet, state: str) -> Callable[[], None]:
    """Prepares the host for the state; what is given waits until it is there."""
    sub = f"systemctl show -p SubState --value {UNIT} | grep -q"
    if state == STAGING:
        return fleet.until("find /srv/opsctl/chat/releases -name '*.gguf*' -size +2M | grep -q v2-")
    if state == STOPPED:
        fleet.hold("ExecStopPost")
        return fleet.until(f"{sub} stop-post")
    if state == FLIPPED:
        fleet.hold("ExecStartPre")
        return fleet.until(f"{sub} start-pre")
    if state == GATE:
        return fleet.until(f"{HOST_PROGRAM} cutover-status chat.0 --release $(basename /srv/opsctl/chat/releases/v2-*) "
                           "--wait-s 0 | grep -q '\"phase\": \"gate\"'")
    return lambda: None


def strike(fleet: Fleet, fault: str) -> None:
    lab = state.load(fleet.lab.name)
    assert lab is not None
    if fault == POWER:
        succeeds("lab", "power-cut", HOST, "--name", lab.name)
        time.sleep(3)
        succeeds("lab", "power-on", HOST, "--name", lab.name)
        return
    link = network.link_of(lab.number, HOST)
    subprocess.run(["ip", "link", "set", link, "down"], check=True)
    try:
        time.sleep(NETWORK_AWAY_S)
    finally:
        subprocess.run(["ip", "link", "set", link, "up"], check=True)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.fault}, {case.state}" for case in CASES])
def test_a_fault_of_the_first_host(fleet: Fleet, case: Case) -> None:
    laboratory.restore(fleet.lab.name, "serving" if case.state == STAGING else "staged", discard)
    healthy(fleet)
    at = reached(fleet, case.state)
    words = ["update-model", "--version", "v2", "--yes", "--json", "--min-speed", "0", "--waves", "1,100%"]
    if case.state == STAGING:
        words += ["--rate-limit", "8M"]
    command = [sys.executable, "-m", "opsctl", *words]
    with Load(target(read_fleet(fleet.lab.inventory), "chat"), clients=4, tokens=40) as load:
        if case.state == IDLE:
            strike(fleet, case.fault)
            returncode, out = 0, ""
        else:
            variables = os.environ | {"OPSCTL_INVENTORY": str(fleet.lab.inventory)}
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  text=True, env=variables) as process:
                try:
                    at()
                    strike(fleet, case.fault)
                    out, said = process.communicate(timeout=420)
                finally:
                    process.kill()  # one that was left would go on asking for its lock
            returncode = process.returncode
            assert returncode in case.exits, f"exit {returncode}\n{out}\n{said}"
        healthy(fleet)
        assert fleet.state(HOST)["release"] in case.then
    lost = [record for record in load.records if not record.whole and record.server != f"{HOST}.chat.0"]
    assert not [record for record in lost if record.server], lost[:3]
    if returncode:
        resumed = opsctl("resume", "--json", inventory=fleet.lab.inventory)
        assert resumed.returncode == 0, f"{resumed.stdout}\n{resumed.stderr}"
    else:
        succeeds(*words, inventory=fleet.lab.inventory)
    assert {host: fleet.state(host)["release"] for host in fleet.lab.gpu_hosts} == {"gpu-1": "v2", "gpu-2": "v2"}


def healthy(fleet: Fleet) -> None:
    """Both instances are, and the host has come back from whatever happened."""
    until = time.monotonic() + 150
    while True:
        answers = [fleet.lab.run(host, ["sudo", HOST_PROGRAM, "state", "--json"]) for host in fleet.lab.gpu_hosts]
        if all(answer.returncode == 0 and json.loads(answer.stdout)["instances"][0]["health"] == "healthy"
               and not json.loads(answer.stdout)["instances"][0]["unfinished"] for answer in answers):
            return
        assert time.monotonic() < until, [answer.stdout + answer.stderr for answer in answers]
        time.sleep(1)


if __name__ == "__main__":
    PAGE.write_text(page())
