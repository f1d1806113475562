"""On machines: opsctl check finds what the lab can break, and what would break a provision is refused or waited for."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import fingerprint
import pytest
from command import Said, opsctl, refused, succeeds
from conftest import NAME, LabFleet, lab_of_a_module, unwatched

from opsctl.engines.events import discard
from opsctl.errors import ExitCode
from opsctl.lab import laboratory
from opsctl.lab.gpu.faults import KINDS
from opsctl.lab.model import write_model

pytestmark = [pytest.mark.lab, pytest.mark.slow]

OLD, NEW = "580.126.09", "595.71.05"
LIBRARY = ("cd /root && APT_CONFIG=/etc/opsctl/apt.conf apt-get -q download libnvidia-ml1={0}-1+lab && "
           "dpkg --force-depends -i libnvidia-ml1_{0}*.deb && rm libnvidia-ml1_*.deb")
# The fault, the check that sees it, its verdict, and whether the kernel's log keeps it until the next boot.
FAULTS = [
    (("cooling", "--factor", "11.5"), "gpu-throttling", "warn", False),  # so bad that a GPU is too hot without work
    (("nvml-hang", "10m"), "driver-answers", "fix", False),
    (("lost", "--gpu", "1"), "gpu-count", "fix", False),
    (("xid", "79"), "xids", "warn", True),
]
HOLD = ("import fcntl, os, sys; file = open('/var/lib/dpkg/lock-frontend', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', os.getpid(), flush=True); sys.stdin.read()")
PACKAGE = f"""set -e; mkdir -p /root/gpu-tool/DEBIAN
printf 'Package: gpu-tool\\nVersion: 1.0\\nArchitecture: all\\nMaintainer: site\\nDescription: a tool of the site
Depends: libnvidia-ml1 (= {OLD}-1+lab)\\n' > /root/gpu-tool/DEBIAN/control
dpkg-deb --build /root/gpu-tool /root/gpu-tool.deb && dpkg -i /root/gpu-tool.deb"""


@pytest.fixture(scope="module")
def machines(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFleet]:
    """gpu-1 has two H200 and an instance that is drained and stopped, so that its driver may be changed."""
    directory = tmp_path_factory.mktemp("preflight") / "fleet"
    with lab_of_a_module(f"{NAME}-preflight", 1, directory, "gpu-1=2xH200") as fleet:
        unwatched(directory)
        succeeds("bundle", "build", inventory=fleet.inventory)
        write_model(directory / "v1.gguf", "small")
        succeeds("model", "import", directory / "v1.gguf", "--service", "chat", "--version", "v1",
                 inventory=fleet.inventory)
        provision(fleet, 0)
        succeeds("drain", "gpu-1", "--allow-outage", "--yes", inventory=fleet.inventory)
        sh(fleet, "systemctl stop inference@chat.0")
        yield fleet


def provision(fleet: LabFleet, exit_code: int, *more: str) -> Said:
    said = opsctl("provision", *more, inventory=fleet.inventory, timeout_s=1800)
    assert said.returncode == exit_code, said.stdout + said.stderr
    return said


def sh(fleet: LabFleet, line: str) -> str:
    done = fleet.run("gpu-1", ["sudo", "sh", "-c", line], timeout_s=300)
    assert done.returncode == 0, f"{line}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def want(fleet: LabFleet, version: str, *lines: str) -> None:
    """The inventory wants another driver on gpu-1, which may be changed; further lines are of its group."""
    sh(fleet, "systemctl stop inference@chat.0")  # a provision has started it again
    text = re.sub(r'nvidia_driver_version="[^"]*"\n(nvidia_driver_lock.*\n)*',
                  "\n".join([f'nvidia_driver_version="{version}"', *lines, ""]), fleet.inventory.read_text())
    fleet.inventory.write_text(text)


def packages(fleet: LabFleet) -> str:
    return sh(fleet, "dpkg --get-selections && dpkg-query --show")


def verdicts(fleet: LabFleet) -> dict[str, Any]:
    said = opsctl("check", "--limit", "gpu-1", "--json", inventory=fleet.inventory)
    assert said.returncode in (ExitCode.DONE, ExitCode.FOUND_WRONG), said.stdout + said.stderr
    return {one["id"]: one for host in said.document["hosts"] for one in host["findings"]}


def until(fleet: LabFleet, check: str, verdict: str, seconds: float = 240) -> dict[str, Any]:
    """Asks until the check says so: heat takes its time to come and to go."""
    deadline = time.monotonic() + seconds
    while (found := verdicts(fleet))[check]["verdict"] != verdict:
        assert time.monotonic() < deadline, found[check]
    return found


def test_every_fault_that_a_lab_knows_is_looked_for() -> None:
    assert {fault[0] for fault, *_ in FAULTS} | {"clear"} == set(KINDS)


@pytest.mark.parametrize(("fault", "check", "verdict", "logged"), FAULTS, ids=[fault[0][0] for fault in FAULTS])
def test_a_fault_is_found_and_its_end_too(machines: LabFleet, fault: tuple[str, ...], check: str, verdict: str,
                                          logged: bool) -> None:
    assert verdicts(machines)[check]["verdict"] == "pass"
    succeeds("lab", "fault", "gpu-1", *fault, "--name", machines.name)
    try:
        found = until(machines, check, verdict)[check]
        assert "gpu-1" in found["fix"], found
    finally:
        succeeds("lab", "fault", "gpu-1", "clear", "--name", machines.name)
    if logged:
        assert verdicts(machines)[check]["verdict"] == verdict, "what the log has is told until the next boot"
    if logged or fault[0] == "lost":
        laboratory.power_cut(machines.name, ["gpu-1"], discard)
        laboratory.power_on(machines.name, ["gpu-1"], discard)
    until(machines, check, "pass")


def test_a_library_of_another_version_is_found(machines: LabFleet) -> None:
    sh(machines, LIBRARY.format(NEW))
    try:
        found = verdicts(machines)
        assert found["driver-answers"]["verdict"] == "fix", found["driver-answers"]
        assert "a library of another version" in found["driver-answers"]["what"]
    finally:
        sh(machines, LIBRARY.format(OLD) + " && apt-mark hold libnvidia-ml1")
    assert verdicts(machines)["driver-answers"]["verdict"] == "pass"


@contextlib.contextmanager
def untouched(fleet: LabFleet) -> Iterator[None]:
    before = {host: fingerprint.of_host(fleet, host) for host in fleet.hosts}
    yield
    for host, expected in before.items():
        assert fingerprint.differences(expected, fingerprint.of_host(fleet, host)) == [], host


@pytest.mark.parametrize("verb", ["provision", "plan"])
def test_a_lock_of_other_gpus_is_refused(machines: LabFleet, verb: str) -> None:
    lock = machines.directory / "stack.lock"
    succeeds("stack", "resolve", "--write", inventory=machines.inventory)
    text = lock.read_text()
    lock.write_text(text.replace('"2335"', '"26b9"').replace("H200", "L40S"))
    try:
        assert lock.read_text() != text
        with untouched(machines):
            said = opsctl(verb, "--json", inventory=machines.inventory)
            assert "gpu-1" in refused(said, 5, "stack_lock.does_not_hold")
    finally:
        lock.unlink()


def test_what_would_break_it_is_refused_until_somebody_knows_better(machines: LabFleet) -> None:
    sh(machines, "install -m 755 /dev/null /usr/bin/nvidia-uninstall")
    try:
        with untouched(machines):
            for verb in ("provision", "plan"):
                sentence = refused(opsctl(verb, "--json", inventory=machines.inventory), 5, "check.stops_provision")
                assert "gpu-1: driver-run-file: " in sentence
                assert "opsctl exec --limit gpu-1 -- nvidia-uninstall" in sentence
                assert "--allow-finding driver-run-file" in sentence
            said = opsctl("plan", "--allow-finding", "driver-run-file", inventory=machines.inventory)
            assert said.returncode in (ExitCode.DONE, ExitCode.PENDING), said.stdout + said.stderr
    finally:
        sh(machines, "rm /usr/bin/nvidia-uninstall")


def test_a_driver_takes_no_package_of_the_site_along(machines: LabFleet) -> None:
    """The preflight sees it; and where it is told not to mind, apt's own simulation does, before anything is done."""
    sh(machines, PACKAGE)
    want(machines, NEW)
    try:
        before = packages(machines)
        with untouched(machines):
            sentence = refused(opsctl("provision", "--json", inventory=machines.inventory), 5, "check.stops_provision")
        assert "driver-dependents: gpu-tool would be removed" in sentence
        said = opsctl("provision", "--json", "--allow-finding", "driver-dependents", inventory=machines.inventory,
                      timeout_s=1800)
        assert said.returncode == ExitCode.MIXED, said.stdout + said.stderr
        assert "apt would remove gpu-tool" in said.stdout
        assert packages(machines) == before
    finally:
        want(machines, OLD)
        sh(machines, "dpkg --purge gpu-tool")


@contextlib.contextmanager
def lock_held(fleet: LabFleet) -> Iterator[int]:
    """Somebody on gpu-1 holds dpkg's lock; gives the process's number there."""
    argv = ["ssh", "-F", str(fleet.directory / ".opsctl/ssh_config"), "gpu-1", f'exec sudo python3 -c "{HOLD}"']
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        word, pid = process.stdout.readline().split()
        assert word == "held"
        yield int(pid)
        process.stdin.close()


@contextlib.contextmanager
def provisioning(fleet: LabFleet) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "opsctl", "provision", str(fleet.inventory)]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def heard(process: subprocess.Popen[str], *words: str) -> str:
    """The first line that has one of these words."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if any(word in line for word in words):
            return line
    raise AssertionError("".join(lines))


def test_who_never_lets_dpkgs_lock_go_is_named_in_the_error(machines: LabFleet) -> None:
    want(machines, NEW, "nvidia_driver_lock_patience_s=10")
    before = packages(machines)
    with provisioning(machines) as run:
        heard(run, "== Driver")
        with lock_held(machines) as pid:
            assert run.stdout is not None
            rest = run.stdout.read()
            assert run.wait(60) == ExitCode.MIXED, rest
    error = next(line for line in rest.splitlines() if line.startswith("error:"))
    assert f"(pid {pid}, " in error, error
    assert "python3 -c import fcntl" in error, error
    assert "has held dpkg's lock for more than 10 s" in error, error
    assert packages(machines) == before


def test_who_holds_dpkgs_lock_is_named_and_waited_for(machines: LabFleet) -> None:
    """Before the run begins its work, and in the middle of it."""
    want(machines, NEW)
    with contextlib.ExitStack() as outer:
        with lock_held(machines) as pid:
            run = outer.enter_context(provisioning(machines))
            line = heard(run, "busy, waiting for it to end")
            assert f"process {pid}, python3 -c import fcntl" in line, line
        heard(run, "== Driver")
        with lock_held(machines) as pid:
            began = time.monotonic()
            line = heard(run, "which holds dpkg's lock")
            assert time.monotonic() - began < 60, "within seconds; on a busy computer some more"
            assert "gpu-1      waits for python3 -c import fcntl" in line, line
            assert f"(pid {pid}, " in line, line
        assert run.stdout is not None
        rest = run.stdout.read()
        assert run.wait(60) == 0, rest
    assert NEW in sh(machines, "cat /proc/driver/nvidia/version")
