"""Whose run is at work: ``/var/lib/opsctl/locks/<name>.json``, ``host`` or, on the gateway, ``service-<service>``.

A lock is its holder's for as long as the holder's heart beats, and 60 s more. The clock is this host's boot clock:
neither a controller whose clock is wrong nor a wall clock that is set makes a live holder look dead. A beat of an
earlier boot says nothing of how old it is; such a holder gets 60 s from the start of this boot to beat again.

Who decides is pure (``judge``); reading, deciding and writing happen under one flock, and so does a fenced act.
A file that cannot be read is no lock: its holder finds that at the next beat, and stops.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from opsctl.agent import unfinished
from opsctl.agent.drains import boot_clock
from opsctl.agent.durable import locked, remove_durably, write_atomically
from opsctl.agent.manifest import SERVICE
from opsctl.agent.paths import Paths
from opsctl.errors import LockedError, UsageError

HOST = "host"
STALE_S = 60.0
NAME = re.compile(rf"{HOST}|service-{SERVICE.pattern}")
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")  # as in an owner of a drain
WORDS = ("token", "run", "verb", "user", "machine", "machine_id", "boot", "message")
NUMBERS = ("pid", "pid_start")
MAY_LACK = ("namespace",)  # controllers of before do not say it
OWNED_BY_RUN = "run:"
SUFFIX = ".json"
FIRST_PROCESS = Path("/proc/1/stat")
START_FIELD = 19  # of those after the name in parentheses: starttime, clock ticks of the boot clock; proc_pid_stat(5)


@dataclass(frozen=True)
class Now:
    """The name of this boot, and two times of the boot clock in seconds: now, and when this boot began.

    In a container the kernel's clock is older than the boot, so the start is that of the first process.
    """

    boot: str
    at_s: float
    began_s: float = 0.0


@dataclass(frozen=True)
class Lock:
    """``holder`` as ``check_holder`` gives it; ``since``: UTC; ``boot`` and ``beat_s`` are of the last heartbeat."""

    holder: Mapping[str, Any]
    since: str
    boot: str
    beat_s: float

    def age_s(self, now: Now) -> float:
        """Seconds since the last heartbeat, at least."""
        return max(0.0, now.at_s - (self.beat_s if self.boot == now.boot else now.began_s))

    def is_stale(self, now: Now) -> bool:
        return self.age_s(now) > STALE_S

    def told(self, now: Now) -> dict[str, Any]:
        """The holder, with ``since`` and ``beat_s``: seconds since the last heartbeat."""
        return {**self.holder, "since": self.since, "beat_s": round(self.age_s(now), 1)}


Clock = Callable[[Paths], Now]


def this_moment(paths: Paths) -> Now:
    fields = FIRST_PROCESS.read_text().rpartition(")")[2].split()
    return Now(unfinished.boot(paths), boot_clock(), int(fields[START_FIELD]) / os.sysconf("SC_CLK_TCK"))


def judge(before: Lock | None, token: str, over: str, now: Now) -> str:
    """How whoever has ``token`` may take a lock that is ``before``'s; empty when it may not. Pure.

    ``free``, ``renewed`` (it has it already), ``over`` (held by the run ``over``, which is what the caller saw),
    ``stale`` (no heartbeat for 60 s), ``reboot`` (none since this host booted, 60 s ago or more).
    """
    if before is None:
        return "free"
    if before.holder["token"] == token:
        return "renewed"
    if over and before.holder["run"] == over:
        return "over"
    if before.is_stale(now):
        return "stale" if before.boot == now.boot else "reboot"
    return ""


def refusal(before: Lock | None, owner: str, now: Now) -> LockedError | None:
    """Why an order of ``owner`` must not reach a host whose lock is ``before``'s; None when it may. Pure.

    Only orders of runs are fenced: a controller that slept through the loss of its lock wakes up and orders on.
    """
    if before is None or not owner.startswith(OWNED_BY_RUN) or before.is_stale(now):
        return None
    holder = before.holder
    run = owner.removeprefix(OWNED_BY_RUN)
    if holder["run"] == run:
        return None
    return LockedError(
        "host.locked", f"{holder['user']}@{holder['machine']} has this host for {holder['verb']} (run {holder['run']}, "
        f"since {before.since}); run {run} must leave it alone.",
        hint=f"wait until it has ended; if it never will: opsctl lock break {holder['run']}")


def take(paths: Paths, name: str, holder: Mapping[str, Any], over: str = "", clock: Clock = this_moment
         ) -> dict[str, Any]:
    """Takes a lock for ``holder`` if ``judge`` lets it: ``{"taken", "how", "before"}`` or ``{"taken", "holder"}``.

    A holder that takes its own again keeps its ``since``.

    Raises:
        UsageError: ``holder`` is none.
    """
    holder = check_holder(holder)
    with _only_one(paths, name):
        now, before = clock(paths), read(paths, name)
        how = judge(before, holder["token"], over, now)
        if not how:
            return {"taken": False, "holder": before and before.told(now)}
        since = before.since if before and how == "renewed" else _utc_now()
        _write(paths, name, Lock(holder, since, now.boot, now.at_s))
    return {"taken": True, "how": how, "before": before and before.told(now)}


def renew(paths: Paths, name: str, token: str, clock: Clock = this_moment) -> dict[str, Any]:
    """A heartbeat: ``{"held", "holder"}``. Not held: somebody else has it, or nobody (``holder`` is None)."""
    with _only_one(paths, name):
        now, lock = clock(paths), read(paths, name)
        held = lock is not None and lock.holder["token"] == token
        if lock and held:
            lock = Lock(lock.holder, lock.since, now.boot, now.at_s)
            _write(paths, name, lock)
    return {"held": held, "holder": lock and lock.told(now)}


def drop(paths: Paths, name: str, token: str) -> dict[str, Any]:
    """Gives a lock back; ``{"dropped": False}`` when it was not ``token``'s."""
    return {"dropped": _remove(paths, name, lambda holder: bool(holder["token"] == token))}


def break_(paths: Paths, name: str, run: str) -> dict[str, Any]:
    """Takes a lock from whoever holds it for ``run``, dead or alive; a live one finds that at its next beat."""
    return {"broken": _remove(paths, name, lambda holder: bool(holder["run"] == run))}


def all_locks(paths: Paths, clock: Clock = this_moment) -> list[dict[str, Any]]:
    """``[{"name", "holder"}]`` in the order of their names, stale ones too."""
    names = sorted(path.name.removesuffix(SUFFIX) for path in paths.locks.glob(f"*{SUFFIX}")
                   if not path.name.startswith("."))
    return [{"name": name, "holder": holder} for name in names if (holder := told(paths, name, clock))]


def told(paths: Paths, name: str = HOST, clock: Clock = this_moment) -> dict[str, Any] | None:
    """The holder of one lock, with ``since`` and ``beat_s``."""
    lock = read(paths, name)
    return None if lock is None else lock.told(clock(paths))


@contextmanager
def fenced(paths: Paths, owner: str, clock: Clock = this_moment) -> Iterator[None]:
    """Inside, nobody takes this host's lock: what ``owner`` may do when it looks, it may do until it has done it.

    Raises:
        LockedError: another run has this host.
    """
    if not owner.startswith(OWNED_BY_RUN):
        yield
        return
    with _only_one(paths, HOST):
        refused = refusal(read(paths, HOST), owner, clock(paths))
        if refused:
            raise refused
        yield


def read(paths: Paths, name: str) -> Lock | None:
    """The lock as it lies there, stale or not; None when there is none that can be read."""
    try:
        document = json.loads(_file(paths, name).read_bytes())
        return Lock(check_holder(document["holder"]), str(document["since"]), str(document["beat"]["boot"]),
                    float(document["beat"]["at_s"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError, UsageError):
        return None


def check_holder(document: object) -> dict[str, Any]:
    """The fields of a holder and no others.

    Raises:
        UsageError: one is missing or of another type, or ``run`` cannot be one.
    """
    holder = document if isinstance(document, Mapping) else {}
    for names, kind in ((WORDS, str), (NUMBERS, int)):
        for name in names:
            if not isinstance(holder.get(name), kind):
                raise UsageError("lock.bad_holder", f"a holder's {name!r} is {holder.get(name)!r}.",
                                 hint=f"text: {', '.join(WORDS)}; whole numbers: {', '.join(NUMBERS)}")
    if not holder["token"] or not RUN.fullmatch(holder["run"]):
        raise UsageError("lock.bad_holder", f"a holder has a token, and its run is no {holder['run']!r}.",
                         hint="letters, digits and ._@- in a run's name")
    return {name: holder[name] for name in (*WORDS, *NUMBERS)} | {
        name: holder[name] for name in MAY_LACK if isinstance(holder.get(name), str)}


def _file(paths: Paths, name: str) -> Path:
    if not NAME.fullmatch(name):
        raise UsageError("lock.bad_name", f"{name!r} is no lock.", hint="host, or service-SERVICE")
    return paths.locks / f"{name}{SUFFIX}"


def _only_one(paths: Paths, name: str) -> AbstractContextManager[bool]:
    return locked(paths.locks / f".{_file(paths, name).name}.lock")


def _write(paths: Paths, name: str, lock: Lock) -> None:
    write_atomically(_file(paths, name), json.dumps({
        "holder": lock.holder, "since": lock.since, "beat": {"boot": lock.boot, "at_s": lock.beat_s}}) + "\n")


def _remove(paths: Paths, name: str, of: Callable[[Mapping[str, Any]], bool]) -> bool:
    with _only_one(paths, name):
        lock = read(paths, name)
        if lock is None or not of(lock.holder):
            return False
        remove_durably(_file(paths, name))
    return True


def _utc_now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
