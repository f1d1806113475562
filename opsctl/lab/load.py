"""Load on a fleet: clients that stream chat completions through its load balancers, and what became of every stream.

Closed loop: each client streams one completion after the other, on a connection of its own each time, and tries nothing
twice. What one stream is made of stands in ``answer.py``, which release answered it in ``answering.py``, figures of
many in ``load_figures.py``.

>>> with Load(target(fleet, "chat"), clients=36) as load:
...     load.wait_until_steady()
...     change_something()
>>> lost = [record for record in load.records if not record.whole]
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import SplitResult, urlsplit

from opsctl.agent import balancer
from opsctl.errors import OpsctlError
from opsctl.fleet.model import STATISTICS_PORT, Fleet
from opsctl.fleet.placements import place
from opsctl.lab.answer import OK, Answer, Response, request
from opsctl.lab.answering import Spoken, longest, release_of
from opsctl.status import endpoints

FIRST_TOKENS = 32  # of a stream before it is known how fast they come
LEAST_TOKENS = 8
PROMPT_TOKENS = 16  # more than our prompt has, in any vocabulary
CALIBRATION_S = 5.0
LOOK_S = 0.5  # how often everything is looked at
KEPT_S = 120.0  # how long what was seen is kept for a graph
CONNECT_TIMEOUT_S = 5.0
SILENCE_S = 120.0  # a stream without a byte for so long is lost
AFTER_LOSS_S = 0.5  # a client waits so long after a loss, or a dead load balancer would be asked thousands of times
LARGEST_READ = 65536


@dataclass(frozen=True)
class Target:
    """Where a service is. Servers are named as HAProxy names them: ``gpu-1.chat.0``."""

    service: str
    urls: tuple[str, ...]  # of the load balancers: http://10.0.0.2:8000/v1
    servers: Mapping[str, tuple[str, int]]  # address and port of each engine
    statistics: tuple[str, ...] = ()  # http://10.0.0.2:8404/;csv


def target(fleet: Fleet, service: str) -> Target:
    """The target that a fleet describes.

    Raises:
        UsageError: there is no such service.
    """
    fleet.service(service)
    pages = tuple(f"http://{host.management_address}:{STATISTICS_PORT}/;csv" for host in fleet.group("lb"))
    return Target(service, tuple(endpoints(fleet)[service]),
                  {f"{placed.host}.{placed.instance}": (placed.address, placed.port) for placed in place(fleet)
                   if placed.service == service},
                  pages if fleet.load_balancer == "haproxy" else ())


@dataclass(frozen=True)
class Record:
    """One stream. Times are seconds since the load began; ``first_byte`` is None when there was none."""

    start: float
    first_byte: float | None
    end: float
    server: str  # empty: none answered
    release: str  # "v2-0123456789ab"; empty: not known
    wanted: int  # tokens
    tokens: int  # that the engine counted; before its last words, those that were seen
    lacking: str = ""  # why it does not count as whole

    @property
    def whole(self) -> bool:
        return not self.lacking

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def in_flight_at(self, at: float) -> bool:
        """Whether it was being answered at a moment."""
        return self.first_byte is not None and self.first_byte <= at <= self.end


@dataclass(frozen=True)
class Look:
    """One look at everything. ``pieces`` are those of text that came since the look before, by server."""

    at: float
    in_flight: Mapping[str, int]  # by server
    waiting: int  # streams that no server has answered yet
    releases: Mapping[str, str]  # what each server said last
    pieces: Mapping[str, int]
    weights: Mapping[str, int]  # per cent, as the first load balancer has it; empty when it does not say
    lost: int  # since the look before


@dataclass(eq=False)
class _Stream:
    """One that is under way."""

    wanted: int
    start: float
    answer: Answer = field(default_factory=Answer)
    first_byte: float | None = None


class Load:
    """Runs in a thread of its own; everything public may be called from any other.

    Args:
        tokens: of each stream; None: as many as take about ``seconds_per_stream`` under this very load.
        streams: how many in all; 0: until ``finish``.
    """

    def __init__(self, where: Target, *, clients: int = 36, tokens: int | None = None, seconds_per_stream: float = 5.0,
                 streams: int = 0) -> None:
        self.target = where
        self.clients = clients
        self.tokens = tokens
        self.began = time.monotonic()
        self.looks: deque[Look] = deque(maxlen=int(KEPT_S / LOOK_S))
        self._seconds_per_stream = seconds_per_stream
        self._left = streams or None
        self._finished: list[Record] = []
        self.tally: Counter[tuple[str, bool]] = Counter()  # (release, whether whole) of the streams that have ended
        self.releases: list[str] = []  # in the order in which they first answered
        self._under_way: set[_Stream] = set()
        self._spoken = {server: Spoken() for server in where.servers}
        self._weights: dict[str, int] = {}
        self._pieces: Counter[str] = Counter()
        self._most_tokens = 0  # of one request; 0: not known
        self._tokens_finished = 0
        self._pieces_finished = 0
        self._look_number = 0
        self._looked = threading.Condition()
        self._steady = threading.Event()
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._enough = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Load:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.finish()

    def start(self) -> None:
        self.began = time.monotonic()
        self._thread.start()

    def finish(self, timeout_s: float = SILENCE_S) -> None:
        """Lets every client end the stream that it is in, and waits for that. Again: nothing to do.

        Raises:
            OpsctlError: ``load.does_not_end``: streams still run after ``timeout_s``.
        """
        self.ask_to_finish()
        if not self._ended.wait(timeout_s):
            raise OpsctlError("load.does_not_end", f"{len(self._under_way)} streams did not end in {timeout_s:.0f} s.",
                              hint="they end with this process; opsctl status shows what the engines do")
        self._thread.join()
        if self._error is not None:
            raise self._error

    def ask_to_finish(self) -> None:
        """No client begins another stream. Returns at once."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._enough.set)

    def wait(self, timeout_s: float) -> bool:
        """Waits until all clients are done; False when they are not yet."""
        return self._ended.wait(timeout_s)

    def wait_until_steady(self, timeout_s: float = 60.0) -> None:
        """Waits until it is known how long streams are, and all clients have begun those.

        Raises:
            OpsctlError: ``load.not_steady``: nothing is answered.
        """
        if not self._steady.wait(timeout_s) or self._ended.is_set():
            why = "; ".join(sorted({record.lacking for record in self._finished if record.lacking})) or "no answer"
            raise OpsctlError("load.not_steady", f"{', '.join(self.target.urls)}: no steady streams after "
                              f"{timeout_s:.0f} s ({why}).", hint="opsctl status says whether the service serves")

    def wait_for_look(self, timeout_s: float = 5.0) -> None:
        """Waits until everything was looked at once more (``LOOK_S``), or the load has ended.

        Raises:
            OpsctlError: ``load.silent``: that takes too long, so this computer is too busy for the load.
        """
        with self._looked:
            number = self._look_number
            if not self._looked.wait_for(lambda: self._look_number != number or self._ended.is_set(), timeout_s):
                raise OpsctlError("load.silent", f"the load could look at nothing for {timeout_s:.0f} s.",
                                  hint="this computer is too busy for so many clients")

    @property
    def now(self) -> float:
        """Seconds since it began: the clock of records and looks."""
        return time.monotonic() - self.began

    @property
    def records(self) -> list[Record]:
        """Every stream that has ended, in the order of their ends, with the release that answered."""
        return [record if record.release else dataclasses.replace(record, release=self._release_of(record))
                for record in list(self._finished)]

    def release_now(self, server: str) -> str:
        """What a server said last."""
        return self._spoken[server].last

    def in_flight(self, server: str = "") -> int:
        """Streams that a server (any, when empty) is answering just now."""
        return sum(1 for stream in list(self._under_way) if stream.first_byte is not None
                   and server in ("", stream.answer.instance))

    def tokens_per_second(self, window_s: float) -> float:
        """Of all streams together, over the last seconds."""
        looks = list(self.looks)
        recent = [look for look in looks if look.at > self.now - window_s]
        pieces = sum(sum(look.pieces.values()) for look in recent)
        return pieces * self._tokens_per_piece / (len(recent) * LOOK_S) if recent else 0.0

    @property
    def waiting(self) -> int:
        """Streams that no server has answered yet."""
        return sum(1 for stream in list(self._under_way) if stream.first_byte is None)

    @property
    def count(self) -> int:
        """Streams that have ended."""
        return len(self._finished)

    @property
    def lost(self) -> int:
        return sum(count for (_, whole), count in list(self.tally.items()) if not whole)

    def _release_of(self, record: Record) -> str:
        spoken = self._spoken.get(record.server)
        return "" if spoken is None or record.first_byte is None else spoken.during(record.first_byte, record.end)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except BaseException as error:  # noqa: BLE001 - finish() raises it where somebody listens
            self._error = error
        finally:
            self._loop.close()
            self._ended.set()
            self._steady.set()
            with self._looked:
                self._looked.notify_all()

    async def _main(self) -> None:
        watchers: list[Coroutine[Any, Any, None]] = [
            self._look_on(), *(self._listen_to(server) for server in self.target.servers)]
        if self.target.statistics:
            watchers.append(self._follow_weights(self.target.statistics[0]))
        watchers.append(self._calibrate() if self.tokens is None else self._all_begin())
        try:
            async with asyncio.TaskGroup() as group:
                background = [group.create_task(watcher) for watcher in watchers]
                async with asyncio.TaskGroup() as clients:
                    for number in range(self.clients):
                        clients.create_task(self._client(number))
                for task in background:
                    task.cancel()
        finally:
            self._look()

    async def _client(self, number: int) -> None:
        """One after the other. Clients begin apart from each other, or all streams would end at the same moment."""
        url = urlsplit(self.target.urls[number % len(self.target.urls)])
        await self._pause(self._seconds_per_stream * number / self.clients)
        while not self._enough.is_set() and self._take():
            if not (await self._stream(url)).whole:
                await self._pause(AFTER_LOSS_S)

    def _take(self) -> bool:
        """Takes one of the streams that are still to be made."""
        if self._left is None:
            return True
        self._left -= 1
        return self._left >= 0

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(seconds):
                await self._enough.wait()

    async def _stream(self, url: SplitResult) -> Record:
        stream = _Stream(self.tokens or FIRST_TOKENS, self.now)
        self._under_way.add(stream)
        try:
            failed = await self._receive(url, stream)
        finally:
            self._under_way.discard(stream)
        answer = stream.answer
        lacking = answer.lacking(stream.wanted)
        record = Record(stream.start, stream.first_byte, self.now, answer.instance, "", stream.wanted,
                        answer.events if answer.tokens is None else answer.tokens,
                        lacking and f"{lacking}, {failed}" if failed else lacking)
        record = dataclasses.replace(record, release=self._release_of(record))
        self._finished.append(record)
        self.tally[record.release, record.whole] += 1
        self._tokens_finished += record.tokens
        self._pieces_finished += answer.events
        return record

    async def _receive(self, url: SplitResult, stream: _Stream) -> str:
        """Reads one answer to its end; returns what went wrong with the connection, in words."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(url.hostname, url.port or 80)
        except (OSError, asyncio.TimeoutError) as error:
            return _words(error)
        try:
            writer.write(request(url, self.target.service, stream.wanted))
            while not stream.answer.complete:
                async with asyncio.timeout(SILENCE_S):
                    data = await reader.read(LARGEST_READ)
                if not data:
                    return ""
                events = stream.answer.events
                stream.answer.feed(data)
                if stream.first_byte is None:
                    stream.first_byte = self.now
                self._pieces[stream.answer.instance] += stream.answer.events - events
        except (OSError, asyncio.TimeoutError, ValueError) as error:
            return _words(error)
        finally:
            writer.close()
        return ""

    async def _all_begin(self) -> None:
        """Waits until every client has had its turn to begin."""
        await self._pause(self._seconds_per_stream)
        self._steady.set()

    async def _calibrate(self) -> None:
        """Keeps streams as long as they should be, by what all clients together get in a few seconds."""
        await self._pause(self._seconds_per_stream)  # now all have begun
        while not self._enough.is_set():
            before, since = self._tokens_so_far(), self.now
            await self._pause(CALIBRATION_S)
            per_second = (self._tokens_so_far() - before) / (self.now - since)
            wanted = tokens_for(self._seconds_per_stream, per_second, self.clients, self._most_tokens)
            if self.tokens is None:
                self.tokens = wanted
                await self._all_begin()
            self.tokens += round((wanted - self.tokens) / 4)  # slowly: a short silence says nothing of the next stream

    def _tokens_so_far(self) -> float:
        return self._tokens_finished + self._tokens_per_piece * sum(one.answer.events for one in self._under_way)

    @property
    def _tokens_per_piece(self) -> float:
        return self._tokens_finished / self._pieces_finished if self._pieces_finished else 1.0

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._look()

    def _look(self) -> None:
        answered = Counter(one.answer.instance for one in self._under_way if one.first_byte is not None)
        since = self.looks[-1].at if self.looks else 0.0
        lost = 0
        for record in reversed(self._finished):
            if record.end <= since:
                break
            lost += not record.whole
        self.looks.append(Look(
            self.now, dict(answered), sum(one.first_byte is None for one in self._under_way),
            {server: spoken.last for server, spoken in self._spoken.items()}, dict(self._pieces), dict(self._weights),
            lost))
        self._pieces.clear()
        with self._looked:
            self._look_number += 1
            self._looked.notify_all()

    async def _listen_to(self, server: str) -> None:
        """Asks one engine which release it is, now and then."""
        address, port = self.target.servers[server]

        def note(models: bytes) -> None:
            release = release_of(models, self.target.service)
            if release:
                self._spoken[server].add(self.now, release)
                if release not in self.releases:
                    self.releases.append(release)
            self._most_tokens = longest(models) or self._most_tokens

        await self._ask_on(f"http://{address}:{port}/v1/models", note)

    async def _follow_weights(self, page: str) -> None:
        def note(statistics: bytes) -> None:
            found = balancer.servers(statistics.decode())
            self._weights = {row["server"]: row["weight"] if row["status"].startswith(("UP", "DRAIN", "NOLB")) else -1
                             for row in found if row["service"] == self.target.service}

        await self._ask_on(page, note)

    async def _ask_on(self, url: str, note: Callable[[bytes], None]) -> None:
        """Asks a page twice a second for ever; one that does not answer, or in other words, is asked again.

        Not by ``wait_for``: when the page fails in the moment of the cancellation, that forgets to be cancelled.
        """
        where = urlsplit(url)
        while True:
            with contextlib.suppress(OSError, asyncio.TimeoutError, ValueError, KeyError, TypeError):
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    note(await _get(where))
            await asyncio.sleep(LOOK_S)


def tokens_for(seconds: float, per_second: float, clients: int, most: int) -> int:
    """How many tokens a stream has that takes ``seconds`` when all ``clients`` together get ``per_second``.

    ``most``: of one request, prompt included; 0: not known.
    """
    wanted = max(LEAST_TOKENS, round(per_second * seconds / clients))
    return max(LEAST_TOKENS, min(wanted, most - PROMPT_TOKENS)) if most else wanted


async def _get(url: SplitResult) -> bytes:
    """The body of one page.

    Raises:
        OSError: no connection. ValueError: the answer is not one, or not 200.
    """
    response = Response()
    reader, writer = await asyncio.open_connection(url.hostname, url.port or 80)
    try:
        writer.write(f"GET {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n\r\n".encode())
        response.feed(await reader.read(-1))
    finally:
        writer.close()
    if response.status != OK:
        raise ValueError(f"HTTP {response.status}")
    return bytes(response.text)


def _words(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "nothing more came"
    if isinstance(error, OSError) and error.errno:  # asyncio writes sentences of its own into strerror
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__
