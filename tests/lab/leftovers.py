"""What labs and what is done with them leave on a computer: mounts, loop devices, links, processes, cgroups, folders.

Compared before and after. What this computer does besides is not looked at, nor are labs of other people.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from pathlib import Path

from opsctl.lab import state
from opsctl.lab.mounts import mounts
from opsctl.lab.processes import PROC, Process, all_processes, arguments

# Every process that a test starts inherits this variable, and so does whatever that process leaves running.
MARK = "TEST_RUN_MARK"
os.environ[MARK] = uuid.uuid4().hex
PLACES = (str(state.STATE_ROOT), str(state.CACHE_ROOT))
LINKS = re.compile(r"opslab\d+|vb-l\d+-.*")
FOLDERS = (state.STATE_ROOT, state.CACHE_ROOT / "base", Path("/run/systemd/nspawn/propagate"))


def leftovers(*names: str) -> frozenset[str]:
    """Everything there is now, in words; without what belongs to labs that exist and are none of ``names``."""
    foreign = [mark for lab in state.load_all() if lab.name not in names
               for mark in (f"{lab.directory}/", f"{lab.fleet}/", f"{lab.bridge}/", f"opsctl-lab-{lab.name}/",
                            f"vb-l{lab.number}-", f"/l{lab.number}-")]
    found = {*_mounts(), *_loop_devices(), *_links(), *_processes(), *_cgroups(), *_folders()}
    return frozenset(entry for entry in found if not any(mark in f"{entry}/" for mark in foreign))


def _ours(text: str) -> bool:
    return any(place in text for place in PLACES)


def _mounts() -> set[str]:
    return {words for mount in mounts() if _ours(words := f"mount {mount.point} {mount.kind} {mount.options}")}


def _loop_devices() -> set[str]:
    listed = subprocess.run(["losetup", "--json", "--list"], capture_output=True, check=True).stdout
    devices = json.loads(listed)["loopdevices"] if listed.strip() else []
    return {f"loop device {device['name']} {device['back-file']}" for device in devices if _ours(device["back-file"])}


def _links() -> set[str]:
    return {f"link {link.name}" for link in Path("/sys/class/net").iterdir() if LINKS.fullmatch(link.name)}


def _processes() -> set[str]:
    return {f"process {process.pid} {' '.join(arguments(process))} {about}" for process in all_processes()
            if process.pid != os.getpid() and (about := _why_ours(process))}


def _why_ours(process: Process) -> str:
    """Started by this test run, by a lab, or living on a lab's disk; empty for others."""
    if f"{MARK}={os.environ[MARK]}" in _read(process, "environ").split("\0"):
        return "of this test run"
    groups = [line for line in _read(process, "cgroup").split() if "opsctl-lab-" in line]
    if groups or _ours(" ".join(arguments(process))):
        return " ".join(groups) or "of a lab"
    roots = [mount.options for mount in mounts(process.pid) if mount.point == Path("/")]
    return next(filter(_ours, roots), "")


def _read(process: Process, name: str) -> str:
    """A file of /proc/PID; empty for a process that has gone or shows nobody what it has."""
    try:
        return (PROC / str(process.pid) / name).read_text(errors="replace")
    except OSError:
        return ""


def _cgroups() -> set[str]:
    return {f"cgroup {found}" for found in Path("/sys/fs/cgroup").glob("*/opsctl-lab-*")}


def _folders() -> set[str]:
    return {f"folder {entry}" for folder in FOLDERS if folder.is_dir() for entry in folder.iterdir()}
