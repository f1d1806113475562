"""Processes named by pid, start time and boot, so that a reused pid is never mistaken for one of ours."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROC = Path("/proc")
GONE = "ZX"  # a zombie runs nothing and holds nothing


@dataclass(frozen=True)
class Process:
    """``started`` is in clock ticks since boot: field 22 of /proc/PID/stat."""

    pid: int
    started: int
    boot: str

    @property
    def alive(self) -> bool:
        return self.boot == boot_id() and _stat(self.pid) == (self.started, True)


@cache
def boot_id() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> tuple[int, bool] | None:
    """Start time and whether it runs; None when there is no such process."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19]), fields[0] not in GONE


def identify(pid: int) -> Process | None:
    """The process that has ``pid`` now, or None."""
    seen = _stat(pid)
    return Process(pid, seen[0], boot_id()) if seen and seen[1] else None


def children(process: Process) -> tuple[Process, ...]:
    """Direct children of ``process``."""
    try:
        text = (PROC / str(process.pid) / "task" / str(process.pid) / "children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ()
    return tuple(child for child in map(identify, map(int, text.split())) if child)


def all_processes() -> Iterator[Process]:
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (process := identify(int(entry.name))):
            yield process


def arguments(process: Process) -> tuple[str, ...]:
    """Its argument vector; empty for one that has gone or is a kernel thread."""
    try:
        raw = (PROC / str(process.pid) / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return ()
    return tuple(raw.decode("utf-8", "replace").split("\0")[:-1])


def send(process: Process, wanted: int) -> None:
    """Sends a signal to exactly this process; one that has gone is no error."""
    if not process.alive:
        return
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if process.alive:  # the handle now pins the pid, so this answer stays true
            signal.pidfd_send_signal(handle, wanted)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


def wait_gone(process: Process, timeout_s: float) -> bool:
    """Waits for the end of a process, ours or another's; False when it still runs after ``timeout_s``."""
    if not process.alive:
        return True
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        ready, _, _ = select.select([handle], [], [], timeout_s if process.alive else 0)
    finally:
        os.close(handle)
    return bool(ready) or not process.alive
