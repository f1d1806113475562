"""The ledger: which release the fleet should serve and which ones are bad, one append-only JSON line each. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opsctl.agent.manifest import SHA256, check_name, directory_name
from opsctl.errors import LockedError, OpsctlError, RefusedError

SERVE, BAD = "serve", "bad"
ACTIONS = (SERVE, BAD)


@dataclass(frozen=True)
class Line:
    """From ``at`` (UTC, ISO 8601) the service should serve this release (``serve``), or nobody should (``bad``).

    ``by`` and ``run`` say who wrote it. Lines of older versions have no action and say serve.
    """

    number: int
    version: str
    digest: str
    at: str
    by: str
    run: str = ""
    note: str = ""
    action: str = SERVE

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
            lines.append(line_of(json.loads(text)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OpsctlError("ledger.damaged", f"line {len(lines) + 1} of the ledger cannot be read: {error}.",
                              hint="it is append-only: restore it from a host's copy or a backup") from None
        check(lines[:-1], lines[-1])
    return tuple(lines), whole


def to_bytes(lines: Sequence[Line]) -> bytes:
    """The whole ledger as ``parse`` reads it."""
    return b"".join(line.to_bytes() for line in lines)


def line_of(document: Mapping[str, Any]) -> Line:
    """A line from its JSON. Raises KeyError, ValueError, TypeError when it is none."""
    return Line(int(document["number"]), str(document["version"]), str(document["digest"]), str(document["at"]),
                str(document["by"]), str(document.get("run", "")), str(document.get("note", "")),
                str(document.get("action", SERVE)))


def tip(lines: Sequence[Line]) -> Line | None:
    """What should be served now: the last line that says serve; None while nobody said."""
    return next((line for line in reversed(lines) if line.action == SERVE), None)


def bad_digests(lines: Sequence[Line]) -> frozenset[str]:
    """Releases whose last line says bad. One that was served again after that is not bad any more."""
    last = {line.digest: line.action for line in lines}
    return frozenset(digest for digest, action in last.items() if action == BAD)


def says(lines: Sequence[Line], line: Line) -> bool:
    """Whether the ledger says already what ``line`` would say: to add it would change nothing."""
    bad = line.digest in bad_digests(lines)
    if line.action == BAD:
        return bad
    now = tip(lines)
    return now is not None and (now.version, now.digest) == (line.version, line.digest) and not bad


def is_prefix(lines: Sequence[Line], longer: Sequence[Line]) -> bool:
    """Whether ``longer`` begins with ``lines``, or is the same."""
    return tuple(longer[:len(lines)]) == tuple(lines)


def check(lines: Sequence[Line], line: Line) -> None:
    """Raises RefusedError when ``line`` cannot follow ``lines``: wrong number, or a version name taken otherwise."""
    if line.number != len(lines) + 1:
        raise RefusedError("ledger.inconsistent", f"line {line.number} cannot follow {len(lines)} lines of the ledger.",
                           hint="look at it: opsctl-host ledger-show on the gateway")
    check_name(line.version)
    if line.action not in ACTIONS:
        raise RefusedError("ledger.inconsistent", f"line {line.number} of the ledger says {line.action!r}, which this "
                           "opsctl does not know.", hint="a newer opsctl wrote it: use that one")
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

