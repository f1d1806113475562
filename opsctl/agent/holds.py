"""Hosts that are to be left alone: ``/var/lib/opsctl/holds/<host>.json``, on the gateway and on the host itself.

A hold is a person's word on the calendar ("until Monday"), so it ends by the wall clock, or never. It outlives boots. A
file that cannot be read holds until it is removed: somebody wanted the host left alone.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from opsctl.agent.durable import locked, remove_durably, write_atomically
from opsctl.agent.paths import Paths
from opsctl.errors import UsageError

HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
UTC = "%Y-%m-%dT%H:%M:%SZ"
SUFFIX = ".json"
FOR_EVER = {"by": "", "message": "its file cannot be read", "since": "", "until": None}

Clock = Callable[[], float]


def put(paths: Paths, host: str, by: str, message: str, for_s: float | None = None, clock: Clock = time.time) -> bool:
    """Holds ``host`` for so many seconds, or until it is removed; False when its hold said just that already.

    The same person's same words keep ``since``. Holds that have ended are swept.

    Raises:
        UsageError: ``host`` cannot be one.
    """
    path = _file(paths, host)
    with _only_one(paths):
        now = clock()
        _sweep(paths, now)
        before = _read(path) or {}
        wanted = {"by": by, "message": message, "until": None if for_s is None else _utc(now + for_s)}
        changed = any(key not in before or before[key] != value for key, value in wanted.items())
        if changed:
            same = (before.get("by"), before.get("message")) == (by, message)
            write_atomically(path, json.dumps({**wanted, "since": before["since"] if same else _utc(now)}) + "\n")
    return changed


def remove(paths: Paths, host: str, clock: Clock = time.time) -> bool:
    """Ends the hold of ``host``; False when there was none that counted.

    Raises:
        UsageError: ``host`` cannot be one.
    """
    path = _file(paths, host)
    if not path.exists():
        return False
    with _only_one(paths):
        hold = _read(path)
        remove_durably(path)
    return hold is not None and not has_ended(hold, clock())


def all_holds(paths: Paths, clock: Clock = time.time) -> list[dict[str, Any]]:
    """``[{"host", "by", "message", "since", "until"}]`` that count now, in the order of their hosts; times are UTC."""
    now = clock()
    found = ((path.name.removesuffix(SUFFIX), _read(path)) for path in _files(paths))
    return [{"host": host, **hold} for host, hold in found if hold is not None and not has_ended(hold, now)]


def parse(content: bytes) -> dict[str, Any]:
    """A hold's file.

    Raises:
        ValueError: not what ``put`` writes.
    """
    document = json.loads(content)
    try:
        until = document["until"]
        if until is not None:
            _seconds(until)
        return {**{key: str(document[key]) for key in ("by", "message", "since")}, "until": until}
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a hold: {error}") from None


def has_ended(hold: dict[str, Any], now: float) -> bool:
    """``now``: seconds of the wall clock. Pure."""
    return hold["until"] is not None and _seconds(hold["until"]) <= now


def check_host(host: str) -> str:
    """``host``, if it may be one; it becomes the name of a file.

    Raises:
        UsageError: it may not.
    """
    if not HOST_NAME.fullmatch(host):
        raise UsageError("hold.bad_host", f"{host!r} is not the name of a host.", hint="as it stands in the inventory")
    return host


def _seconds(text: str) -> float:
    return datetime.strptime(text, UTC).replace(tzinfo=timezone.utc).timestamp()


def _utc(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).strftime(UTC)


def _file(paths: Paths, host: str) -> Path:
    return paths.holds / f"{check_host(host)}{SUFFIX}"


def _files(paths: Paths) -> list[Path]:
    return sorted(path for path in paths.holds.glob(f"*{SUFFIX}") if not path.name.startswith("."))


def _only_one(paths: Paths) -> AbstractContextManager[bool]:
    return locked(paths.holds / ".lock")


def _read(path: Path) -> dict[str, Any] | None:
    """None when there is none."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return dict(FOR_EVER)


def _sweep(paths: Paths, now: float) -> None:
    for path in _files(paths):
        hold = _read(path)
        if hold is not None and has_ended(hold, now):
            remove_durably(path)
