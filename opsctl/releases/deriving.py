"""``opsctl model import release:v3``: the files of a release under a new name, with other arguments. No byte moves.

In the bundle the files become hard links. A bundle that has v3 no more takes its manifest from the gateway, and the new
release lives there alone: hosts fetch it from there anyway, and link what they have.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from opsctl.agent import manifest as manifests
from opsctl.agent.durable import locked
from opsctl.agent.trust import Signed, read_signed
from opsctl.engines.events import Emit, Note
from opsctl.errors import RefusedError
from opsctl.releases.manifest import Engine, Release
from opsctl.releases.shelf import Imported, Request, check_one, check_same, make_signed, on_gateway, shelve, sweep
from opsctl.releases.store import find, service_folder
from opsctl.serving import adapter

PREFIX = "release:"


def is_release(source: str) -> bool:
    return source.startswith(PREFIX)


def derive(request: Request, emit: Emit) -> Imported:
    """A new release with the files of another; its engine too unless a lock is brought, its arguments unless set.

    Raises:
        UsageError: a setting cannot be read.
        RefusedError: the other one is neither in the bundle nor on the gateway, or not to be trusted; the version name
            is taken by other content.
    """
    published = on_gateway(request)
    folder = service_folder(request.bundle, request.service)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        sweep(folder)
        base, directory = _base(request)
        wanted = derived(base, request, now=time.time())
        stored = find(request.bundle, request.service, request.version)
        if stored is not None:
            check_same(wanted, stored.release, "")
            check_one(stored.directory, stored.digest, published)
            return Imported(stored.release, stored.directory, stored.digest, changed=False)
        if directory is not None:
            emit(Note(f"{len(wanted.files)} files are those of {base.version} and take no room"))
            return shelve(request, folder, lambda target: _link(wanted, directory, target), published)
    return _by_manifest(request, wanted, published, emit)


def derived(base: Release, request: Request, *, now: float) -> Release:
    """The new release. ``now`` is POSIX time. Pure but for the engine's own check.

    Raises:
        UsageError: the engine has no such argument, or the value is none for it.
        RefusedError: the engine cannot serve these files with these arguments.
    """
    engine = adapter(base.engine.name)
    arguments = engine.arguments({**base.arguments, **engine.parse_settings(request.settings)})
    lock = request.lock(engine)
    pinned = base.engine if lock is None else Engine(lock.engine, lock.version, lock.python, lock.text)
    engine.check([file.path for file in base.files], arguments, pinned.version)
    return replace(base, version=request.version, engine=pinned, arguments=arguments, source=f"{PREFIX}{base.version}",
                   created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)))


def _base(request: Request) -> tuple[Release, Path | None]:
    """The release whose files are taken, and its folder in the bundle; None when only the gateway has it whole."""
    version = manifests.check_name(request.source.removeprefix(PREFIX))
    stored = find(request.bundle, request.service, version)
    if stored is not None and stored.complete():
        return read_signed(stored.directory, request.allowed_signers).release, stored.directory
    signed = request.gateway.find(request.service, version) if request.gateway else None
    if signed is None:
        here = "has only a part of" if stored else "does not have"
        there = "neither does the gateway" if request.gateway else "the gateway was not asked"
        raise RefusedError("import.no_release", f"the bundle {here} release {version} of {request.service}, and "
                           f"{there}.", hint="opsctl model list shows what is where")
    return signed.release, None


def _link(wanted: Release, directory: Path, target: Path) -> Release:
    for file in wanted.files:
        link = target / file.path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(directory / manifests.FILES / file.path)
    return wanted


def _by_manifest(request: Request, wanted: Release, published: Signed | None, emit: Emit) -> Imported:
    """Signed here, given to the gateway by its manifest: it links the files that it has."""
    if request.gateway is None:
        raise AssertionError("the gateway gave the release that this one is made of")
    if published is not None:
        check_same(wanted, published.release, " on the gateway")
        return Imported(published.release, None, published.digest, changed=False)
    signed = make_signed(wanted, request)
    request.gateway.take(signed)
    emit(Note("the bundle has none of its files: the release is on the gateway alone"))
    return Imported(signed.release, None, signed.digest, changed=True)
