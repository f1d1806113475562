"""Removes what a service no longer needs on this host: releases, half-staged ones, engine environments.

``decide`` is pure. Whatever runs meanwhile is safe by the locks of those who work: a cutover holds its instance's, a
stage its release's, a build its environment's. Who holds one keeps what it works on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsctl.agent import manifest as manifests
from opsctl.agent import unfinished
from opsctl.agent.durable import locked, remove_tree, sync_directory
from opsctl.agent.manifest import FOLDER
from opsctl.agent.paths import Paths
from opsctl.agent.settings import read_placements
from opsctl.agent.stage import STAGING
from opsctl.errors import LockedError, OpsctlError

GOING = ".removing-"  # before the name of a folder that is being removed: a gc that was cut off is ended by the next
UNKNOWN = "?"  # the engine of a release whose manifest cannot be read


@dataclass(frozen=True)
class Found:
    """What is on the disk. Releases and stagings of the service with the folder of the engine that each needs."""

    releases: Mapping[str, str]
    staging: Mapping[str, str]
    engines: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()  # engines that other services' releases need


@dataclass(frozen=True)
class Decision:
    """What goes, in the order of names."""

    releases: tuple[str, ...]
    staging: tuple[str, ...]
    engines: tuple[str, ...]


def decide(found: Found, serving: frozenset[str], keep: frozenset[str], working: frozenset[str]) -> Decision:
    """``serving``: what any ``current.*`` points at; ``working``: releases that a stage is busy with."""
    stays = serving | keep | working
    releases = tuple(sorted(name for name in found.releases if name not in stays))
    staging = tuple(sorted(name for name in found.staging if name not in keep | working))
    needed = found.elsewhere | {engine for name, engine in found.releases.items() if name not in releases} \
        | {engine for name, engine in found.staging.items() if name not in staging}
    # A release that stays and cannot be read may need any of them.
    engines = () if UNKNOWN in needed else tuple(sorted(found.engines - needed))
    return Decision(releases, staging, engines)


def collect(paths: Paths, service: str, keep: Sequence[str], *, dry_run: bool = False) -> dict[str, Any]:
    """``{"changed", "removed": [{"release", "bytes"}], "engines", "bytes"}``; ``dry_run`` only tells what would go.

    Bytes are those that get free: a file that another release links too stays and does not count.

    Raises:
        LockedError: ``gc.cutover``: an instance is being cut over, and may go back to what it served before.
    """
    with _no_cutover(paths, service, looking=dry_run), ExitStack() as stack:
        found = look(paths, service)
        working = {name for name in (*found.releases, *found.staging)
                   if not _mine(stack, _stage_lock(paths, service, name), looking=dry_run)}
        decision = decide(found, serving(paths, service), frozenset(keep), frozenset(working))
        engines = [name for name in decision.engines
                   if _mine(stack, paths.engines / f".{name}.lock", looking=dry_run)]
        releases = paths.releases(service)
        going = [*((name, releases / name) for name in decision.releases),
                 *((name, releases / STAGING / name) for name in decision.staging),
                 *((path.name.removeprefix(GOING), path) for path in _half_gone(releases, releases / STAGING)),
                 *(("", path) for path in (*(paths.engines / name for name in engines), *_half_gone(paths.engines)))]
        freed = freed_bytes([links(path) for _, path in going])
        if not dry_run:
            for _, path in going:
                _remove(path)
    by_release: dict[str, int] = {}
    for (name, _), count in zip(going, freed, strict=True):
        by_release[name] = by_release.get(name, 0) + count
    by_release.pop("", None)
    return {"changed": bool(going) and not dry_run, "engines": engines, "bytes": sum(freed),
            "removed": [{"release": name, "bytes": count} for name, count in sorted(by_release.items())]}


def look(paths: Paths, service: str) -> Found:
    """Raises nothing for a manifest that cannot be read: its engine is ``UNKNOWN``."""
    def engines(folder: Path) -> dict[str, str]:
        names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        return {name: _engine(folder / name) for name in names if FOLDER.fullmatch(name)}

    releases = paths.releases(service)
    built = [path.name for path in paths.engines.iterdir()
             if path.is_dir() and not path.name.startswith(".")] if paths.engines.is_dir() else []
    elsewhere = {engine for other in paths.services.glob("*/releases") if other != releases
                 for folder in (other, other / STAGING) for engine in engines(folder).values()}
    return Found(engines(releases), engines(releases / STAGING), frozenset(built), frozenset(elsewhere))


def serving(paths: Paths, service: str) -> frozenset[str]:
    """The folder names that any ``current.*`` of the service points at, also those of instances that left."""
    return frozenset(link.readlink().name for link in (paths.services / service).glob("current.*") if link.is_symlink())


def links(directory: Path) -> list[tuple[tuple[int, int], int, int]]:
    """Of every file below: (device, inode), how many names it has anywhere, bytes."""
    found = []
    for folder, _, names in os.walk(directory):
        for name in names:
            status = Path(folder, name).lstat()
            found.append(((status.st_dev, status.st_ino), status.st_nlink, status.st_size))
    return found


def freed_bytes(trees: Sequence[Sequence[tuple[tuple[int, int], int, int]]]) -> list[int]:
    """What removing each of ``trees`` frees, one after the other: a file's bytes with the last of its names. Pure."""
    gone: dict[tuple[int, int], int] = {}
    freed = []
    for tree in trees:
        count = 0
        for inode, names, size in tree:
            gone[inode] = gone.get(inode, 0) + 1
            count += size if gone[inode] == names else 0
        freed.append(count)
    return freed


@contextmanager
def _no_cutover(paths: Paths, service: str, *, looking: bool) -> Iterator[None]:
    """Keeps cutovers of the service's instances waiting. ``looking``: writes no lock, and only looks for records."""
    placed = {placement.instance for placement in read_placements(paths) if placement.service == service}
    served = {f"{service}.{link.name.partition('.')[2]}" for link in (paths.services / service).glob("current.*")}
    with ExitStack() as stack:
        for instance in sorted(placed | served):
            mine = looking or stack.enter_context(unfinished.held(paths, instance, wait=False))
            if not mine or paths.undo(instance).exists():
                raise LockedError("gc.cutover", f"{instance} is being cut over: it may go back to what it served.",
                                  hint=f"opsctl-host cutover-status {instance}; when that has ended, the same again")
        yield


def _mine(stack: ExitStack, lock: Path, *, looking: bool) -> bool:
    """Takes a lock until the end of ``stack``; False when another has it. ``looking`` makes no file for that."""
    if looking and not lock.exists():
        return True
    return stack.enter_context(locked(lock, wait=False))


def _stage_lock(paths: Paths, service: str, name: str) -> Path:
    return paths.releases(service) / f".{name}.lock"


def _engine(release: Path) -> str:
    try:
        return manifests.parse((release / manifests.MANIFEST).read_bytes()).engine.directory
    except (OSError, OpsctlError):
        return UNKNOWN


def _half_gone(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.glob(f"{GOING}*"))]


def _remove(directory: Path) -> None:
    """In two steps: half of a release must never stand under its name."""
    going = directory
    if not directory.name.startswith(GOING):
        going = directory.with_name(f"{GOING}{directory.name}")
        remove_tree(going)
        directory.rename(going)
        sync_directory(directory.parent)
    remove_tree(going)
    sync_directory(directory.parent)
