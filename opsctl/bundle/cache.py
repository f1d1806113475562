"""Where downloads are kept between builds, and the lock that keeps two builds apart."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opsctl.engines.events import Emit, Note
from opsctl.errors import RefusedError


def cache_directory(*parts: str) -> Path:
    """``${XDG_CACHE_HOME:-~/.cache}/opsctl/...``, made if it is not there. Always safe to delete.

    Raises:
        RefusedError: this user may not write there, as happens after a run under sudo.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if root.startswith("/") else Path.home() / ".cache"  # a relative one is to be ignored (XDG)
    directory = base.joinpath("opsctl", *parts)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
    except PermissionError:
        writable = False
    if not writable:
        raise RefusedError("bundle.cache_not_writable", f"this user may not write to {directory}.",
                           hint=f"chown -R it, delete {base / 'opsctl'}, or set XDG_CACHE_HOME")
    return directory


@contextmanager
def one_build_at_a_time(emit: Emit) -> Iterator[None]:
    """Waits for another bundle build of this user; the lock goes with the process, however it ends."""
    with (cache_directory() / "bundle.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            emit(Note("another bundle build is running on this machine; waiting for it"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system can, else a copy."""
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
