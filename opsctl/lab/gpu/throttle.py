"""Holds back an instance's processes from outside the machine: its share of the CPU is its GPU's share of the clock.

cgroup v1: a tree of our own in the ``cpu`` hierarchy, which systemd inside a machine does not touch. cgroup v2: the
controller is turned on along the unit's own path.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from opsctl.lab import cgroups

PERIOD_US = 20_000  # short: a token takes some ten milliseconds, and is to come late, not in bursts
LEAST_US = 1_000  # the kernel's own least


def quota_us(limit: float | None) -> int:
    """The quota of a period for so many CPU seconds a second; -1: none."""
    return -1 if limit is None else max(LEAST_US, round(limit * PERIOD_US))


class Throttle:
    """The limit of one instance. Files that are gone belong to a unit that has ended: then there is nothing to do."""

    def __init__(self, lab: str, machine: str, instance: str, unit: Path) -> None:
        self._v1 = cgroups.cpu_group(lab, machine, instance)
        self._unit = unit
        self._inside: frozenset[int] = frozenset()
        self._quota_us = -1

    def hold(self, pids: Iterable[int], limit: float | None) -> None:
        """Sets the limit (CPU seconds a second) for these processes and their future children."""
        quota = quota_us(limit)
        if self._v1 is None:
            if quota != self._quota_us:
                cgroups.enable_cpu(self._unit)
                _write(self._unit / "cpu.max", f"{'max' if quota < 0 else quota} {PERIOD_US}")
        else:
            self._hold_v1(self._v1, frozenset(pids), quota)
        self._quota_us = quota

    def _hold_v1(self, group: Path, pids: frozenset[int], quota: int) -> None:
        if not group.is_dir():
            group.mkdir(parents=True)
            _write(group / "cpu.cfs_period_us", str(PERIOD_US))
            self._inside, self._quota_us = frozenset(), -1
        if quota != self._quota_us:
            _write(group / "cpu.cfs_quota_us", str(quota))
        for pid in pids - self._inside:
            _write(group / "cgroup.procs", str(pid))
        self._inside = pids


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except (FileNotFoundError, ProcessLookupError):
        return
