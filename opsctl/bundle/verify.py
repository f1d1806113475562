"""Is this bundle whole, unchanged and ours? Asked before anything is taken from it; reads only."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from opsctl.bundle import sums
from opsctl.bundle.keys import Checker, checking
from opsctl.bundle.repository import BUILD_ANEW, check_repository
from opsctl.engines.events import Emit, Note, discard
from opsctl.errors import RefusedError

FOLDERS = ("apt", "wheels")
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.asc"
AGENT_REQUIREMENT = "opsctl-agent.txt"  # in wheels/: what pip installs on a host
SWITCHING = ".switching"  # there while a build puts its new files in place


@dataclass(frozen=True)
class Verified:
    """What a verified bundle holds; ``signed_by`` is the fingerprint of the key."""

    files: int
    bytes: int
    signed_by: str
    seconds: float


def verify_bundle(bundle: Path, trusted_key: Path, emit: Emit = discard) -> Verified:
    """Checks the bundle's signature, every file's content, that none is missing and none is too many.

    Releases are signed one by one, by another key, and are not looked at here.

    Raises:
        RefusedError: one sentence that names the file; code ``bundle.missing``, ``bundle.incomplete``,
            ``bundle.unsigned``, ``bundle.foreign_key``, ``bundle.tampered``, ``bundle.inconsistent``,
            ``bundle.no_trusted_key`` or ``bundle.no_program``.
    """
    began = time.monotonic()
    with checking(trusted_key) as checker:
        expected, signed_by = _signed_sums(bundle, checker)
        _same_names(bundle, expected)
        if f"wheels/{AGENT_REQUIREMENT}" not in expected:
            raise RefusedError("bundle.incomplete", f"{bundle} holds no agent for the hosts.", hint=BUILD_ANEW)

        def compare(path: str, digest: str) -> None:
            if expected[path] != digest:
                raise RefusedError("bundle.tampered", f"{bundle / path} is not the file that was signed.",
                                   hint=f"{BUILD_ANEW}; find out who changed the file")

        sums.digests(bundle, expected, emit, "checking the bundle", compare)
        check_repository(bundle, checker, expected)
    size = sum((bundle / path).stat().st_size for path in expected)
    return Verified(len(expected), size, signed_by, time.monotonic() - began)


def verify_releases(bundle: Path, allowed_signers: Path, emit: Emit = discard) -> int:
    """Checks signature and files of every release in the bundle; returns how many there are.

    Raises:
        RefusedError: one of them is unsigned, signed by a stranger, or changed.
    """
    releases = sorted((bundle / "releases").glob("*/*/manifest.json"))
    if not releases:
        return 0
    from opsctl.releases.store import verify_all  # noqa: PLC0415 - a bundle without releases needs none of it

    emit(Note(f"checking {len(releases)} release{'s' if len(releases) > 1 else ''}"))
    verify_all(bundle, allowed_signers)
    return len(releases)


def _signed_sums(bundle: Path, checker: Checker) -> tuple[dict[str, str], str]:
    """What the signature covers: digests by path, and the fingerprint of the key."""
    if (bundle / SWITCHING).exists():
        raise RefusedError("bundle.incomplete", f"a build was interrupted while it put its files into {bundle}.",
                           hint="opsctl bundle build finishes it")
    if not (bundle / SUMS).is_file():
        made = any((bundle / folder).exists() for folder in FOLDERS)
        code, what = ("bundle.incomplete", "is missing") if made else ("bundle.missing", "is not there: no bundle yet")
        raise RefusedError(code, f"{bundle / SUMS} {what}.", hint="opsctl bundle build makes the bundle")
    if not (bundle / SIGNATURE).is_file():
        raise RefusedError("bundle.unsigned", f"{bundle / SIGNATURE} is missing: the bundle is not signed.",
                           hint=f"{BUILD_ANEW} and signs it")
    signed_by = checker.check(str(bundle / SUMS), bundle / SIGNATURE, bundle / SUMS)
    try:
        return sums.parse((bundle / SUMS).read_text(encoding="utf-8")), signed_by
    except ValueError as error:
        raise RefusedError("bundle.tampered", f"{bundle / SUMS}, {error}, is no line of a bundle's checksums.",
                           hint=BUILD_ANEW) from None


def _same_names(bundle: Path, expected: Iterable[str]) -> None:
    there = dict(sums.regular_files(bundle, FOLDERS))
    for path, regular in sorted(there.items()):
        if path not in expected:
            raise RefusedError("bundle.tampered", f"{bundle / path} is not among the signed files.",
                               hint=f"remove it, or: {BUILD_ANEW}")
        if not regular:
            raise RefusedError("bundle.tampered", f"{bundle / path} is a link or device where a file was signed.",
                               hint=BUILD_ANEW)
    for path in expected:
        if path not in there:
            raise RefusedError("bundle.incomplete", f"{bundle / path} is missing.", hint=BUILD_ANEW)
