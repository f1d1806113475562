"""The ledger: which release the fleet should serve, one append-only JSON line after the other. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opsctl.agent.manifest import SHA256, check_name, directory_name
from opsctl.errors import LockedError, OpsctlError, RefusedError


@dataclass(frozen=True)
class Line:
    """From ``at`` (UTC, ISO 8601) the service should serve this release. ``by`` and ``run`` say who wrote it."""

    number: int
    version: str
    digest: str
    at: str
    by: str
    run: str = ""
    note: str = ""

    @property
    def release(self) -> str:
        """``v1-0123456789ab``."""
        return directory_name(self.version, self.digest)

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()


def parse(content: bytes) -> tuple[tuple[Line, ...], int]:
    """The lines, and how many bytes of ``content`` they are. A last line without its newline was cut off: no line.

    Raises:
        OpsctlError: the file was written by something else.
    """
    whole = content.rfind(b"\n") + 1
    lines: list[Line] = []
    for text in content[:whole].splitlines():
        try:
            lines.append(_line(json.loads(text)))
        except (ValueError, KeyError, TypeError) as error:
            raise OpsctlError("ledger.damaged", f"line {len(lines) + 1} of the ledger cannot be read: {error}.",
                              hint="it is append-only: restore it from a host's copy or a backup") from None
        check(lines[:-1], lines[-1])
    return tuple(lines), whole


def tip(lines: Sequence[Line]) -> Line | None:
    """What should be served now; None while nobody said."""
    return lines[-1] if lines else None


def check(lines: Sequence[Line], line: Line) -> None:
    """Raises RefusedError when ``line`` cannot follow ``lines``: wrong number, or a version name taken otherwise."""
    if line.number != len(lines) + 1:
        raise RefusedError("ledger.inconsistent", f"line {line.number} cannot follow {len(lines)} lines of the ledger.",
                           hint="look at it: opsctl-host ledger-show on the gateway")
    check_name(line.version)
    if not SHA256.fullmatch(line.digest):
        raise RefusedError("ledger.inconsistent", f"digest {line.digest!r} is no sha256.", hint="the 64 hex digits")
    for earlier in lines:
        if earlier.version == line.version and earlier.digest != line.digest:
            raise RefusedError("ledger.inconsistent", f"line {earlier.number} of the ledger has version {line.version} "
                               "with another digest.", hint="a version name is taken once: import under another")


def check_tip(lines: Sequence[Line], after: int) -> None:
    """Raises LockedError when the ledger has grown since its writer read ``after`` lines of it."""
    if len(lines) != after:
        raise LockedError("ledger.moved", f"the ledger has {len(lines)} lines, not {after}: somebody else wrote to it.",
                          hint="look at opsctl status, then run the same again")


def _line(document: dict[str, Any]) -> Line:
    return Line(int(document["number"]), str(document["version"]), str(document["digest"]), str(document["at"]),
                str(document["by"]), str(document.get("run", "")), str(document.get("note", "")))
