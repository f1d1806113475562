"""``opsctl model import``: files become a signed release in the bundle, whole or not at all.

Names and headers are looked at first; then every byte is copied and hashed in one pass; manifest and signature come
last, then one rename. Copies, not links: a later edit of the source must not change a release.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opsctl.agent import manifest as manifests
from opsctl.agent.durable import locked, sync_directory, sync_tree
from opsctl.agent.fetch import CHUNK, Advance, sha256_of
from opsctl.agent.progress import Meter
from opsctl.agent.store import same_files
from opsctl.agent.trust import verify
from opsctl.engines.events import Emit, Note, PhaseStarted
from opsctl.errors import ConfigurationError, RefusedError
from opsctl.releases.manifest import Release, ReleaseFile, make_release
from opsctl.releases.signing import sign
from opsctl.releases.sources import SourceFile, gathered
from opsctl.releases.store import find, reporting, service_folder, verify_release
from opsctl.serving import adapter
from opsctl.serving.adapter import Adapter, Value

FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file, copied when either is written
INCOMING = ".incoming-"
DEFAULT_ENGINE = "llamacpp"
MARGIN_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Request:
    """``source`` is a directory, a file or a URL; ``settings`` are ``key=value`` engine arguments."""

    source: str
    service: str
    version: str
    settings: tuple[str, ...]
    bundle: Path
    key: Path
    allowed_signers: Path
    engine: str = DEFAULT_ENGINE


@dataclass(frozen=True)
class Imported:
    """The release and where it lies. ``changed`` is False when the bundle had the very same one."""

    release: Release
    directory: Path
    digest: str
    changed: bool


def import_model(request: Request, emit: Emit) -> Imported:
    """Imports a model as a release.

    Raises:
        UsageError: source, version or settings cannot be read.
        RefusedError: a file may not be in a release; the version name is taken by other content.
    """
    manifests.check_name(request.version)
    engine = adapter(request.engine)
    given = engine.parse_settings(request.settings)
    emit(PhaseStarted(f"Import {request.service} {request.version}"))
    with gathered(request.source, emit) as (source, files):
        engine.check([file.path for file in files], engine.arguments(given))
        folder = service_folder(request.bundle, request.service)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            if find(request.bundle, request.service, request.version) is not None:
                return _again(request, engine, given, source, files, emit)
            for left in folder.glob(f"{INCOMING}*"):  # of an import that was killed; the lock is ours
                shutil.rmtree(left)
            return _new(request, engine, given, source, files, folder, emit)


def _again(request: Request, engine: Adapter, given: dict[str, Value], source: str, files: Sequence[SourceFile],
           emit: Emit) -> Imported:
    """The version is there already: the same content is nothing to do, other content is refused."""
    stored = find(request.bundle, request.service, request.version)
    if stored is None:
        raise AssertionError("looked for under the same lock")
    meter = Meter(sum(file.size for file in files), reporting(emit, "hashing"))
    hashed = [ReleaseFile(file.path, file.size, sha256_of(file.real, meter.advance)) for file in files]
    wanted = make_release(request.service, request.version, engine, given, hashed, source=source, now=time.time())
    if wanted.content() != stored.release.content():
        raise RefusedError("release.version_taken", f"{request.service} {request.version} exists and is another: "
                           f"{_difference(stored.release, wanted)}.",
                           hint="a version name is taken once: import under a new one, such as --version "
                           f"{request.version}.1")
    verify_release(stored.directory, request.allowed_signers)
    return Imported(stored.release, stored.directory, stored.digest, changed=False)


def _difference(old: Release, new: Release) -> str:
    if old.engine != new.engine:
        return f"its engine is {old.engine.directory}, not {new.engine.directory}"
    for key in sorted({*old.arguments, *new.arguments}):
        if old.arguments.get(key) != new.arguments.get(key):
            return f"its {key} is {old.arguments.get(key)}, not {new.arguments.get(key)}"
    before, after = ({file.path: file.sha256 for file in release.files} for release in (old, new))
    path = min(path for path in {*before, *after} if before.get(path) != after.get(path))
    if path not in before:
        return f"it has no {path}"
    return f"it has {path}, which is not here now" if path not in after else f"its {path} has other content"


def _new(request: Request, engine: Adapter, given: dict[str, Value], source: str, files: Sequence[SourceFile],
         folder: Path, emit: Emit) -> Imported:
    size = sum(file.size for file in files)
    _check_space(folder, size)
    staging = Path(tempfile.mkdtemp(prefix=INCOMING, dir=folder))
    try:
        staging.chmod(0o755)
        meter = Meter(size, reporting(emit, "copying and hashing"))
        hashed = [copy_and_hash(file, staging / manifests.FILES / file.path, meter.advance) for file in files]
        shared = _share(hashed, staging, folder)
        if shared:
            emit(Note(f"{shared} of {len(hashed)} files are those of earlier releases and take no room"))
        release = make_release(request.service, request.version, engine, given, hashed, source=source, now=time.time())
        manifest = release.to_bytes()
        manifests.parse(manifest)
        (staging / manifests.MANIFEST).write_bytes(manifest)
        signature = sign(manifest, request.key)
        _check_own_signature(manifest, signature, request)
        (staging / manifests.SIGNATURE).write_bytes(signature)
        digest = manifests.digest(manifest)
        target = folder / manifests.directory_name(request.version, digest)
        sync_tree(staging)
        staging.rename(target)
        sync_directory(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return Imported(release, target, digest, changed=True)


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


def _share(files: Sequence[ReleaseFile], staging: Path, folder: Path) -> int:
    """Replaces copies by hard links to the same files of earlier releases; returns how many."""
    known = same_files(folder)
    shared = 0
    for file in files:
        earlier = known.get((file.sha256, file.size))
        if earlier is None or sha256_of(earlier) != file.sha256:
            continue
        copy = staging / manifests.FILES / file.path
        copy.unlink()
        copy.hardlink_to(earlier)
        shared += 1
    return shared


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size + MARGIN_BYTES > free:
        raise RefusedError("import.disk_full", f"{folder} has {free / 1e6:.0f} MB free, the model needs "
                           f"{size / 1e6:.0f} MB.", hint="free some, or lay the bundle elsewhere: --bundle DIR")


def _check_own_signature(manifest: bytes, signature: bytes, request: Request) -> None:
    """A key that nobody trusts makes releases that no host takes: said now, not at the first host.

    Raises:
        ConfigurationError: keys/release is not in trust/allowed_signers.
    """
    try:
        verify(manifest, signature, request.allowed_signers, "the release")
    except RefusedError:
        raise ConfigurationError(
            "trust.own_key", f"{request.key} signs, but {request.allowed_signers} does not hold its public key.",
            hint="add keys/release.pub to trust/allowed_signers; opsctl provision brings it to the hosts") from None
