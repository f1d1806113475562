"""Why an instance gets less traffic: one file an owner in ``/var/lib/opsctl/drains/<instance>/``; the least wins.

An owner is ``operator:NAME``, ``run:RUN`` or ``guard``, and touches its own file alone. A drain with a lease ends by
itself: at the boot clock's time that it names, or with that boot. So a controller that died leaves no instance out of
service, and a wall clock that is set back or forward ends no drain.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from opsctl.agent import unfinished
from opsctl.agent.durable import locked, remove_durably, write_atomically
from opsctl.agent.paths import Paths
from opsctl.errors import UsageError

FULL = 100
OWNER = re.compile(r"guard|(operator|run):[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
SUFFIX = ".json"


def boot_clock() -> float:
    """Seconds since boot; unlike the monotonic clock it goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read_drains(paths: Paths, instance: str, clock: Callable[[], float] = boot_clock) -> list[dict[str, Any]]:
    """The drains of one instance that count now, in the order of their owners.

    A file that cannot be read drains too, to 0: somebody wanted the traffic gone. ``lease_s``, seconds that are left,
    is there for those that end by themselves.
    """
    found = []
    for path in _files(paths, instance):
        try:
            document = parse(path.read_bytes())
            left = _remaining(paths, document, clock)
        except FileNotFoundError:  # just removed
            continue
        except (OSError, ValueError):
            document, left = {"weight": 0}, None
        if left is not None and left <= 0:
            continue
        drain = {key: value for key, value in document.items() if key != "lease"}
        found.append({**drain, **({} if left is None else {"lease_s": round(left, 1)}), "instance": instance,
                      "owner": path.name.removesuffix(SUFFIX)})
    return found


def least_weight(drains: Sequence[Mapping[str, Any]]) -> int:
    """Percent."""
    return min((int(drain["weight"]) for drain in drains), default=FULL)


def parse(content: bytes) -> dict[str, Any]:
    """A drain's file, its weight put between 0 and 100.

    Raises:
        ValueError: not what ``put`` writes.
    """
    document = json.loads(content)
    weight = document.get("weight") if isinstance(document, dict) else None
    if not isinstance(weight, (int, float)) or math.isnan(weight):
        raise ValueError("no weight")
    lease = document.get("lease")
    if lease is not None and not (isinstance(lease, dict) and isinstance(lease.get("boot"), str)
                                  and isinstance(lease.get("until_s"), (int, float))):
        raise ValueError("a lease without its end")
    return {**document, "weight": int(max(0, min(FULL, weight)))}


def remaining(document: Mapping[str, Any], boot: str, now: float) -> float | None:
    """Seconds that a drain still has, None for one without a lease. Of an earlier boot: none. Pure."""
    lease = document.get("lease")
    if lease is None:
        return None
    return float(lease["until_s"]) - now if lease["boot"] == boot else 0.0


def put(paths: Paths, instance: str, owner: str, weight: int, reason: str, by: str, lease_s: float | None = None,
        clock: Callable[[], float] = boot_clock) -> bool:
    """Drains ``instance`` to ``weight`` per cent for ``owner``; False when its drain said that and still counts.

    ``lease_s``: seconds until it ends by itself; the same again renews it. ``by`` is who asked for it.

    Raises:
        UsageError: ``owner`` is none.
    """
    path = _file(paths, instance, owner)
    with locked(_lock(paths, instance)):
        _remove_expired(paths, instance, clock)
        before = _before(path)
        wanted = {"owner": owner, "weight": weight, "reason": reason, "by": by}
        lease = None if lease_s is None else {"boot": unfinished.boot(paths), "until_s": clock() + lease_s}
        same = all(before.get(key) == value for key, value in wanted.items())
        same = same and (before.get("lease") is None) == (lease is None)
        if not same or lease is not None:
            at = before.get("at") if same else None
            document = {**wanted, "at": at or datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                        **({} if lease is None else {"lease": lease})}
            write_atomically(path, json.dumps(document, sort_keys=True) + "\n")
    return not same


def remove(paths: Paths, instance: str, owner: str, clock: Callable[[], float] = boot_clock) -> bool:
    """Takes ``owner``'s drain of ``instance`` away and no other; False when there was none that counted.

    Raises:
        UsageError: ``owner`` is none.
    """
    path = _file(paths, instance, owner)
    if not path.parent.is_dir():
        return False
    with locked(_lock(paths, instance)):
        _remove_expired(paths, instance, clock)
        there = path.exists()
        remove_durably(path)
    return there


def check_owner(owner: str) -> str:
    """``owner``, if it is one; it becomes the name of a file.

    Raises:
        UsageError: it is none.
    """
    if not OWNER.fullmatch(owner):
        raise UsageError("drain.bad_owner", f"{owner!r} cannot own a drain.",
                         hint="operator:NAME, run:RUN or guard; letters, digits and ._@- in a name")
    return owner


def _file(paths: Paths, instance: str, owner: str) -> Path:
    return paths.drains(instance) / f"{check_owner(owner)}{SUFFIX}"


def _lock(paths: Paths, instance: str) -> Path:
    return paths.drains(instance) / ".lock"


def _files(paths: Paths, instance: str) -> list[Path]:
    directory = paths.drains(instance)
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir()
                  if path.name.endswith(SUFFIX) and not path.name.startswith("."))


def _remove_expired(paths: Paths, instance: str, clock: Callable[[], float]) -> None:
    """Ended leases, also of other owners, who are dead or gave up: nobody else would ever sweep them."""
    for path in _files(paths, instance):
        left = _remaining(paths, _before(path), clock)
        if left is not None and left <= 0:
            remove_durably(path)


def _before(path: Path) -> dict[str, Any]:
    try:
        return parse(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _remaining(paths: Paths, document: Mapping[str, Any], clock: Callable[[], float]) -> float | None:
    return remaining(document, unfinished.boot(paths), clock()) if document.get("lease") else None
