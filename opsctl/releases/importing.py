"""``opsctl model import``: files become a signed release in the bundle, whole or not at all.

Names and headers are looked at first; then every byte is copied and hashed in one pass; manifest and signature come
last, then one rename (``shelf.py``). Copies, not links: a later edit of the source must not change a release. A release
as source is another matter: ``deriving.py``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from opsctl.agent import manifest as manifests
from opsctl.agent.durable import locked
from opsctl.agent.fetch import CHUNK, Advance, sha256_of
from opsctl.agent.progress import Meter
from opsctl.agent.store import same_files
from opsctl.agent.trust import Signed
from opsctl.engines.events import Emit, Note, PhaseStarted
from opsctl.errors import RefusedError
from opsctl.releases import deriving
from opsctl.releases.manifest import Release, ReleaseFile, make_release
from opsctl.releases.shelf import Imported, Request, check_likely, check_one, check_same, on_gateway, shelve, sweep
from opsctl.releases.sources import SourceFile, gathered
from opsctl.releases.store import Stored, find, reporting, service_folder, verify_release
from opsctl.serving import adapter
from opsctl.serving.adapter import Adapter, Lock, Value

__all__ = ["Imported", "Request", "import_model"]

FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file, copied when either is written
MARGIN_BYTES = 64 * 1024 * 1024


def import_model(request: Request, emit: Emit) -> Imported:
    """Imports a model as a release.

    Raises:
        UsageError: source, version, settings or lock cannot be read; the engine needs a lock.
        RefusedError: a file may not be in a release; the version name is taken by other content.
    """
    manifests.check_name(request.version)
    emit(PhaseStarted(f"Import {request.service} {request.version}"))
    if deriving.is_release(request.source):
        return deriving.derive(request, emit)
    engine = adapter(request.engine)
    given = engine.parse_settings(request.settings)
    lock = request.lock(engine) or engine.lock()
    with gathered(request.source, emit) as (source, files):
        engine.check([file.path for file in files], engine.arguments(given), lock.version)
        published = on_gateway(request)
        folder = service_folder(request.bundle, request.service)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            stored = find(request.bundle, request.service, request.version)
            if stored is not None:
                return _again(request, stored, engine, lock, given, source, files, published, emit)
            sweep(folder)
            return _new(request, engine, lock, given, source, files, folder, published, emit)


def _again(request: Request, stored: Stored, engine: Adapter, lock: Lock, given: dict[str, Value], source: str,
           files: Sequence[SourceFile], published: Signed | None, emit: Emit) -> Imported:
    """The version is there already: the same content is nothing to do, other content is refused."""
    meter = Meter(sum(file.size for file in files), reporting(emit, "hashing"))
    hashed = [ReleaseFile(file.path, file.size, sha256_of(file.real, meter.advance)) for file in files]
    wanted = make_release(request.service, request.version, engine, given, hashed, lock=lock, source=source,
                          now=time.time())
    check_same(wanted, stored.release, "")
    check_one(stored.directory, stored.digest, published)
    verify_release(stored.directory, request.allowed_signers)
    return Imported(stored.release, stored.directory, stored.digest, changed=False)


def _new(request: Request, engine: Adapter, lock: Lock, given: dict[str, Value], source: str,
         files: Sequence[SourceFile], folder: Path, published: Signed | None, emit: Emit) -> Imported:
    check_likely([(file.path, file.size) for file in files], published)
    size = sum(file.size for file in files)
    _check_space(folder, size)

    def fill(target: Path) -> Release:
        meter = Meter(size, reporting(emit, "copying and hashing"))
        hashed = [copy_and_hash(file, target / file.path, meter.advance) for file in files]
        shared = _share(hashed, target, folder)
        if shared:
            emit(Note(f"{shared} of {len(hashed)} files are those of earlier releases and take no room"))
        return make_release(request.service, request.version, engine, given, hashed, lock=lock, source=source,
                            now=time.time())

    return shelve(request, folder, fill, published)


def copy_and_hash(file: SourceFile, target: Path, advance: Advance) -> ReleaseFile:
    """Copies a file, by sharing its blocks where the filesystem can, and hashes what arrived.

    Raises:
        RefusedError: the file changed while it was read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with file.real.open("rb") as source, target.open("xb+") as copy:
        cloned = _cloned(source.fileno(), copy.fileno())
        while chunk := (copy if cloned else source).read(CHUNK):  # what is hashed is what we have
            digest.update(chunk)
            if not cloned:
                copy.write(chunk)
            advance(len(chunk))
        copy.flush()
        size = os.fstat(copy.fileno()).st_size
        os.fchmod(copy.fileno(), 0o444)
    if size != file.size:
        raise RefusedError("import.changing", f"{file.real} changed while it was read: {file.size} bytes, then {size}.",
                           hint="wait until whatever writes it has finished")
    return ReleaseFile(file.path, size, digest.hexdigest())


def _cloned(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:  # another filesystem, or one that cannot
        return False
    return True


def _share(files: Sequence[ReleaseFile], target: Path, folder: Path) -> int:
    """Replaces copies by hard links to the same files of earlier releases; returns how many."""
    known = same_files(folder)
    shared = 0
    for file in files:
        earlier = known.get((file.sha256, file.size))
        if earlier is None or sha256_of(earlier) != file.sha256:
            continue
        copy = target / file.path
        copy.unlink()
        copy.hardlink_to(earlier)
        shared += 1
    return shared


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size + MARGIN_BYTES > free:
        raise RefusedError("import.disk_full", f"{folder} has {free / 1e6:.0f} MB free, the model needs "
                           f"{size / 1e6:.0f} MB.", hint="free some, or lay the bundle elsewhere: --bundle DIR")
