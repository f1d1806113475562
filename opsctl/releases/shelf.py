"""What every import ends with: a signed manifest over files that lie in the bundle, whole or not at all.

A version name is taken once for the whole fleet: what the gateway has under a name counts as what the bundle has.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opsctl.agent import manifest as manifests
from opsctl.agent.durable import sync_directory, sync_tree
from opsctl.agent.trust import Signed, verify
from opsctl.errors import ConfigurationError, RefusedError, UsageError
from opsctl.releases.manifest import Release
from opsctl.releases.publish import Published
from opsctl.releases.signing import sign
from opsctl.serving.adapter import Adapter, Lock
from opsctl.serving.locks import DEFAULT_PYTHON, engine_lock

INCOMING = ".incoming-"
DEFAULT_ENGINE = "llamacpp"


@dataclass(frozen=True)
class Request:
    """``source`` is a directory, a file, a URL or ``release:VERSION``; ``settings`` are ``key=value`` arguments.

    ``gateway`` is None when it does not answer: then only the bundle knows which names are taken. ``engine_lock`` is
    a hashed lock for ``python``, None for the one that opsctl ships (or that the release has which is the source).
    """

    source: str
    service: str
    version: str
    settings: tuple[str, ...]
    bundle: Path
    key: Path
    allowed_signers: Path
    engine: str = DEFAULT_ENGINE
    gateway: Published | None = None
    engine_lock: Path | None = None
    python: str = DEFAULT_PYTHON

    def lock(self, engine: Adapter) -> Lock | None:
        """The lock that was brought, checked; None when none was.

        Raises:
            UsageError: it cannot be read.
            ConfigurationError, RefusedError: it is not hashed, or pins no engine that this version knows.
        """
        if self.engine_lock is None:
            return None
        try:
            text = self.engine_lock.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("engine.lock_unreadable", f"{self.engine_lock} cannot be read: {error}.",
                             hint="--engine-lock is a file of requirements with hashes") from None
        return engine_lock(text, engine, self.python, str(self.engine_lock))


@dataclass(frozen=True)
class Imported:
    """The release and where it lies: in the bundle, or on the gateway alone (``directory`` None).

    ``changed`` is False when the very same one was there.
    """

    release: Release
    directory: Path | None
    digest: str
    changed: bool


def on_gateway(request: Request) -> Signed | None:
    """The gateway's release of the version that is asked for."""
    return request.gateway.find(request.service, request.version) if request.gateway else None


def check_same(wanted: Release, there: Release, where: str) -> None:
    """Refuses another content under a name that is taken.

    Raises:
        RefusedError: ``release.version_taken``, with the first difference.
    """
    if wanted.content() != there.content():
        raise RefusedError("release.version_taken", f"{wanted.service} {wanted.version} exists{where} and is another: "
                           f"{_difference(there, wanted)}.",
                           hint="a version name is taken once: import under a new one, such as --version "
                           f"{wanted.version}.1")


def check_one(directory: Path, digest: str, published: Signed | None) -> None:
    """Refuses a bundle's release that was made apart from the one that the gateway has under this name.

    Raises:
        RefusedError: ``release.version_taken``.
    """
    if published is not None and published.digest != digest:
        raise RefusedError("release.version_taken", f"{published.release.service} {published.release.version} is on "
                           f"the gateway already, and it is another than {directory}.",
                           hint=f"rm -r {directory}, then import again: it becomes the gateway's, or gets a new name")


def shelve(request: Request, folder: Path, fill: Callable[[Path], Release], published: Signed | None) -> Imported:
    """Makes a release folder in the bundle. ``fill`` puts its files into a folder and says what the release is.

    With ``published`` its manifest and signature are taken, so that the fleet has one release of this name.

    Raises:
        RefusedError: other content under a taken name; what ``fill`` refuses. Nothing is left.
    """
    staging = Path(tempfile.mkdtemp(prefix=INCOMING, dir=folder))
    try:
        staging.chmod(0o755)
        release = fill(staging / manifests.FILES)
        if published is not None:
            check_same(release, published.release, " on the gateway")
        signed = published or make_signed(release, request)
        (staging / manifests.MANIFEST).write_bytes(signed.manifest)
        (staging / manifests.SIGNATURE).write_bytes(signed.signature)
        target = folder / signed.directory_name
        sync_tree(staging)
        staging.rename(target)
        sync_directory(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return Imported(signed.release, target, signed.digest, changed=True)


def sweep(folder: Path) -> None:
    """Takes away what imports that were killed left; only under the folder's lock."""
    for left in folder.glob(f"{INCOMING}*"):
        shutil.rmtree(left)


def make_signed(release: Release, request: Request) -> Signed:
    """Signs a release with the fleet's key.

    Raises:
        ConfigurationError: keys/release is not in trust/allowed_signers: no host would take it, so it is said now.
    """
    manifest = release.to_bytes()
    manifests.parse(manifest)
    signature = sign(manifest, request.key)
    try:
        return verify(manifest, signature, request.allowed_signers, "the release")
    except RefusedError:
        raise ConfigurationError(
            "trust.own_key", f"{request.key} signs, but {request.allowed_signers} does not hold its public key.",
            hint="add keys/release.pub to trust/allowed_signers; opsctl provision brings it to the hosts") from None


def check_likely(wanted: Sequence[tuple[str, int]], published: Signed | None) -> None:
    """Refuses before anything is copied what cannot be the gateway's: other names or sizes of files.

    Raises:
        RefusedError: ``release.version_taken``.
    """
    if published is None:
        return
    there = published.release
    other = set(wanted) ^ {(file.path, file.size) for file in there.files}
    if other:
        path = min(other)[0]
        raise RefusedError("release.version_taken", f"{there.service} {there.version} exists on the gateway and is "
                           f"another: its {path} is not this one.",
                           hint=f"a version name is taken once: --version {there.version}.1")


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
