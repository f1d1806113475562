"""Files that must survive a power cut: written beside their place, fsynced, renamed, their folder fsynced."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READABLE = 0o644  # nginx, the engine's user and the agent's read what root writes


def sync_directory(directory: Path) -> None:
    """Makes renames and new names in ``directory`` last."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """fsyncs every file and folder below ``directory``."""
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                sync_file(path)
        sync_directory(Path(folder))


def make_directory(directory: Path) -> None:
    """``mkdir -p``, readable by all whatever the umask, every new level fsynced into its parent."""
    missing = []
    while not directory.is_dir():
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        try:
            path.mkdir()
        except FileExistsError:
            continue
        path.chmod(0o755)
        sync_directory(path.parent)


def write_atomically(path: Path, content: bytes | str, mode: int = READABLE) -> None:
    """Replaces ``path``: a reader sees the old content or the new, also after a power cut. Text becomes UTF-8."""
    make_directory(path.parent)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def point_symlink(link: Path, target: str) -> None:
    """Points ``link`` at ``target`` in one step, and makes it last."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
    sync_directory(link.parent)


def remove_durably(path: Path) -> None:
    """Unlinks ``path`` if it is there, and makes that last."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        sync_directory(path.parent)


def make_read_only(directory: Path) -> None:
    """Takes write permission from everything below ``directory`` and keeps it readable by all."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod((path.stat().st_mode | 0o444) & ~0o222)
        Path(folder).chmod(0o555)


def remove_tree(directory: Path) -> None:
    """``rm -rf`` that also takes what ``make_read_only`` closed."""
    if not directory.exists():
        return
    for folder, _, _ in os.walk(directory):
        Path(folder).chmod(0o755)
    shutil.rmtree(directory)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds an exclusive flock on ``path``, made when missing. Yields False: ``wait`` is off and another has it."""
    make_directory(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
