"""Brings a release and its engine's environment to this host and verifies both. Serving is untouched."""

from __future__ import annotations

import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from opsctl.agent import environment, trust
from opsctl.agent import manifest as manifests
from opsctl.agent.durable import (
    locked,
    make_directory,
    make_read_only,
    remove_tree,
    sync_directory,
    sync_tree,
    write_atomically,
)
from opsctl.agent.fetch import PARTIAL, fetch, open_directly
from opsctl.agent.manifest import ReleaseFile
from opsctl.agent.pace import Pace
from opsctl.agent.paths import Paths
from opsctl.agent.progress import Meter, Report, silent
from opsctl.agent.store import Stored, same_files, verify_file
from opsctl.agent.trust import Signed
from opsctl.errors import OpsctlError, RefusedError

MARGIN_BYTES = 256 * 1024 * 1024  # left free beside a release and its engine, for logs
LINKING = ".link"
STAGING = ".staging"  # in a service's releases: those on their way
MANIFEST_LIMIT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Plan:
    """What is left to do for a release's files. Bytes to fetch leave out what an earlier try brought."""

    there: tuple[ReleaseFile, ...]
    link: tuple[tuple[ReleaseFile, Path], ...]
    fetch: tuple[ReleaseFile, ...]
    fetch_bytes: int


def job_name(service: str, name: str) -> str:
    """Of the release in folder ``name``. Neither part can hold the underscore, so no two releases share a job."""
    return f"opsctl-stage-{service}_{name}"


def is_staged(paths: Paths, service: str, name: str) -> bool:
    """The release is here, signed and whole, and so is its engine's environment. One that is broken is staged anew."""
    directory = paths.releases(service) / name
    if not directory.is_dir() or fault_of(directory, paths.allowed_signers):
        return False
    return environment.is_complete(paths, trust.read_signed(directory, paths.allowed_signers).release.engine)


def fault_of(directory: Path, allowed_signers: Path) -> str:
    """What is wrong with a release that has its name: its manifest, its signature, a file's length; or empty."""
    try:
        signed = trust.read_signed(directory, allowed_signers)
    except RefusedError as error:
        return error.message.rstrip(".")
    return "" if Stored(directory, signed.release, signed.digest).complete() else "it lost files"


def stage(
    paths: Paths, gateway_url: str, service: str, name: str, *, report: Report = silent,
    doing: Callable[[str], None] = lambda _: None, free_bytes: Callable[[Path], int] | None = None,
    pace: Pace | None = None,
) -> dict[str, Any]:
    """Stages the release in folder ``name`` (``v1-0123456789ab``). Nothing to do is ``changed`` false.

    ``pace``: how fast its files may come, all together; the engine's wheels come as fast as they can.

    Returns ``{"changed", "release", "fetched_bytes", "linked_files", "environment_built"}``.

    Raises:
        RefusedError: signature, digest, disk, or Python says no.
        OpsctlError: the gateway cannot be reached, or the environment cannot be built.
    """
    releases = paths.releases(service)
    make_directory(releases)
    with locked(releases / f".{name}.lock"):
        target = releases / name
        if broken(paths, service, target):
            remove_tree(target)
        plan = Plan((), (), (), 0)
        base, wheels = _urls(gateway_url, service, name)
        if target.is_dir():
            signed = trust.read_signed(target, paths.allowed_signers)
            room = _room(paths, releases, signed, wheels, free_bytes or free_bytes_of)
            room.check(plan, name)
        else:
            doing("fetch")
            staging = releases / STAGING / name
            signed = _signed_manifest(base, service, name, paths.allowed_signers)
            room = _room(paths, releases, signed, wheels, free_bytes or free_bytes_of)
            _keep_manifest(staging, signed)
            plan = plan_files(signed, staging / manifests.FILES, same_files(releases))
            room.check(plan, name)
            meter = Meter(signed.release.size, report)
            meter.advance(sum(entry.size for entry in plan.there))
            plan = link_what_holds(plan, staging / manifests.FILES, meter)
            room.check(plan, name)
            _fetch(plan, base, staging / manifests.FILES, meter, pace or Pace())
            sweep(staging, signed)
        doing("environment")
        built = environment.build(paths, signed.release.engine, wheels)
        brought = not target.is_dir()
        if brought:
            doing("rename")
            sync_tree(staging)
            make_read_only(staging)
            staging.chmod(0o755)  # a folder is renamed only by who may write it
            staging.rename(target)
            target.chmod(0o555)
            sync_directory(releases)
            sync_directory(staging.parent)
    return {"changed": brought or built, "release": name, "fetched_bytes": plan.fetch_bytes,
            "linked_files": len(plan.link), "environment_built": built}


def plan_stage(paths: Paths, gateway_url: str, service: str, name: str, *,
               free_bytes: Callable[[Path], int] | None = None) -> dict[str, Any]:
    """What ``stage`` would do; writes nothing, and asks the gateway only for what is not staged.

    Returns ``{"staged", "fetch_bytes", "link_files", "engine_built", "engine_bytes", "free_bytes", "free_after_bytes",
    "fits"}``: bytes on the disk of /srv/opsctl; those of the engine are an estimate. Copies of other releases are
    believed; ``stage`` reads them, and fetches those that rotted.

    Raises:
        RefusedError, OpsctlError: as ``stage`` would, but for a disk that is too small.
    """
    releases = paths.releases(service)
    free = free_bytes or free_bytes_of
    target = releases / name
    base, wheels = _urls(gateway_url, service, name)
    plan = Plan((), (), (), 0)
    again = broken(paths, service, target)
    if target.is_dir() and not again:
        signed = trust.read_signed(target, paths.allowed_signers)
    else:
        signed = _signed_manifest(base, service, name, paths.allowed_signers)
        known = {key: path for key, path in same_files(releases).items() if target not in path.parents}
        plan = plan_files(signed, releases / STAGING / name / manifests.FILES, known)
    room = _room(paths, releases, signed, wheels, free)
    built = environment.is_complete(paths, signed.release.engine)
    return {"staged": target.is_dir() and not again and built, "fetch_bytes": plan.fetch_bytes,
            "link_files": len(plan.link), "engine_built": built, "engine_bytes": room.engine_bytes,
            "free_bytes": room.free(), "free_after_bytes": room.after(plan), "fits": room.fits(plan)}


@dataclass(frozen=True)
class Room:
    """The space for a release and its engine, which may lie on two file systems. What serves now stays where it is."""

    releases: Path
    engines: Path
    engine_bytes: int
    together: bool
    free_bytes: Callable[[Path], int]

    def free(self) -> int:
        return self.free_bytes(self.releases)

    def after(self, plan: Plan) -> int:
        """Bytes that stay free beside the release."""
        return self.free() - plan.fetch_bytes - (self.engine_bytes if self.together else 0)

    def fits(self, plan: Plan) -> bool:
        try:
            self.check(plan, "")
        except RefusedError:
            return False
        return True

    def check(self, plan: Plan, name: str) -> None:
        """Raises RefusedError when files or engine would not fit."""
        check_space(plan, self.free(), name, self.engine_bytes if self.together else 0)
        if not self.together:
            check_space(Plan((), (), (), 0), self.free_bytes(self.engines), f"the engine of {name}", self.engine_bytes,
                        at="/opt")


def _room(paths: Paths, releases: Path, signed: Signed, wheels: str, free_bytes: Callable[[Path], int]) -> Room:
    engine = signed.release.engine
    environment.check_python(engine)
    there, engines = existing(releases), existing(paths.engines)
    return Room(there, engines, environment.needed_bytes(paths, engine, wheels),
                there.stat().st_dev == engines.stat().st_dev, free_bytes)


def existing(directory: Path) -> Path:
    """``directory``, or the nearest above it that is there."""
    while not directory.exists():
        directory = directory.parent
    return directory


def _urls(gateway_url: str, service: str, name: str) -> tuple[str, str]:
    """Of the release, and of the engines' wheels."""
    return f"{gateway_url}/releases/{quote(service)}/{quote(name)}", f"{gateway_url}/wheels/"


def plan_files(signed: Signed, staging: Path, known: dict[tuple[str, int], Path]) -> Plan:
    """``staging`` holds an earlier try's files: a whole one under its name (verified then), the rest as ``.part``."""
    there: list[ReleaseFile] = []
    link: list[tuple[ReleaseFile, Path]] = []
    missing: list[ReleaseFile] = []
    size = 0
    for entry in signed.release.files:
        path = staging / entry.path
        if path.is_file():
            there.append(entry)
        elif (entry.sha256, entry.size) in known:
            link.append((entry, known[entry.sha256, entry.size]))
        else:
            size += max(0, entry.size - size_of(path.with_name(path.name + PARTIAL)))
            missing.append(entry)
    return Plan(tuple(there), tuple(link), tuple(missing), size)


def check_space(plan: Plan, free: int, name: str, engine_bytes: int = 0, at: str = "/srv") -> None:
    """Raises RefusedError when the files, and the engine's environment, would not fit; before the first byte comes."""
    needed = plan.fetch_bytes + engine_bytes
    needed += MARGIN_BYTES if needed else 0
    if needed > free:
        engine = f" and its engine (about {mb(engine_bytes)})" if engine_bytes and plan.fetch_bytes else ""
        raise RefusedError("host.disk_full", f"{name}{engine} does not fit: it needs {mb(needed)} with a margin, "
                           f"{mb(free)} are free.",
                           hint=f"df -h {at} on that host; opsctl gc removes releases that nobody serves")


def link_what_holds(plan: Plan, files: Path, meter: Meter) -> Plan:
    """Makes the plan's links; returns the plan in which copies that rotted are to be fetched instead."""
    linked: list[tuple[ReleaseFile, Path]] = []
    rotten: list[ReleaseFile] = []
    for entry, source in plan.link:
        before = meter.done
        try:
            link_verified(source, files / entry.path, entry, meter)
            linked.append((entry, source))
        except (RefusedError, OSError) as error:  # other bytes, an unreadable block, no more links
            sys.stderr.write(f"{source} cannot be taken over, {entry.path} is brought again: {error}\n")
            meter.advance(before - meter.done)
            (files / entry.path).with_name(Path(entry.path).name + LINKING).unlink(missing_ok=True)
            rotten.append(entry)
    return Plan(plan.there, tuple(linked), (*plan.fetch, *rotten), plan.fetch_bytes + sum(e.size for e in rotten))


def _fetch(plan: Plan, base: str, files: Path, meter: Meter, pace: Pace) -> None:
    for entry in plan.fetch:
        path = files / entry.path
        make_directory(path.parent)
        fetch(f"{base}/{manifests.FILES}/{quote(entry.path)}", path, size=entry.size, sha256=entry.sha256,
              advance=meter.advance, open_url=open_directly, pace=pace)
        path.chmod(0o444)


def link_verified(source: Path, path: Path, entry: ReleaseFile, meter: Meter) -> None:
    """Hard-links ``source`` as ``path`` after its bytes were compared with what was signed.

    Not by way of ``.part``: a fetch appends to that, and would append to the other release's file.
    """
    make_directory(path.parent)
    temporary = path.with_name(path.name + LINKING)
    temporary.unlink(missing_ok=True)
    os.link(source, temporary)
    verify_file(temporary, entry, f"the copy in {source}", meter)
    temporary.replace(path)


def sweep(directory: Path, signed: Signed) -> None:
    """Removes what earlier tries left in a release on its way and nobody signed."""
    wanted = {directory / manifests.MANIFEST, directory / manifests.SIGNATURE,
              *(directory / manifests.FILES / entry.path for entry in signed.release.files)}
    for folder, _, names in os.walk(directory):
        for name in names:
            if Path(folder, name) not in wanted:
                Path(folder, name).unlink()


def _signed_manifest(base: str, service: str, name: str, allowed_signers: Path) -> Signed:
    what = f"release {service}/{name} on the gateway"
    manifest = _small(f"{base}/{manifests.MANIFEST}", what)
    signed = trust.verify(manifest, _small(f"{base}/{manifests.SIGNATURE}", what), allowed_signers, what)
    if signed.directory_name != name or signed.release.service != service:
        raise RefusedError("release.tampered", f"{what} holds the manifest of {signed.release.service}/"
                           f"{signed.directory_name}.", hint="publish it again: opsctl provision")
    return signed


def _keep_manifest(staging: Path, signed: Signed) -> None:
    make_directory(staging / manifests.FILES)
    write_atomically(staging / manifests.MANIFEST, signed.manifest)
    write_atomically(staging / manifests.SIGNATURE, signed.signature)


def _small(url: str, what: str) -> bytes:
    try:
        with open_directly(urllib.request.Request(url)) as response:  # noqa: S310 - the gateway's address
            content: bytes = response.read(MANIFEST_LIMIT_BYTES)
            return content
    except urllib.error.HTTPError as error:
        if error.code == 404 and url.endswith(manifests.SIGNATURE):
            return b""
        if error.code == 404:
            raise RefusedError("release.not_on_gateway", f"{what} is not there.",
                               hint="opsctl provision publishes it from the bundle") from None
        raise OpsctlError("fetch.failed", f"{url}: {error}.", hint="is nginx well on the gateway?") from None
    except OSError as error:
        raise OpsctlError("fetch.failed", f"{url} could not be fetched: {getattr(error, 'reason', error)}.",
                          hint="is the gateway up, and its port open from this host?") from None


def broken(paths: Paths, service: str, target: Path) -> bool:
    """Whether a release lost files or its manifest is damaged: then it is thrown away and brought anew.

    Raises:
        RefusedError: an instance serves it.
    """
    fault = fault_of(target, paths.allowed_signers) if target.is_dir() else ""
    if not fault:
        return False
    for current in sorted(paths.services.joinpath(service).glob("current.*")):
        if current.resolve() == target.resolve():
            raise RefusedError("release.broken", f"{target} is broken ({fault}), and {current.name} points at it.",
                               hint="move the instance to another release first; then the same again brings it anew")
    return True


def free_bytes_of(directory: Path) -> int:
    return shutil.disk_usage(directory).free


def size_of(path: Path) -> int:
    """Bytes of a file; 0 when it is not there, or just went."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def mb(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
