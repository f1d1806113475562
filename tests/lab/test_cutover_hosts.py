"""Cutovers on a real machine: a real systemd, a real engine, a worker that is killed, a power cut in the middle."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command import succeeds
from conftest import NAME, LabFleet, unwatched

from opsctl.engines.events import discard
from opsctl.engines.session import Session
from opsctl.fleet.inventory import read_fleet
from opsctl.lab import laboratory
from opsctl.lab.model import write_model
from opsctl.releases.publish import publish
from opsctl.releases.remote import HOST_PROGRAM
from opsctl.releases.store import find

pytestmark = [pytest.mark.lab, pytest.mark.slow]

HOST, INSTANCE = "gpu-1", "chat.0"
UNIT, JOB = "inference@chat.0.service", "opsctl-cutover@chat.0.service"
OWNER, OPERATOR = "run:20261122-031500-ab12", "operator:ann"
DROP_IN = f"/run/systemd/system/{UNIT}.d/hold.conf"  # gone with the boot
LINK = "/srv/opsctl/chat/current.0"


@dataclass
class Machine:
    """gpu-1 with chat.0 on v1, and the releases that the gateway has."""

    lab: LabFleet
    v1: str
    v2: str

    def sh(self, script: str, timeout_s: float = 60) -> str:
        done = self.lab.run(HOST, ["sudo", "timeout", str(timeout_s), "sh", "-c", script], timeout_s=timeout_s + 10)
        assert done.returncode == 0, f"{script}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def verb(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        done = self.lab.run(HOST, ["sudo", HOST_PROGRAM, *arguments], timeout_s=180)
        return done.returncode, json.loads(done.stdout)

    def cutover(self, to: str, origin: str, *more: str) -> tuple[int, dict[str, Any]]:
        # a tenth: 128 tokens of the small model are over before this computer's scheduler has been fair once
        return self.verb("cutover", INSTANCE, "--release", to, "--from", origin, "--owner", OWNER,
                         "--min-speed-percent", "10", *more)

    def drain(self) -> None:
        for owner in (OWNER, OPERATOR):
            assert self.verb("drain", INSTANCE, "--owner", owner)[0] == 0

    def seen(self) -> dict[str, Any]:
        code, state = self.verb("state", "--json")
        assert code == 0
        (instance,) = state["instances"]
        return {**{key: instance[key] for key in ("release", "health", "unfinished")},
                "drains": [drain["owner"] for drain in state["drains"]],
                "current": self.sh(f"readlink {LINK}").rpartition("/")[2]}

    def serves(self, release: str) -> dict[str, Any]:
        """What ``seen`` says when ``release`` serves and only the operator's drain is left."""
        return {"release": release.rpartition("-")[0], "health": "healthy", "unfinished": False,
                "drains": [OPERATOR], "current": release}

    def wait(self, condition: str, timeout_s: float = 60) -> None:
        self.sh(f"until {condition}; do sleep 0.1; done", timeout_s)

    def stage(self, source: Path, version: str, *settings: str) -> str:
        """Imports, publishes past the ledger, stages on the host; the release's folder name."""
        fleet = read_fleet(self.lab.inventory)
        words = [word for setting in settings for word in ("--set", setting)]
        succeeds("model", "import", source, "--service", "chat", "--version", version, *words,
                 inventory=self.lab.inventory)
        stored = find(fleet.directory / "bundle", "chat", version)
        assert stored is not None
        gateway = fleet.group("gateway")[0]
        with Session(fleet, gateway) as session:
            publish(session, stored, discard, host=gateway.name)
        code, done = self.verb("stage", "--service", "chat", "--release", stored.name)
        assert code == 0, done
        return stored.name


@pytest.fixture(scope="module")
def machine(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    name = f"{NAME}-cut"
    directory = tmp_path_factory.mktemp("cutover") / "fleet"
    model = directory.parent / "small.gguf"
    try:
        lab = laboratory.up(name, 1, directory, None, discard).lab
        unwatched(lab.fleet)
        fleet = LabFleet(name, directory, tuple(machine.name for machine in lab.machines))
        write_model(model, "small")
        succeeds("bundle", "build", inventory=fleet.inventory)
        succeeds("model", "import", model, "--service", "chat", "--version", "v1", inventory=fleet.inventory)
        succeeds("provision", inventory=fleet.inventory)
        one = Machine(fleet, "", "")
        one.v1 = one.sh(f"readlink {LINK}").rpartition("/")[2]
        one.v2 = one.stage(model, "v2", "parallel=5")
        yield one
    finally:
        laboratory.down(name, keep_fleet=False, emit=discard)


@pytest.fixture
def on_v1(machine: Machine) -> Machine:
    """Drained by a run and by an operator; each test leaves it as it found it, on v1."""
    machine.drain()
    found = machine.seen()
    assert (found["current"], found["health"]) == (machine.v1, "healthy"), found
    return machine


def test_there_and_back(on_v1: Machine) -> None:
    for to, origin in ((on_v1.v2, on_v1.v1), (on_v1.v1, on_v1.v2)):
        on_v1.drain()
        code, status = on_v1.cutover(to, origin)
        assert (code, status["state"]) == (0, "done"), status
        result = status["result"]
        assert [result[key] for key in ("changed", "release", "from", "verdict")] == [True, to, origin, "healthy"]
        assert [check["name"] for check in result["checks"]] == [
            "health", "identity", "completion", "chat", "stream", "speed", "unit"]
        assert min(result["tokens_per_second"], result["baseline_tokens_per_second"], result["gate_s"]) > 0
        assert result["stop_s"] > 2  # the engine drained, though nobody was there
        assert on_v1.seen() == on_v1.serves(to)
    assert on_v1.sh(f"systemctl list-units --all --plain --no-legend '{JOB}'") == ""
    code, document = on_v1.cutover(on_v1.v2, on_v1.v2)
    assert (code, document["error"]["code"]) == (5, "cutover.moved")


def test_a_release_that_does_not_start_goes_back_with_its_log(on_v1: Machine, tmp_path: Path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value
    (tmp_path / "odd.gguf").write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"general.architecture") + struct.pack("<I", 8)
        + text(b"none-such"))
    odd = on_v1.stage(tmp_path / "odd.gguf", "v3")
    code, document = on_v1.cutover(odd, on_v1.v1)
    assert (code, document["error"]["code"]) == (6, "instance.did_not_start"), document
    assert f"{on_v1.v1} serves again" in document["error"]["message"]
    assert any("none-such" in line or "odd.gguf" in line for line in document["error"]["log_tail"])
    assert on_v1.seen() == on_v1.serves(on_v1.v1)


def hold(machine: Machine, step: str) -> None:
    """The engine's unit waits in ``step`` for whoever it is on v2, or while it leaves v1 for the first time."""
    held = {"ExecStartPre": f'case "$$(readlink {LINK})" in *{machine.v2}) exec sleep 80;; esac',
            "ExecStopPost": "if ! test -e /tmp/held; then touch /tmp/held; exec sleep 5; fi"}[step]
    machine.sh(f"mkdir -p {DROP_IN.rpartition('/')[0]} && cat >{DROP_IN} <<'END' && systemctl daemon-reload\n"
               f"[Service]\n{step}=/bin/sh -c '{held}'\nEND")


@pytest.fixture
def released(on_v1: Machine) -> Iterator[Machine]:
    yield on_v1
    on_v1.sh(f"rm -f {DROP_IN} && systemctl daemon-reload")


@pytest.mark.parametrize(("step", "held"), [
    ("ExecStopPost", f"systemctl show -p SubState --value {UNIT} | grep -q stop-post"),  # between stop and flip
    ("ExecStartPre", f"systemctl show -p SubState --value {UNIT} | grep -q start-pre"),  # between flip and start
])
def test_a_killed_worker_is_undone_without_anybody(released: Machine, step: str, held: str) -> None:
    hold(released, step)
    code, status = released.cutover(released.v2, released.v1, "--wait-s", "0")
    assert (code, status["state"]) == (0, "running")
    released.wait(held)
    released.sh(f"systemctl kill --kill-whom=main --signal=KILL {JOB}")
    code, status = released.verb("cutover-status", INSTANCE, "--release", released.v2, "--wait-s", "90")
    assert (code, status["state"]) == (0, "failed"), status
    assert (status["error"]["code"], status["error"]["exit_code"]) == ("cutover.killed", 6), status["error"]
    assert released.seen() == released.serves(released.v1)


def test_an_operator_may_stop_a_cutover(released: Machine) -> None:
    """``systemctl stop`` of its unit is the way to call it off."""
    hold(released, "ExecStartPre")
    released.cutover(released.v2, released.v1, "--wait-s", "0")
    released.wait(f"systemctl show -p SubState --value {UNIT} | grep -q start-pre")
    released.sh(f"systemctl stop {JOB}", timeout_s=90)
    assert released.seen() == released.serves(released.v1)


def test_after_a_power_cut_the_release_before_serves(on_v1: Machine) -> None:
    hold(on_v1, "ExecStartPre")
    on_v1.cutover(on_v1.v2, on_v1.v1, "--wait-s", "0")
    on_v1.wait(f"systemctl show -p SubState --value {UNIT} | grep -q start-pre")
    assert on_v1.seen()["current"] == on_v1.v2
    succeeds("lab", "power-cut", HOST, "--name", on_v1.lab.name)
    succeeds("lab", "power-on", HOST, "--name", on_v1.lab.name)
    on_v1.wait(f"{HOST_PROGRAM} state --json | grep -q '\"health\": \"healthy\"'", 90)
    assert on_v1.seen() == on_v1.serves(on_v1.v1)
    assert "recover" in on_v1.sh("journalctl -b -t opsctl-audit -o cat --no-pager")
