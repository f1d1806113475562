"""The locks of a run: one for each service on the gateway, one on every touched host; kept alive by a heartbeat.

``take`` is all or nothing. The services' locks come first, one after the other, and settle most races; then the host
that is first by name, then the others at once. ``check`` is called before each act and raises when one of them is not
ours any more. A host that does not answer has no lock; what is ordered there fails by itself, and it is tried again
with each heartbeat.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from opsctl.engines.events import Emit, Note
from opsctl.engines.session import Session
from opsctl.errors import LockedError, OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.placements import gateway as gateway_of
from opsctl.releases.books import SILENT
from opsctl.releases.remote import ask, unreachable
from opsctl.runs import bare
from opsctl.runs.identity import Holder, holder_of
from opsctl.runs.journal import NOT_YET
from opsctl.runs.place import HOST, TIMEOUT_S, Place, Taken, attempt, held_by, holder_words

BEAT_EVERY_S = 15.0
PATIENCE_S = 10.0  # with all of them together: one that hangs at its login delays nobody else's heartbeat
OLD_S = 20.0  # a heartbeat older than this is renewed before the next act
FAREWELL_S = 4.0
WORKERS = 32
LOST = "lock.lost"

def boot_clock() -> float:
    """Seconds; goes on while this machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Locks:
    """The locks of one run. ``allow_bare``: a host without an agent is locked by a folder.

    ``gateway_optional``: go on with the hosts' locks alone when the gateway does not answer, and say so.
    """

    def __init__(self, fleet: Fleet, hosts: Sequence[Host], services: Sequence[str], holder: Holder, emit: Emit, *,
                 allow_bare: bool = False, gateway_optional: bool = False,
                 clock: Callable[[], float] = boot_clock) -> None:
        gateway = gateway_of(fleet)
        self.holder = holder
        self._emit = emit
        self._services = [Place(gateway, f"service-{name}", Session(fleet, gateway)) for name in sorted(services)]
        self._hosts = [Place(host, HOST, Session(fleet, host)) for host in sorted(hosts, key=lambda host: host.name)]
        self._allow_bare = allow_bare
        self._gateway_optional = gateway_optional
        self.meanwhile: Callable[[], None] = lambda: None  # called after each beat
        self._clock = clock
        self._lost: LockedError | None = None
        self._done = threading.Event()
        self._beats: threading.Thread | None = None

    @property
    def places(self) -> list[Place]:
        return [*self._services, *self._hosts]

    def take(self) -> None:
        """Takes all of them, or none, and begins the heartbeat.

        Raises:
            LockedError: ``lock.held``: somebody has one of them.
            RefusedError: the gateway does not answer.
        """
        try:
            self._take_all()
        except BaseException:
            self.drop()
            raise
        self._beats = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        self._beats.start()

    def rename(self, run: str) -> None:
        """The locks of this process are those of ``run`` from now on: an unfinished run that is continued."""
        self.holder = replace(self.holder, run=run)
        self._each(self.places, self._take)

    def check(self) -> None:
        """Before an act: all of them are ours still, as of 20 s ago at the most.

        Raises:
            LockedError: ``lock.lost``: one is not; nothing more may be done.
        """
        old = [place for place in self.places if self._clock() - place.tried_s > OLD_S]
        if old and self._lost is None:
            self._each(old, self._beat)
        self.known()

    def known(self) -> None:
        """The same without asking anybody: what the last heartbeats found.

        Raises:
            LockedError: ``lock.lost``.
        """
        if self._lost is not None:
            raise self._lost

    def on_hosts(self, function: Callable[[Place], None]) -> None:
        """Calls a function for each host that answers, on its open connection."""
        def call(place: Place) -> None:
            with place.only_one:
                function(place)
        self._each([place for place in self._hosts if place.how != "none"], call)

    def drop(self) -> None:
        """Gives back what is ours. Best effort, bounded: what stays is stale in a minute, or known to be ours."""
        if self._done.is_set():
            return
        self._done.set()
        at_once([place for place in self.places if place.how != "none"], self._drop, patience_s=FAREWELL_S * 2)
        for place in self.places:
            place.session.close()

    def _take_all(self) -> None:
        taken: list[tuple[Place, Taken]] = []
        for batch in ([[place] for place in self._services] + [self._hosts[:1], self._hosts[1:]]):
            found = list(zip(batch, self._each(batch, self._take), strict=True))
            held = [(place, one.holder) for place, one in found if one.holder is not None]
            taken += found
            if held:
                raise held_by([place for place, holder in held if holder == held[0][1]] or [held[0][0]], held[0][1])
        self._tell(taken)

    def _tell(self, taken: Sequence[tuple[Place, Taken]]) -> None:
        from_whom: dict[tuple[str, str], list[str]] = {}
        for place, one in taken:
            if one.before is not None and one.why:
                before = holder_of(one.before)
                what = f"{before.who} ({before.verb}, run {before.run}): {one.why}"
                from_whom.setdefault((before.token, what), []).append(place.words)
        for (_, what), places in from_whom.items():
            self._emit(Note(f"took over the lock of {', '.join(places)} from {what}", "warning"))

    def _take(self, place: Place) -> Taken:
        """Tries one lock; a host that does not answer is no reason to stop, the gateway is."""
        with place.only_one:
            place.tried_s = self._clock()
            try:
                return attempt(place, self.holder, allow_bare=self._allow_bare)
            except OpsctlError as error:
                if place.name != HOST and not isinstance(error, LockedError):
                    self._without_gateway(place, error)
                elif not place.quiet and not (self._allow_bare and error.code in NOT_YET):
                    place.quiet = True
                    self._warn(f"is not locked, and tried again with each heartbeat: {error.message}", place)
                return Taken()

    def _without_gateway(self, place: Place, error: OpsctlError) -> None:
        if error.code in NOT_YET and self._allow_bare:  # the first provision: the hosts' own locks do
            return
        if error.code not in SILENT:
            raise error
        if not self._gateway_optional:
            if error.code == "host.unreachable":
                raise unreachable({place.host.name: error})
            raise RefusedError(error.code, error.message, hint=error.hint, log_tail=error.log_tail)
        if not place.quiet:
            place.quiet = True
            self._emit(Note(f"the gateway does not answer: {place.words} is not locked there, its hosts are", "warning",
                            place.host.name))

    def _beat_on(self) -> None:
        due_s = time.monotonic() + BEAT_EVERY_S
        while not self._done.wait(max(0.0, due_s - time.monotonic())) and self._lost is None:
            due_s = time.monotonic() + BEAT_EVERY_S
            try:
                at_once([place for place in self.places if not place.only_one.locked()], self._beat, PATIENCE_S)
                self.meanwhile()
            except Exception:  # noqa: BLE001, S112 - whatever it is, e.g. a full disk: the next act meets it, and says so
                continue

    def _beat(self, place: Place) -> None:
        """Renews one lock; one that could not be taken before is tried again."""
        if self._done.is_set():
            return
        with place.only_one:
            place.tried_s = self._clock()
            try:
                if place.how == "agent":
                    answer = ask(place.session, ["lock-renew", "--name", place.name, "--token", self.holder.token],
                                 host=place.host.name, timeout_s=TIMEOUT_S)
                    if not answer["held"]:
                        self._lose(place, answer["holder"])
                else:
                    self._try_again(place)
                place.quiet = False
            except OpsctlError as error:
                if place.how != "none" and not place.quiet:
                    place.quiet = True
                    self._warn(f"does not answer the heartbeat of its lock: {error.message}", place)

    def _warn(self, message: str, place: Place) -> None:
        with contextlib.suppress(Exception):  # a full disk or a dead terminal: the next event meets it too
            self._emit(Note(message, "warning", place.host.name))

    def _try_again(self, place: Place) -> None:
        if place.how == "bare":
            owner = bare.renew(place.session, self.holder)
            if owner is None or owner.token != self.holder.token:
                self._lose(place, {**owner.holder, "beat_s": owner.beat_s} if owner else None)
                return
        taken = attempt(place, self.holder, allow_bare=self._allow_bare)
        if taken.holder is not None:
            self._lose(place, taken.holder)

    def _lose(self, place: Place, document: dict[str, Any] | None) -> None:
        place.how = "none"
        if self._lost is not None:
            return
        by = f"taken by {holder_words(document)}" if document else "broken by somebody"
        self._lost = LockedError(LOST, f"the lock of {place.words} is not ours any more: {by}; nothing more is done.",
                                 hint="opsctl lock status and opsctl runs show who is at work")

    def _drop(self, place: Place) -> None:
        with place.only_one:
            if place.how == "bare":
                bare.drop(place.session, self.holder.token)
            elif place.how == "agent":
                ask(place.session, ["lock-drop", "--name", place.name, "--token", self.holder.token],
                    host=place.host.name, timeout_s=FAREWELL_S)
            place.how = "none"

    def _each(self, places: Sequence[Place], function: Callable[[Place], Any]) -> list[Any]:
        return at_once(places, function)


def at_once(places: Sequence[Place], function: Callable[[Place], Any], patience_s: float | None = None) -> list[Any]:
    """The answers in the order of ``places``; raises the first error. ``patience_s``: how long to wait for all of them.

    Threads of our own and daemons: one that hangs on a dead host keeps no process from ending.
    """
    answers: list[Any] = [None] * len(places)
    errors: list[Exception] = []
    left = iter(list(enumerate(places)))

    def work() -> None:
        for at, place in left:
            try:
                answers[at] = function(place)
            except Exception as error:  # noqa: BLE001 - raised below, by whoever asked
                errors.append(error)

    threads = [threading.Thread(target=work, name="lock", daemon=True) for _ in places[:WORKERS]]
    for thread in threads:
        thread.start()
    until = None if patience_s is None else time.monotonic() + patience_s
    for thread in threads:
        thread.join(None if until is None else max(0.0, until - time.monotonic()))
    if errors and patience_s is None:
        raise errors[0]
    return answers
