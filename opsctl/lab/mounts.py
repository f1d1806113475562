"""Mounts as the kernel lists them, and an unmount that is sure."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from opsctl.errors import OpsctlError
from opsctl.lab.commands import CommandError, run
from opsctl.lab.processes import PROC, arguments, identify

UNMOUNT_DEADLINE_S = 30.0  # a busy computer takes seconds to take a killed machine's namespaces apart
POLL_S = 0.02


@dataclass(frozen=True)
class Mount:
    point: Path
    kind: str
    source: str
    options: str  # of the file system: an overlay's lowerdir, upperdir, workdir


def parse_mounts(mountinfo: str) -> tuple[Mount, ...]:
    """/proc/PID/mountinfo, in mount order."""
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, source, options = after.split(" ", 2)
        found.append(Mount(Path(_unescape(before.split(" ")[4])), kind, _unescape(source), _unescape(options)))
    return tuple(found)


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mounts(pid: int | str = "self") -> tuple[Mount, ...]:
    """Mounts that a process sees; none for one that has gone."""
    try:
        return parse_mounts((PROC / str(pid) / "mountinfo").read_text())
    except (FileNotFoundError, ProcessLookupError, OSError):
        return ()


def mounts_below(directory: Path, listed: Iterable[Mount] | None = None) -> tuple[Mount, ...]:
    """Mounts at or below a directory, the last mounted first: the order to unmount in."""
    listed = mounts() if listed is None else listed
    return tuple(mount for mount in reversed(tuple(listed)) if mount.point.is_relative_to(directory))


def unmount_below(directory: Path) -> None:
    """Unmounts everything at or below a directory; a loop device goes with its mount.

    Raises:
        OpsctlError: ``lab.busy``, naming the processes that hold it.
    """
    for mount in mounts_below(directory):
        deadline = time.monotonic() + UNMOUNT_DEADLINE_S
        while True:
            try:
                run(["umount", mount.point])
                break
            except CommandError as error:
                if mount.point not in {seen.point for seen in mounts()}:
                    break
                if time.monotonic() > deadline:
                    raise OpsctlError("lab.busy", f"{mount.point} is in use by {_holders(mount.point)}.",
                                      hint="leave that directory or end that program, then the same command again",
                                      log_tail=error.log_tail) from None
                time.sleep(POLL_S)


def _holders(directory: Path) -> str:
    """Processes with a working directory or an open file below ``directory``."""
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            links = [entry / "cwd", *(entry / "fd").iterdir()]
            held = any(link.readlink().is_relative_to(directory) for link in links)
        except OSError:
            continue  # it has just gone
        process = identify(int(entry.name)) if held else None
        if process:
            found.append(f"{' '.join(arguments(process)) or '?'} (pid {process.pid})")
    return ", ".join(found) or "a process that does not show itself"
