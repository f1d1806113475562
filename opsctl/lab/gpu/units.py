"""What runs on a machine's GPUs, seen from outside: the processes of its inference@ units, and what they compute."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opsctl.lab.gpu.load import visible_gpus
from opsctl.lab.mounts import mounts
from opsctl.lab.processes import PROC, Process

UNIT = re.compile(r"inference@(.+)\.service")
FABRIC_MANAGER = "nvidia-fabricmanager.service"
VISIBLE = b"CUDA_VISIBLE_DEVICES="
CPU_CLOCK = 2  # CPUCLOCK_SCHED of include/linux/posix-timers.h: the CPU time of a whole process
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Worker:
    """A process of an instance. ``inside`` is its pid as the machine knows it."""

    pid: int
    inside: int
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class Instance:
    """An inference@ unit that runs; ``cgroup`` is where systemd inside has put it."""

    name: str
    cgroup: Path
    workers: tuple[Worker, ...]

    @property
    def gpus(self) -> tuple[int, ...]:
        return tuple(sorted({gpu for worker in self.workers for gpu in worker.gpus}))


def machine_cgroup(init: Process) -> Path | None:
    """The tree that the machine's systemd manages; None while it has not made it."""
    try:
        lines = (PROC / str(init.pid) / "cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    unified = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), None)
    root = next((mount.point for mount in mounts() if mount.kind == "cgroup2"), None)
    if unified is None or root is None:
        return None
    inside = Path(unified.lstrip("/"))
    return root / (inside.parent if inside.name == "init.scope" else inside)


def instances(tree: Path, uuids: Sequence[str]) -> tuple[Instance, ...]:
    """The inference@ units below a machine's tree that have processes."""
    found = []
    for unit in _units(tree):
        match = UNIT.fullmatch(unit.name)
        if match:
            workers = tuple(worker for pid in _pids(unit) if (worker := _worker(pid, uuids)))
            if workers:
                found.append(Instance(match[1], unit, workers))
    return tuple(sorted(found, key=lambda instance: instance.name))


def has_fabric_manager(tree: Path) -> bool:
    return any(unit.name == FABRIC_MANAGER and any(_pids(unit)) for unit in _units(tree))


def _units(tree: Path) -> Iterator[Path]:
    """Services are in system.slice, or in a slice of their template below it."""
    for pattern in ("system.slice/*.service", "system.slice/*.slice/*.service"):
        yield from tree.glob(pattern)


def _pids(unit: Path) -> Iterator[int]:
    for procs in unit.glob("**/cgroup.procs"):
        try:
            yield from (int(line) for line in procs.read_text().split())
        except OSError:
            continue  # the unit has just ended


def _worker(pid: int, uuids: Sequence[str]) -> Worker | None:
    try:
        environment = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
        status = (PROC / str(pid) / "status").read_text()
    except OSError:
        return None
    setting = next((entry.removeprefix(VISIBLE).decode() for entry in environment if entry.startswith(VISIBLE)), None)
    inside = next((line.split()[-1] for line in status.splitlines() if line.startswith("NSpid:")), str(pid))
    gpus = visible_gpus(setting, uuids)
    return Worker(pid, int(inside), gpus) if gpus else None


def cpu_time_ns(pid: int) -> int | None:
    """CPU time of a process with all its threads; None when it has gone."""
    try:
        return time.clock_gettime_ns((~pid << 3) | CPU_CLOCK)
    except OSError:
        return None


def memory_bytes(pid: int) -> int:
    """Resident memory, which stands for GPU memory; 0 when the process has gone."""
    try:
        return int((PROC / str(pid) / "statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0
