"""Two operators, a suspended one, and Ctrl-C: who may act, who is told what, and where the fleet ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from command import opsctl, refused, succeeds

from opsctl.lab.model import write_model
from opsctl.releases.remote import HOST_PROGRAM

pytestmark = [pytest.mark.lab, pytest.mark.slow]

Two = tuple[Path, Path]
Words = tuple[str, ...]
OPTIONS = ("--yes", "--min-speed", "0", "--allow-bad")
AT_ONCE_S = 1.5  # a person sees that Ctrl-C was heard


class Operator:
    """A running opsctl of somebody."""

    everybody: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, inventory: Path, *words: str, name: str = "") -> None:
        variables = os.environ | {"OPSCTL_INVENTORY": str(inventory)} | ({"LOGNAME": name} if name else {})
        self.process = subprocess.Popen([sys.executable, "-m", "opsctl", *words], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
        self.everybody.append(self.process)
        self.said: list[str] = []

    def until(self, moment: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if moment in line:
                return
        pytest.fail(f"it never said {moment!r}:\n{''.join(self.said)}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, timeout_s: float = 200) -> int:
        out, said = self.process.communicate(timeout=timeout_s)
        self.said += [out, said]
        return self.process.returncode

    @property
    def words(self) -> str:
        return "".join(self.said)


@pytest.fixture(scope="module")
def two(provisioned: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """Inventories of two operators with fleet directories of their own; op2 is v1's model with other arguments."""
    folder = tmp_path_factory.mktemp("operators")
    write_model(folder / "small.gguf", "small", seed=11)
    succeeds("model", "import", folder / "small.gguf", "--service", "chat", "--version", "op2",
             inventory=provisioned.inventory)
    shutil.copytree(provisioned.directory, folder / "bob", symlinks=True, ignore=shutil.ignore_patterns(".opsctl"))
    yield provisioned.inventory, folder / "bob/inventory.ini"
    succeeds("update-model", "--version", "v1", *OPTIONS, inventory=provisioned.inventory)


@pytest.fixture
def update(provisioned: Any, two: Two) -> Iterator[Words]:
    """Moves everything to the other of the two releases; nothing unfinished is in its way."""
    for run in succeeds("runs", "--json", inventory=two[0]).document["runs"]:
        if run["state"] == "unfinished":
            succeeds("lock", "break", run["run"], "--yes", inventory=two[0])
    yield "update-model", "--version", "op2" if "v1" in releases(provisioned) else "v1", *OPTIONS
    for process in Operator.everybody:
        process.kill()


def releases(lab: Any) -> set[str]:
    """What is served; every instance is well and gets requests."""
    found = set()
    for host in lab.gpu_hosts:
        done = lab.run(host, ["sudo", HOST_PROGRAM, "state", "--json"])
        state = json.loads(done.stdout)
        assert not state["drains"], state["drains"]
        (instance,) = state["instances"]
        assert instance["health"] == "healthy", instance
        found.add(instance["release"])
    return found


def locks(lab: Any) -> list[Any]:
    return [lock for host in lab.hosts
            for lock in json.loads(lab.run(host, ["sudo", HOST_PROGRAM, "locks"]).stdout)["locks"]]


def test_the_second_of_two_is_told_who_is_at_work(provisioned: Any, two: Two, update: Words) -> None:
    ann = Operator(two[0], *update)
    ann.until("== Wave 1")
    said = opsctl(*update, "--json", inventory=two[1], LOGNAME="bob")
    told = refused(said, 4, "lock.held")
    assert "root@" in told and "update-model" in told
    other = refused(opsctl("provision", "--json", inventory=two[1], LOGNAME="bob"), 4, "lock.held")
    assert "update-model" in other
    assert ann.end() == 0, ann.words
    assert releases(provisioned) == {update[2]}
    assert locks(provisioned) == []


def test_a_suspended_operator_wakes_up_and_does_nothing_more(provisioned: Any, two: Two, update: Words) -> None:
    ann = Operator(two[0], *update)
    ann.until("== Wave 1")
    ann.signal(signal.SIGSTOP)
    try:
        until = time.monotonic() + 120
        while True:
            said = opsctl(*update, "--json", inventory=two[1], LOGNAME="bob")
            if said.returncode != 4:
                break
            assert time.monotonic() < until, said.stdout
            time.sleep(3)
        assert said.returncode == 0, said.stdout + said.stderr
        assert "no sign of life" in said.stderr or "heartbeat" in said.stderr
    finally:
        ann.signal(signal.SIGCONT)
    assert ann.end() == 4, ann.words
    assert "lock.lost" in ann.words or "run.diverged" in ann.words
    assert releases(provisioned) == {update[2]}
    assert locks(provisioned) == []


def test_ctrl_c_is_heard_at_once_and_resume_goes_on(provisioned: Any, two: Two, update: Words) -> None:
    ann = Operator(two[0], *update)
    ann.until("== Wave 1")
    ann.signal(signal.SIGINT)
    began = time.monotonic()
    ann.until("interrupted")
    assert time.monotonic() - began < AT_ONCE_S
    assert ann.end(60) == 130, ann.words
    assert "opsctl resume" in ann.words
    assert locks(provisioned) == []
    blocked = opsctl("provision", "--json", inventory=two[1], LOGNAME="bob")
    assert "opsctl resume" in refused(blocked, 4, "run.unfinished")
    succeeds("resume", inventory=two[1], LOGNAME="bob")
    assert releases(provisioned) == {update[2]}
    runs = succeeds("runs", "--json", inventory=two[0]).document["runs"]
    assert runs[0]["state"] != "unfinished", runs[0]
    assert "nothing to resume" in succeeds("resume", inventory=two[0]).stdout


def test_a_second_ctrl_c_leaves_at_once_and_its_lock_can_be_broken(provisioned: Any, two: Two, update: Words) -> None:
    ann = Operator(two[0], *update)
    ann.until("== Wave 1")
    ann.signal(signal.SIGTERM)
    time.sleep(0.2)
    ann.signal(signal.SIGTERM)
    began = time.monotonic()
    assert ann.end(30) == 130, ann.words
    assert time.monotonic() - began < AT_ONCE_S + 1
    held = succeeds("lock", "status", "--json", inventory=two[1]).document["locks"]
    if held:  # whatever the first signal had put in order already
        run = held[0]["holder"]["run"]
        refused(opsctl("lock", "break", run, "--json", inventory=two[1], LOGNAME="bob"), 2, "confirm.needs_yes")
        succeeds("lock", "break", run, "--yes", inventory=two[1], LOGNAME="bob")
    assert locks(provisioned) == []
    succeeds(*update, inventory=two[1], LOGNAME="bob")
    assert releases(provisioned) == {update[2]}


def test_a_host_on_hold_is_left_alone_and_shown(provisioned: Any, two: Two, update: Words) -> None:
    (before,) = releases(provisioned)
    succeeds("hold", "gpu-2", "--for", "2d", "-m", "RMA", inventory=two[0])
    try:
        assert "RMA" in succeeds("status", inventory=two[1]).stdout
        said = succeeds(*update, "--allow-outage", inventory=two[1])
        assert "RMA" in said.stderr
        state = json.loads(provisioned.run("gpu-2", ["sudo", HOST_PROGRAM, "state", "--json"]).stdout)
        assert state["instances"][0]["release"] == before
        named = opsctl(*update, "--limit", "gpu-2", "--json", inventory=two[1])
        assert "RMA" in refused(named, 4, "host.on_hold")
    finally:
        succeeds("release", "gpu-2", inventory=two[1])
    succeeds(*update, inventory=two[0])
    assert releases(provisioned) == {update[2]}
