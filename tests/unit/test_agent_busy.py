"""What keeps a host busy: real locks of real processes, real command lines, units that are played."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from machines import Machine
from systemd_kit import Systemd

from opsctl.agent import busy as busy_module
from opsctl.agent.busy import Process, busy, holder, job_names, modules, unit_of
from opsctl.agent.durable import locked
from opsctl.agent.paths import Paths
from opsctl.errors import OpsctlError

LOCKS = """
import fcntl, sys
files = [open(name, "w") for name in sys.argv[1:]]
for file in files:
    fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
WAITS = 'import sys; print("held", flush=True); sys.stdin.read()'


@pytest.fixture
def host(tmp_path: Path) -> Paths:
    for name in ("var/lib/dpkg", "var/lib/apt/lists", "run/opsctl/jobs"):
        (tmp_path / name).mkdir(parents=True)
    return Paths(tmp_path)


@contextmanager
def running(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said it is there; it ends with the block."""
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def found(host: Paths, what: str) -> list[dict[str, Any]]:
    return [one for one in busy(host, Systemd()) if one["what"] == what]


@pytest.mark.parametrize("names", [["var/lib/dpkg/lock-frontend"], ["var/lib/dpkg/lock"], ["var/lib/apt/lists/lock"],
                                   ["var/lib/dpkg/lock-frontend", "var/lib/dpkg/lock"]])
def test_who_holds_a_lock_of_the_packages_is_told_once(host: Paths, names: list[str]) -> None:
    files = [str(host.root / name) for name in names]
    with running(sys.executable, "-c", LOCKS, *files) as process:
        (one,) = found(host, "dpkg")
        assert one["pid"] == process.pid
        assert files[0] in one["command"]
        assert holder(Path(files[0])) == process.pid, "asking took the lock from nobody"
    assert found(host, "dpkg") == []


def test_a_lock_file_that_nobody_holds_is_no_work(host: Paths) -> None:
    lock = host.root / "var/lib/dpkg/lock"
    assert holder(lock) is None
    lock.touch()
    assert holder(lock) is None
    with locked(lock):  # flock is another kind of lock, which dpkg neither takes nor sees
        assert holder(lock) is None


def test_a_module_that_a_dead_controller_left(host: Paths) -> None:
    name = f"/root/.ansible/tmp/ansible-tmp-{os.getpid()}-1/AnsiballZ_apt.py"
    with running("/bin/sh", "-c", f"{sys.executable} -c '{WAITS}' {name}; exit 0") as process:
        ours = [one for one in found(host, "ansible") if name in one["command"]]
        assert [one["pid"] for one in ours] == [process.pid], "the shell, and not its python too"
    assert not [one for one in found(host, "ansible") if name in one["command"]]


def test_the_module_that_asks_is_not_told() -> None:
    known = {process.pid: process for process in (
        Process(1, 0, "/sbin/init"), Process(10, 1, "sshd: ann"),
        Process(11, 10, "sh -c python3 /tmp/ansible-tmp-1/AnsiballZ_command.py"),
        Process(12, 11, "python3 /tmp/ansible-tmp-1/AnsiballZ_command.py"), Process(13, 12, "opsctl-host busy"),
        Process(20, 1, "sh -c python3 /tmp/ansible-tmp-2/AnsiballZ_apt.py"),
        Process(21, 20, "python3 /tmp/ansible-tmp-2/AnsiballZ_apt.py"), Process(22, 21, "apt-get install nginx"),
        Process(30, 1, "python3 /tmp/ansible-tmp-3/AnsiballZ_copy.py"))}
    assert [process.pid for process in modules(known, 13)] == [20, 30]
    assert [process.pid for process in modules(known, 22)] == [11, 30]


def test_ancestors_end_also_where_numbers_were_used_again() -> None:
    known = {1: Process(1, 2, ""), 2: Process(2, 1, "")}
    assert list(busy_module.ancestors(known, 1)) == [1, 2]


@pytest.mark.parametrize(("cgroup", "unit"), [
    ("0::/system.slice/apt-daily-upgrade.service\n", "apt-daily-upgrade.service"),
    ("0::/user.slice/user-0.slice/session-4.scope\n", "session-4.scope"),
    ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.service\n", "x.service"),
    ("1:name=systemd:/system.slice/cron.service\n0::/\n", "cron.service"),
    ("0::/\n", ""), ("", ""),
])
def test_the_unit_of_a_process(cgroup: str, unit: str) -> None:
    assert unit_of(cgroup) == unit


def test_processes_that_end_while_they_are_looked_at(tmp_path: Path) -> None:
    for name in ("1", "7", "self"):
        (tmp_path / name).mkdir()
    (tmp_path / "1/stat").write_text("1 (a (b) c) S 0 1 1\n")
    (tmp_path / "1/cmdline").write_bytes(b"/sbin/init\0--x\0")
    (tmp_path / "7/stat").write_text("7 (gone) S 1 1 1\n")
    assert list(busy_module.read_processes(tmp_path)) == [Process(1, 0, "/sbin/init --x")]


def test_jobs_that_run_and_those_that_ended(host: Paths) -> None:
    """One that has just begun has its lock alone, and no status yet."""
    names = [".opsctl-x.json.abc", "opsctl-cutover@chat.0.lock", "opsctl-cutover@chat.1.json",
             "opsctl-cutover@chat.1.lock", "opsctl-stage-chat_v2-b.lock", "opsctl-stage-chat_v2-b.rate-limit",
             "opsctl-other.lock"]
    for name in names:
        (host.jobs / name).touch()
    assert job_names(names) == ["opsctl-cutover@chat.0", "opsctl-cutover@chat.1", "opsctl-other",
                                "opsctl-stage-chat_v2-b"]
    units = Systemd({"opsctl-cutover@chat.0.service": "active", "opsctl-stage-chat_v2-b.service": "activating",
                     "opsctl-other.service": "deactivating"},
                    about={"opsctl-cutover@chat.0.service": "opsctl work-cutover chat.0"})
    told = [(one["what"], one["unit"], one["pid"]) for one in busy(host, units) if one["what"] != "ansible"]
    assert told == [("cutover", "opsctl-cutover@chat.0.service", None), ("job", "opsctl-other.service", None),
                    ("stage", "opsctl-stage-chat_v2-b.service", None)]
    assert busy(host, units)[-3]["command"] == "opsctl work-cutover chat.0"


def test_a_change_of_the_driver_has_no_file_among_the_jobs(host: Paths) -> None:
    """The role nvidia_driver starts it, and the unit outlives who did."""
    units = Systemd({"opsctl-driver.service": "active"}, about={"opsctl-driver.service": "driver-transaction"})
    told = [one for one in busy(host, units) if one["what"] != "ansible"]
    assert told == [{"what": "driver", "pid": None, "unit": "opsctl-driver.service", "command": "driver-transaction"}]
    assert [one for one in busy(host, Systemd()) if one["what"] != "ansible"] == []


def test_nor_has_one_that_goes_on_after_a_boot(host: Paths) -> None:
    units = Systemd({"opsctl-driver-continue.service": "activating"})
    told = [(one["what"], one["unit"]) for one in busy(host, units) if one["what"] != "ansible"]
    assert told == [("driver", "opsctl-driver-continue.service")]


@pytest.mark.parametrize("unit", ["opsctl-driver.service", "opsctl-driver-continue.service"])
def test_a_driver_that_holds_dpkg_is_told_as_that(host: Paths, monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    monkeypatch.setattr(busy_module, "unit_of", lambda cgroup: unit)
    with running(sys.executable, "-c", LOCKS, str(host.root / "var/lib/dpkg/lock")):
        told = [one["what"] for one in busy(host, Systemd({unit: "active"}))]
    assert "driver" in told
    assert "dpkg" not in told


def test_a_systemd_that_does_not_answer_is_no_idle_host(host: Paths) -> None:
    (host.jobs / "opsctl-cutover@chat.0.lock").touch()

    def silent(argv: Any, timeout_s: float = 0) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 1, "", "bus is down")
    with pytest.raises(OpsctlError):
        busy(host, silent)


def test_the_verb_on_a_host_that_never_had_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "__defaults__", (Systemd(), busy_module.PROCESSES))  # there may be none here
    done = Machine(Paths(tmp_path), "gpu-1").run(["opsctl-host", "busy"])
    assert done.returncode == 0
    assert [one for one in json.loads(done.stdout)["busy"] if one["what"] != "ansible"] == []
