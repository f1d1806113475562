"""The controller is killed with SIGKILL after each kind of event, and the same command is run again, in a third of the
cases by a second operator from another home: the fleet ends exactly where an undisturbed run leaves it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fingerprint
import pytest
from command import Said, opsctl, refused, succeeds
from conftest import NAME, LabFleet, unwatched

from opsctl.engines.events import discard
from opsctl.lab import laboratory, state
from opsctl.lab.model import write_model

pytestmark = [pytest.mark.lab, pytest.mark.slow]

PROVISION, STAGE, UPDATE = ("provision",), ("stage", "--version", "v2"), (
    "update-model", "--version", "v2", "--yes", "--min-speed", "0")
BARE, SERVING, STAGED = "bare", "serving", "staged"
# What the killed controller had just said, and how many seconds it went on.
POINTS = [
    (PROVISION, "== Preflight", 0.0),
    (PROVISION, "gateway : Unpack the files on the gateway.", 0.0),
    (PROVISION, "base : Install the base packages.", 0.5),
    (PROVISION, "agent : Make the agent's environment.", 0.0),
    (PROVISION, "load_balancer : Configure the load balancer.", 0.0),
    (PROVISION, "changed     publish chat v1", 0.0),
    (PROVISION, "ledger of chat: serve v1", 1.0),
    (PROVISION, "changed     first start of chat.0 on v1", 0.0),
    (STAGE, "stage: run", 0.0),
    (STAGE, "changed     publish chat v2", 0.0),
    (STAGE, "changed     stage chat v2", 0.0),
    (UPDATE, "== Look at chat", 0.0),
    (UPDATE, "== Wave 1", 0.0),
    (UPDATE, "== Wave 1", 1.5),
    (UPDATE, "== Wave 1", 3.0),
    (UPDATE, "chat.0: v1 -> v2", 0.0),
    (UPDATE, "== Wave 2", 2.0),
    (UPDATE, "ledger of chat: serve v2", 0.0),
]
HONOURED_S = 60.0  # a lock without heartbeat


@dataclass(frozen=True)
class Crashes:
    """A lab with snapshots before each command, and what an undisturbed run of it left."""

    lab: LabFleet
    other: Path  # inventory of a second operator
    undisturbed: dict[str, Any]


@pytest.fixture(scope="module")
def crashes(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashes]:
    name = f"{NAME}-crash"
    home = tmp_path_factory.mktemp("crashes")
    laboratory.down(name, keep_fleet=False, emit=discard)
    try:
        lab = laboratory.up(name, 2, home / "ann", None, discard).lab
        unwatched(lab.fleet)
        fleet = LabFleet(name, lab.fleet, tuple(machine.name for machine in lab.machines))
        succeeds("bundle", "build", inventory=fleet.inventory)
        for version, seed in (("v1", 0), ("v2", 1)):
            write_model(fleet.directory / f"{version}.gguf", "small", seed=seed)
            succeeds("model", "import", fleet.directory / f"{version}.gguf", "--service", "chat", "--version", version,
                     inventory=fleet.inventory)
        undisturbed = {}
        for command, label in ((PROVISION, BARE), (STAGE, SERVING), (UPDATE, STAGED)):
            laboratory.snapshot(name, label, discard)
            succeeds(*command, inventory=fleet.inventory)
            undisturbed[label] = fingerprint.settled(fleet)
        shutil.copytree(fleet.directory, home / "bob", symlinks=True, ignore=shutil.ignore_patterns(".opsctl"))
        yield Crashes(fleet, home / "bob/inventory.ini", undisturbed)
    finally:
        if state.exists(name):
            laboratory.down(name, keep_fleet=False, emit=discard)


def killed(inventory: Path, command: tuple[str, ...], moment: str, seconds: float) -> None:
    """Runs a command until it has said ``moment``, and some seconds more; then SIGKILL."""
    with subprocess.Popen([sys.executable, "-m", "opsctl", *command], stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"OPSCTL_INVENTORY": str(inventory)}) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if moment in line:
                break
        else:
            pytest.fail(f"it never said {moment!r}:\n{''.join(said)}")
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)


def again(crashes: Crashes, command: tuple[str, ...], *, by_another: bool) -> Said:
    """The same command, until the dead run's locks let it in: its own operator at once, another one after a minute."""
    if not by_another:
        return opsctl(*command, "--json", inventory=crashes.lab.inventory)
    until = time.monotonic() + HONOURED_S + 30
    while True:
        said = opsctl(*command, "--json", inventory=crashes.other, LOGNAME="bob", HOME=str(crashes.other.parent))
        if said.returncode != 4 or time.monotonic() > until:
            return said
        assert "root@" in refused(said, 4, "lock.held")
        time.sleep(5)


@pytest.mark.parametrize("number", range(len(POINTS)))
def test_a_killed_controller_is_no_matter(crashes: Crashes, number: int) -> None:
    command, moment, seconds = POINTS[number]
    label = {PROVISION: BARE, STAGE: SERVING, UPDATE: STAGED}[command]
    laboratory.restore(crashes.lab.name, label, discard)
    killed(crashes.lab.inventory, command, moment, seconds)
    said = again(crashes, command, by_another=number % 3 == 1)
    assert said.returncode == 0, f"exit {said.returncode}\n{said.stdout}\n{said.stderr}"
    found = fingerprint.settled(crashes.lab)
    for host, expected in crashes.undisturbed[label].items():
        assert fingerprint.differences(expected, found[host]) == [], host
    runs = succeeds("runs", "--json", inventory=crashes.lab.inventory).document["runs"]
    assert not [run for run in runs if run["state"] == "unfinished"], runs
