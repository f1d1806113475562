"""A cgroup of its own for each machine, where no systemd of this computer gives it one.

Without it all machines share one tree: a unit stopped in one waits for, and in the end kills, its namesakes in the
others.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from opsctl.lab.mounts import mounts

REMOVE_DEADLINE_S = 5.0
POLL_S = 0.02


def systemd_runs_here() -> bool:
    """Whether this computer was booted by systemd (sd_booted(3)): nspawn then makes a scope for each machine."""
    return Path("/run/systemd/system").is_dir()


def is_unified() -> bool:
    """Whether cgroup v2 stands alone here."""
    return Path("/sys/fs/cgroup/cgroup.controllers").exists()


def _hierarchies() -> tuple[Path, ...]:
    """The trees that systemd inside a machine manages: v2, and v1's name=systemd."""
    return tuple(mount.point for mount in mounts()
                 if mount.kind == "cgroup2" or (mount.kind == "cgroup" and "name=systemd" in mount.options.split(",")))


def cpu_group(lab: str, machine: str, instance: str) -> Path | None:
    """Where an instance's CPU time is limited from outside under cgroup v1; None: there is no ``cpu`` hierarchy, so v2.

    Not made here: it is when there is something to hold back.
    """
    hierarchy = _cpu_hierarchy()
    return _of_lab(hierarchy, lab) / machine / instance if hierarchy else None


def _cpu_hierarchy() -> Path | None:
    return next((mount.point for mount in mounts()
                 if mount.kind == "cgroup" and "cpu" in mount.options.split(",")), None)


def enable_cpu(group: Path) -> None:
    """Turns on the ``cpu`` controller for a cgroup of v2, in all that lie above it."""
    root = next(mount.point for mount in mounts() if mount.kind == "cgroup2")
    for above in reversed([parent for parent in group.parents if parent.is_relative_to(root)]):
        control = above / "cgroup.subtree_control"
        if control.exists() and "cpu" not in control.read_text().split():
            control.write_text("+cpu")


def create(lab: str, machine: str) -> tuple[Path, ...]:
    """The machine's cgroups, to be entered before nspawn starts; none where systemd makes them."""
    if systemd_runs_here():
        return ()
    found = tuple(_of_lab(hierarchy, lab) / machine for hierarchy in _hierarchies())
    for directory in found:
        directory.mkdir(parents=True, exist_ok=True)
    return found


def remove(lab: str) -> None:
    """Removes the lab's cgroups. Processes that were just killed may take a moment to leave them."""
    deadline = time.monotonic() + REMOVE_DEADLINE_S
    cpu = _cpu_hierarchy()
    for hierarchy in (*_hierarchies(), *([cpu] if cpu else [])):
        for found, _, _ in os.walk(_of_lab(hierarchy, lab), topdown=False):
            while Path(found).is_dir():
                try:
                    Path(found).rmdir()
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(POLL_S)


def _of_lab(hierarchy: Path, lab: str) -> Path:
    return hierarchy / f"opsctl-lab-{lab}"
