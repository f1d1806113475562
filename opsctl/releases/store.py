"""The bundle's releases: ``<bundle>/releases/<service>/<version>-<digest12>/``, signed and whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from opsctl.agent.manifest import split_directory_name
from opsctl.agent.progress import Report, silent
from opsctl.agent.store import Stored, stored_releases, verify_files
from opsctl.agent.trust import Signed, read_signed
from opsctl.engines.events import Emit, Progress

__all__ = ["Signed", "Stored", "find", "folders_of", "releases_of", "reporting", "verify_all", "verify_release"]


def service_folder(bundle: Path, service: str) -> Path:
    return bundle / "releases" / service


def services_of(bundle: Path) -> list[str]:
    """Services that the bundle has releases of."""
    folder = bundle / "releases"
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def releases_of(bundle: Path, service: str) -> list[Stored]:
    """Oldest first; nothing is verified."""
    return stored_releases(service_folder(bundle, service))


def folders_of(bundle: Path, service: str, version: str) -> list[Path]:
    """Folders that bear the version's name, whatever is in them."""
    folder = service_folder(bundle, service)
    return sorted(path for path in folder.glob(f"{version}-*") if split_directory_name(path.name) == (
        version, path.name[len(version) + 1:]))


def find(bundle: Path, service: str, version: str, digest: str = "") -> Stored | None:
    """The release of a version; with ``digest``, only that one."""
    for stored in releases_of(bundle, service):
        if stored.release.version == version and digest in ("", stored.digest):
            return stored
    return None


def verify_release(directory: Path, allowed_signers: Path, report: Report = silent) -> Signed:
    """Signature, manifest and every file.

    Raises:
        RefusedError: unsigned, foreign signature, tampered, a file missing or too many.
    """
    signed = read_signed(directory, allowed_signers)
    verify_files(directory, signed.release, report)
    return signed


def verify_all(bundle: Path, allowed_signers: Path,
               report: Callable[[str], Report] = lambda _name: silent, only: str = "") -> tuple[Signed, ...]:
    """Every release of the bundle, or of the service ``only``; stops at the first that is wrong.

    ``report(name)`` gives who hears of the bytes.

    Raises:
        RefusedError: as ``verify_release``.
    """
    found = []
    for service in [only] if only else services_of(bundle):
        for directory in sorted(service_folder(bundle, service).glob("*")):
            if directory.is_dir() and not directory.name.startswith("."):
                found.append(verify_release(directory, allowed_signers, report(f"{service}/{directory.name}")))
    return tuple(found)


def reporting(emit: Emit, subject: str, host: str = "") -> Report:
    """A ``Report`` that becomes ``Progress`` events with bytes per second."""
    started = time.monotonic()

    def report(done: int, total: int) -> None:
        emit(Progress(subject, done, total, per_second=done / max(time.monotonic() - started, 0.001), host=host))

    return report
