"""Watches a job on a host by short questions, until it has ended.

The job is a unit of its own there: it goes on when nobody asks, and a connection that breaks costs only a new one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opsctl.engines.events import Emit, Progress
from opsctl.engines.session import Session
from opsctl.errors import OpsctlError
from opsctl.releases.remote import ask, error_of

WATCH_S = 2.0  # one question waits this long for news
RETRY_S = (1.0, 3.0, 10.0, 30.0)  # a switch that restarts is back within a minute
OUT_OF_REACH = ("host.connection_lost", "host.timed_out", "host.unreachable")
SPEED_WINDOW_S = 10.0
LOST = "job.lost"
BYTES = "fetch"  # the phase whose ``done`` and ``total`` are bytes
pause = time.sleep


class Speed:
    """Bytes per second over the last seconds: what an earlier try brought, or a file that was linked, is no speed."""

    def __init__(self, window_s: float = SPEED_WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def per_second(self, now: float, done: int) -> float:
        """Of ``done`` bytes at ``now`` seconds; 0 as long as there is nothing to compare with."""
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self._window_s:
            self._seen.popleft()
        then, before = self._seen[0]
        return (done - before) / (now - then) if now > then and done > before else 0.0


def watch(session: Session, look: Sequence[str], subject: str, emit: Emit, *, first: Mapping[str, Any],
          clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """Watches a job from its ``first`` status on; ``look`` is the verb that asks for the next. Gives its result.

    While bytes come, ``Progress`` has bytes per second and the total, which views show as time left; in every other
    phase it has the seconds so far.

    Raises:
        OpsctlError: the job's own error, of its kind; ``job.lost`` when it left no result (the host booted meanwhile);
            the host's silence, when that lasts.
    """
    host = session.host.name
    began = clock()
    status = dict(first)
    speed, brought = Speed(), 0
    while status["state"] == "running":
        if status["phase"] == BYTES and status["total"]:
            brought = status["total"]
            emit(Progress(subject, status["done"], brought, per_second=speed.per_second(clock(), status["done"]),
                          host=host))
        else:
            brought = _all_of_it(subject, brought, host, emit)
            emit(Progress(f"{subject}: {status['phase'] or 'starting'}", int(clock() - began), 0, "seconds", host=host))
        status = _look(session, [*look, "--wait-s", str(WATCH_S)])
    if status["state"] == "failed":
        raise error_of(status["error"], int(status["error"]["exit_code"]), host)
    if status["state"] != "done":
        raise OpsctlError(LOST, f"{host}: {subject} left no result.", hint="run the same command again")
    _all_of_it(subject, brought, host, emit)
    result: dict[str, Any] = status["result"]
    return result


def _all_of_it(subject: str, total: int, host: str, emit: Emit) -> int:
    """The last bytes came between two questions: says so once, and gives 0 for what is still to be said."""
    if total:
        emit(Progress(subject, total, total, host=host))
    return 0


def _look(session: Session, verb: list[str]) -> dict[str, Any]:
    """Asks until the host can be heard: the job there goes on meanwhile, and to ask changes nothing."""
    for wait_s in RETRY_S:
        try:
            return ask(session, verb, host=session.host.name)
        except OpsctlError as error:
            if error.code not in OUT_OF_REACH:
                raise
        pause(wait_s)
    return ask(session, verb, host=session.host.name)
