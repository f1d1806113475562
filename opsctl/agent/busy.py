"""What works on this host already, so that a run waits for it: dpkg, modules of Ansible's, opsctl's own jobs.

A controller that died may have left any of them behind. Looks and touches nothing.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsctl.agent import systemd
from opsctl.agent.paths import Paths
from opsctl.agent.systemd import Run

PROCESSES = Path("/proc")
PACKAGE_LOCKS = ("var/lib/dpkg/lock-frontend", "var/lib/dpkg/lock", "var/lib/apt/lists/lock")
FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid
ANSIBLE = ("AnsiballZ_", "ansible-tmp-")
UNITS = (".service", ".scope")
DRIVER = "opsctl-driver"
# The role nvidia_driver starts the one, a boot in the middle of a change the other: they have no files among the jobs.
DRIVERS = (DRIVER, f"{DRIVER}-continue")
JOBS = {"opsctl-stage-": "stage", "opsctl-cutover@": "cutover", DRIVER: "driver"}
JOB_FILES = (".lock", ".json")


@dataclass(frozen=True)
class Process:
    """``command``: its words, with blanks between them; empty for one of the kernel's, or that has ended."""

    pid: int
    parent: int
    command: str


def busy(paths: Paths, run: Run = systemd.run, processes: Path = PROCESSES) -> list[dict[str, Any]]:
    """``[{"what", "pid", "unit", "command"}]``; ``what``: ``dpkg``, ``ansible``, ``stage``, ``cutover``, ``driver`` or
    ``job``.

    ``pid`` is None where only the unit is known; ``unit`` is empty for what belongs to none.

    Raises:
        OpsctlError: systemd does not answer.
    """
    known = {process.pid: process for process in read_processes(processes)}
    return [*_packages(paths, known, processes),
            *(_of_process("ansible", process.pid, known, processes) for process in modules(known, os.getpid())),
            *_jobs(paths, run)]


def holder(path: Path) -> int | None:
    """The process that holds a POSIX lock on ``path``; None when nobody does, 0 when it has no number here."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    finally:
        os.close(descriptor)
    return None if kind == fcntl.F_UNLCK else max(0, int(pid))


def modules(known: Mapping[int, Process], mine: int) -> list[Process]:
    """Processes of Ansible's modules, of each tree of them the topmost, and none that ``mine`` descends from. Pure."""
    ours = set(ancestors(known, mine))
    found = {process.pid: process for process in known.values()
             if process.pid not in ours and any(word in process.command for word in ANSIBLE)}
    return [process for process in found.values() if process.parent not in found]


def ancestors(known: Mapping[int, Process], pid: int) -> Iterator[int]:
    """``pid`` itself, its parent, and so on. Pure."""
    seen: set[int] = set()
    while pid in known and pid not in seen:
        seen.add(pid)
        yield pid
        pid = known[pid].parent


def read_processes(processes: Path = PROCESSES) -> Iterator[Process]:
    """All that run now, in the order of their numbers."""
    for pid in sorted(int(path.name) for path in processes.iterdir() if path.name.isdigit()):
        folder = processes / str(pid)
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            yield Process(pid, int(fields[1]), command)


def unit_of(cgroup: str) -> str:
    """The unit in ``/proc/<pid>/cgroup``, empty when there is none. Pure."""
    names = [name for line in cgroup.splitlines() for name in line.split("/") if name.endswith(UNITS)]
    return names[-1] if names else ""


def job_names(files: Sequence[str]) -> list[str]:
    """Jobs by the names of their files: a lock from before they start, later their status. Pure."""
    return sorted({name.removesuffix(suffix) for name in files for suffix in JOB_FILES
                   if name.endswith(suffix) and not name.startswith(".")})


def _packages(paths: Paths, known: Mapping[int, Process], processes: Path) -> list[dict[str, Any]]:
    """One process may hold all three. That of a driver's change is told with its unit."""
    holders = {pid: None for name in PACKAGE_LOCKS if (pid := holder(paths.root / name)) is not None}
    found = [_of_process("dpkg", pid, known, processes) for pid in holders]
    return [one for one in found if one["unit"].removesuffix(".service") not in DRIVERS]


def _of_process(what: str, pid: int, known: Mapping[int, Process], processes: Path) -> dict[str, Any]:
    unit = ""
    with suppress(FileNotFoundError, ProcessLookupError):
        unit = unit_of((processes / str(pid) / "cgroup").read_text(errors="replace"))
    return {"what": what, "pid": pid or None, "unit": unit, "command": known[pid].command if pid in known else ""}


def _jobs(paths: Paths, run: Run) -> list[dict[str, Any]]:
    names = job_names([path.name for path in paths.jobs.iterdir()] if paths.jobs.is_dir() else [])
    units = systemd.show([f"{name}.service" for name in sorted({*names, *DRIVERS})], run)
    return [{"what": next((what for prefix, what in JOBS.items() if unit.name.startswith(prefix)), "job"),
             "pid": None, "unit": unit.name, "command": unit.description} for unit in units.values() if unit.busy]
