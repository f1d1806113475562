"""Reads hosts' journals once, and follows them from there on."""

from __future__ import annotations

import queue
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from threading import Event

from opsctl.engines.following import PAUSES_S, Follower, Heard, Kind
from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet
from opsctl.logs.entries import Entry, Place, Since, arguments, entries_of, merge, parse

READ_TIMEOUT_S = 120.0
BATCH_S = 0.25  # lines of several hosts that come within it are put in order
WAITING_LINES = 10_000  # a terminal that is slower than the hosts holds them up, and no memory fills


def read(fleet: Fleet, places: Mapping[str, Place], lines: int, since: str
         ) -> tuple[dict[str, list[Entry]], dict[str, OpsctlError]]:
    """The newest ``lines`` of each host, and why hosts did not answer. Notes in ``places`` how far each was read."""

    def ask(session: Session) -> list[Entry]:
        name = session.host.name
        argv = arguments(places[name].units, lines=max(lines, 1), since=since)
        done = session.run(argv, timeout_s=READ_TIMEOUT_S)
        if done.returncode:
            raise OpsctlError("logs.journalctl", f"{name}: journalctl ended with exit code {done.returncode}.",
                              hint=f"opsctl exec --limit {name} -- journalctl --verify",
                              log_tail=done.stderr.splitlines()[-5:])
        found = entries_of(name, done.stdout.splitlines())
        places[name].read = True
        places[name].cursor = found[-1].cursor if found else ""
        return found[-lines:] if lines else []  # of none, the last one was asked for: following begins behind it

    answers = on_each(fleet, [fleet.host(name) for name in places], ask)
    return ({name: answer for name, answer in answers.items() if not isinstance(answer, OpsctlError)},
            {name: answer for name, answer in answers.items() if isinstance(answer, OpsctlError)})


def follow(fleet: Fleet, places: Mapping[str, Place], lines: int, since: Since, pauses_s: Sequence[float] = PAUSES_S
           ) -> Generator[tuple[list[Heard], list[Entry]], None, None]:
    """What hosts say from ``places`` on, in small batches: who went and came back, and entries by time.

    For ever; closing the generator ends all that it started.
    """
    heard: queue.Queue[Heard | Entry] = queue.Queue(WAITING_LINES)
    ended = Event()
    began = time.monotonic()

    def put(what: Heard | Entry) -> None:
        while not ended.is_set():
            with suppress(queue.Full):
                heard.put(what, timeout=0.5)
                return

    def hear(what: Heard) -> None:
        entry = parse(what.host, what.text) if what.kind is Kind.LINE else None
        if entry is not None:
            places[what.host].cursor = entry.cursor or places[what.host].cursor
            put(entry)
        elif what.kind is not Kind.LINE:
            put(what)

    followers = [
        Follower(fleet.ssh_config, fleet.host(name),
                 lambda place=place: place.arguments(lines, since.argument(time.monotonic() - began)),  # type: ignore[misc]
                 hear, pauses_s)
        for name, place in places.items()]
    try:
        for follower in followers:
            follower.start()
        while True:
            batch = list(_batch(heard))
            by_host: dict[str, list[Entry]] = {}
            for one in batch:
                if isinstance(one, Entry):
                    by_host.setdefault(one.host, []).append(one)
            yield [one for one in batch if isinstance(one, Heard)], merge(by_host)
    finally:
        ended.set()
        for follower in followers:
            follower.end()
        for follower in followers:
            follower.join()


def _batch(heard: queue.Queue[Heard | Entry]) -> Iterator[Heard | Entry]:
    """Waits for something, then takes what comes within ``BATCH_S``."""
    yield heard.get()
    until = time.monotonic() + BATCH_S
    with suppress(queue.Empty):
        while True:
            yield heard.get(timeout=max(until - time.monotonic(), 0.001))
            if time.monotonic() > until:
                return
