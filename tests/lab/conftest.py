"""The lab that the lab tests share: ops-1 and two GPU hosts, brought up once, gone at the end with all it made.

A test that breaks machines makes a lab of its own (two machines are up in two seconds) or leaves this one as it was.
``OPSCTL_TEST_LAB`` gives it another name, for two test runs on one computer; ``OPSCTL_TEST_SUITE=trixie`` runs the
tests on machines with Debian 13.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import succeeds
from leftovers import leftovers

from opsctl.engines.events import discard
from opsctl.lab import laboratory, requirements, state

NAME = os.environ.get("OPSCTL_TEST_LAB", "test")
SUITE = os.environ.get("OPSCTL_TEST_SUITE")


@dataclass(frozen=True)
class LabFleet:
    """A lab that runs, and its fleet directory."""

    name: str
    directory: Path
    hosts: tuple[str, ...]

    @property
    def inventory(self) -> Path:
        return self.directory / "inventory.ini"

    @property
    def gpu_hosts(self) -> tuple[str, ...]:
        return tuple(host for host in self.hosts if host.startswith("gpu-"))

    def run(self, host: str, argv: Sequence[str], *, stdin: str = "", timeout_s: float = 60.0
            ) -> subprocess.CompletedProcess[str]:
        """Runs a command on a machine over plain ssh with the fleet's generated configuration."""
        return subprocess.run(["ssh", "-F", self.directory / ".opsctl/ssh_config", host, shlex.join(argv)], input=stdin,
                              capture_output=True, text=True, timeout=timeout_s, check=False)


def unwatched(fleet: Path) -> None:
    """Takes ops-1 out of the group monitor: what watches is tested in test_gpus.py, and takes time to install."""
    inventory = fleet / "inventory.ini"
    text = inventory.read_text()
    assert "[monitor]\nops-1\n\n" in text
    text = text.replace("[monitor]\nops-1\n\n", "")
    inventory.write_text(re.sub(r"\[monitor:vars\]\n(.+\n)*", "", text))  # with GPUs there is an inbox for alerts


@contextmanager
def lab_of_a_module(name: str, gpu_hosts: int, directory: Path, gpus: str | None = None,
                    suite: str | None = None) -> Iterator[LabFleet]:
    """A lab beside the shared one, for all tests of one file; gone at the end, also when what is done to it fails."""
    laboratory.down(name, keep_fleet=False, emit=discard)  # of a run that was killed
    try:
        lab = laboratory.up(name, gpu_hosts, directory, suite or SUITE, discard, gpus).lab
        yield LabFleet(name, lab.fleet, tuple(machine.name for machine in lab.machines))
    finally:
        if state.exists(name):
            laboratory.down(name, keep_fleet=False, emit=discard)


def missing() -> str:
    """Why there can be no lab here; empty when there can."""
    lacks = requirements.missing(requirements.look())
    return " ".join(requirements.words(lacks)) if lacks else ""


@pytest.fixture(scope="session")
def computer() -> None:
    """Skips, with the reason, where there can be no lab."""
    reason = missing()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def lab_fleet(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFleet]:
    # an abstract socket is a lock that goes with its process, whatever becomes of it
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0opsctl-test-lab-{NAME}")
        except OSError:
            pytest.exit(f"another test run has the lab {NAME}; name one of your own in OPSCTL_TEST_LAB", returncode=1)
        laboratory.down(NAME, keep_fleet=False, emit=discard)  # of a run that was killed
        before = leftovers(NAME)
        directory = tmp_path_factory.mktemp("lab") / "fleet"
        try:
            lab = laboratory.up(NAME, 2, directory, SUITE, discard).lab
            unwatched(lab.fleet)
            yield LabFleet(NAME, directory, tuple(machine.name for machine in lab.machines))
        finally:
            laboratory.down(NAME, keep_fleet=False, emit=discard)
        left = leftovers(NAME) - before
        assert not left, "the tests left behind:\n" + "\n".join(sorted(left))


@pytest.fixture(scope="session")
def provisioned(lab_fleet: LabFleet) -> LabFleet:
    """The shared lab after bundle, model and provision: it serves."""
    model = lab_fleet.directory / "tiny.gguf"
    succeeds("bundle", "build", inventory=lab_fleet.inventory)
    succeeds("lab", "model", model)
    succeeds("model", "import", model, "--service", "chat", "--version", "v1", inventory=lab_fleet.inventory)
    succeeds("provision", inventory=lab_fleet.inventory)
    return lab_fleet


@pytest.fixture
def own_lab(computer: None, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LabFleet]:
    """A lab of one test's own with one GPU host; ``parametrize("own_lab", [3], indirect=True)`` makes it three."""
    name = f"{NAME}-own"
    try:
        lab = laboratory.up(name, getattr(request, "param", 1), tmp_path / "fleet", SUITE, discard).lab
        yield LabFleet(name, lab.fleet, tuple(machine.name for machine in lab.machines))
    finally:
        if state.exists(name):
            laboratory.down(name, keep_fleet=False, emit=discard)
