"""Releases on a disk: which are there, which files they hold, whether every byte is as signed.

The same layout in three places: a host's ``/srv/opsctl/<service>/releases``, the gateway's
``/srv/opsctl-gateway/releases/<service>`` and the bundle's ``releases/<service>``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opsctl.agent import manifest as manifests
from opsctl.agent.fetch import sha256_of
from opsctl.agent.manifest import Release, ReleaseFile
from opsctl.agent.progress import Meter, Report, silent
from opsctl.errors import OpsctlError, RefusedError

IMPORT_AGAIN = "import, publish or stage the release again"


@dataclass(frozen=True)
class Stored:
    """A release folder. ``digest`` is of its manifest, 64 hex digits; nothing is verified."""

    directory: Path
    release: Release
    digest: str

    @property
    def name(self) -> str:
        return self.directory.name

    def file(self, entry: ReleaseFile) -> Path:
        return self.directory / manifests.FILES / entry.path

    def complete(self) -> bool:
        """All files are there in full length. A folder gets its name only when it is whole; this notices losses."""
        return all(_size(self.file(entry)) == entry.size for entry in self.release.files)

    def as_document(self) -> dict[str, object]:
        return {"service": self.release.service, "version": self.release.version, "digest": self.digest,
                "bytes": self.release.size, "complete": self.complete(), "created": self.release.created,
                "engine": self.release.engine.directory}


def stored_releases(releases: Path) -> list[Stored]:
    """The releases below one service's folder, oldest first; folders that are no release are left out."""
    found = []
    for directory in sorted(releases.iterdir()) if releases.is_dir() else []:
        if directory.name.startswith(".") or not directory.is_dir():
            continue
        try:
            manifest = (directory / manifests.MANIFEST).read_bytes()
            found.append(Stored(directory, manifests.parse(manifest), manifests.digest(manifest)))
        except (OSError, OpsctlError):
            continue
    return sorted(found, key=lambda stored: (stored.release.created, stored.name))


def same_files(releases: Path) -> dict[tuple[str, int], Path]:
    """Files that releases of a service already have, by sha256 and size: what a new one may hard-link."""
    return {(entry.sha256, entry.size): stored.file(entry) for stored in stored_releases(releases)
            for entry in stored.release.files if _size(stored.file(entry)) == entry.size}


def verify_files(directory: Path, release: Release, report: Report = silent) -> None:
    """Every file is there with its signed size and sha256, and nothing else is.

    Raises:
        RefusedError: a file is missing, changed, or was added.
    """
    what = f"release {release.service}/{directory.name}"
    signed = {entry.path for entry in release.files}
    for path in _files(directory / manifests.FILES):
        if path not in signed:
            raise RefusedError("release.extra_file", f"{what} has a file that was not signed: {path}.",
                               hint=f"remove {directory / manifests.FILES / path}, or import it as a new version")
    known = {manifests.MANIFEST, manifests.SIGNATURE, manifests.FILES}
    for entry in sorted(directory.iterdir()):
        if entry.name not in known:
            raise RefusedError("release.extra_file", f"{what} has a file that was not signed: {entry.name}.",
                               hint=f"remove {entry}")
    meter = Meter(release.size, report)
    for file in release.files:
        verify_file(directory / manifests.FILES / file.path, file, what, meter)


def verify_file(path: Path, entry: ReleaseFile, what: str, meter: Meter) -> None:
    """Raises RefusedError when ``path`` is not what was signed."""
    size = _size(path)
    if size is None:
        raise RefusedError("release.missing_file", f"{what}: {entry.path} is missing.", hint=IMPORT_AGAIN)
    if size != entry.size:
        raise RefusedError("release.tampered", f"{what}: {entry.path} has {size} bytes, signed were {entry.size}.",
                           hint=IMPORT_AGAIN)
    if sha256_of(path, meter.advance) != entry.sha256:
        raise RefusedError("release.tampered", f"{what}: {entry.path} is not what was signed (sha256 differs).",
                           hint=IMPORT_AGAIN)


def _size(path: Path) -> int | None:
    """Bytes of a plain file; None for anything else, links included."""
    if path.is_symlink() or not path.is_file():
        return None
    return path.stat().st_size


def _files(top: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(top):
        folders.sort()
        for name in sorted(names):
            yield Path(folder, name).relative_to(top).as_posix()
        for name in folders:
            if Path(folder, name).is_symlink():
                yield Path(folder, name).relative_to(top).as_posix()
