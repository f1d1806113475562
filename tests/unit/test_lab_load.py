"""The load over real sockets: every stream is counted, what is lost with its reason, and nothing is tried twice."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from streaming_engine import Engine

from opsctl.errors import OpsctlError
from opsctl.lab.load import Load, Target, tokens_for

SERVER = "gpu-1.chat.0"
OLD, NEW = "v1-aaaaaaaaaaaa", "v2-bbbbbbbbbbbb"


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as running:
        yield running
        running.shutdown()


def at(port: int) -> Target:
    return Target("chat", (f"http://127.0.0.1:{port}/v1",), {SERVER: ("127.0.0.1", port)},
                  (f"http://127.0.0.1:{port}/;csv",))


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    waiting = threading.Event()
    for _ in range(int(seconds * 100)):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not come to that")


def test_every_stream_is_whole_and_known(engine: Engine) -> None:
    load = Load(at(engine.port), clients=6, tokens=10, seconds_per_stream=0.5, streams=40)
    load.start()
    assert load.wait(20)
    load.finish()
    assert (load.count, load.lost, engine.asked) == (40, 0, 40)
    assert {(record.server, record.release, record.tokens) for record in load.records} == {(SERVER, OLD, 10)}
    assert all(record.start <= (record.first_byte or 0.0) <= record.end for record in load.records)
    assert load.tally == {(OLD, True): 40}


@pytest.mark.parametrize(("how", "why"), [
    ("cut", "ended in the middle"),
    ("reset", "ended in the middle, connection reset by peer"),
    ("short", "7 tokens instead of 8"),
    ("busy", "HTTP 503: no instance"),
])
def test_what_is_lost_is_lost_once_with_its_reason(engine: Engine, how: str, why: str) -> None:
    engine.fails = [how, how]
    load = Load(at(engine.port), clients=2, tokens=8, seconds_per_stream=0.1, streams=10)
    load.start()
    assert load.wait(20)
    load.finish()
    assert Counter(record.lacking for record in load.records) == {why: 2, "": 8}
    assert engine.asked == 10  # none was tried again


def test_a_dead_load_balancer_loses_streams_and_is_not_hammered() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        load = Load(at(taken.getsockname()[1]), clients=3, seconds_per_stream=0.1)
        with load, pytest.raises(OpsctlError) as caught:
            load.wait_until_steady(1.2)
    assert caught.value.code == "load.not_steady"
    assert "no answer, connection refused" in caught.value.message
    assert 0 < load.count <= 3 * 4


def test_streams_in_flight_are_seen_and_end_politely(engine: Engine) -> None:
    engine.go.clear()
    load = Load(at(engine.port), clients=5, tokens=4, seconds_per_stream=0.1)
    load.start()
    until(lambda: load.in_flight(SERVER) == 5)
    assert (load.in_flight("gpu-2.chat.0"), load.in_flight(), load.waiting) == (0, 5, 0)
    now = load.now
    load.ask_to_finish()
    assert not load.wait(0.1)
    engine.go.set()
    load.finish()
    assert (load.count, load.lost, load.in_flight()) == (5, 0, 0)
    assert sum(record.in_flight_at(now) for record in load.records) == 5


def test_a_look_can_be_waited_for(engine: Engine) -> None:
    with Load(at(engine.port), clients=1, tokens=5) as load:
        for count in range(3):
            load.wait_for_look()
            assert len(load.looks) > count
    load.wait_for_look()  # it has ended: there is nothing to wait for


def test_streams_that_hang_are_told(engine: Engine) -> None:
    engine.go.clear()
    load = Load(at(engine.port), clients=2, tokens=4, seconds_per_stream=0.1)
    load.start()
    until(lambda: load.in_flight() == 2)
    with pytest.raises(OpsctlError) as caught:
        load.finish(0.2)
    assert caught.value.code == "load.does_not_end"
    engine.go.set()
    load.finish()


def test_the_length_of_a_stream_is_found(engine: Engine) -> None:
    """A token takes at least 2 ms here, whatever the load: 0.5 s are at most 250 tokens."""
    with Load(at(engine.port), clients=4, seconds_per_stream=0.5) as load:
        load.wait_until_steady(30)
        assert load.tokens is not None
        assert 60 <= load.tokens <= 300


def test_both_releases_of_a_change_are_told_apart(engine: Engine) -> None:
    with Load(at(engine.port), clients=3, tokens=5, seconds_per_stream=0.3) as load:
        until(lambda: load.tally[OLD, True] > 10)
        engine.release = NEW
        until(lambda: load.release_now(SERVER) == NEW)
        before = load.count
        until(lambda: load.count > before + 20)
    assert load.releases == [OLD, NEW]
    assert {record.release for record in load.records} >= {OLD, NEW}
    assert load.lost == 0


def test_the_load_balancers_word_is_followed(engine: Engine) -> None:
    with Load(at(engine.port), clients=1, tokens=5) as load:
        until(lambda: bool(load.looks) and load.looks[-1].weights == {SERVER: 100})
        engine.weight = 0
        until(lambda: load.looks[-1].weights == {SERVER: 0})
    assert load.looks[-1].releases == {SERVER: OLD}


@pytest.mark.parametrize(("seconds", "per_second", "clients", "most", "tokens"), [
    (5.0, 400.0, 40, 0, 50),
    (5.0, 400.0, 40, 512, 50),
    (5.0, 5000.0, 10, 512, 496),  # no request may be longer than the engine takes
    (5.0, 0.0, 40, 0, 8),
])
def test_how_long_a_stream_is(seconds: float, per_second: float, clients: int, most: int, tokens: int) -> None:
    assert tokens_for(seconds, per_second, clients, most) == tokens


def test_who_asks_a_page_can_be_cancelled_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the one in which the page fails: a load whose engines were stopped did not end."""
    async def refused(_: object) -> bytes:
        failing = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lambda: failing.done() or failing.set_exception(OSError("refused")))
        return bytes(await failing)

    async def ended(one: Load, moment: int) -> bool:
        task = asyncio.create_task(one._ask_on("http://127.0.0.1:1/", lambda _: None))
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        _, running = await asyncio.wait({task}, timeout=1)
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        one._loop.close()
        return not running

    async def all_ended() -> list[bool]:
        return [await ended(one, moment) for moment, one in enumerate(loads)]

    loads = [Load(Target("chat", (), {})) for _ in range(12)]
    monkeypatch.setattr("opsctl.lab.load._get", refused)
    monkeypatch.setattr("opsctl.lab.load.LOOK_S", 0)
    assert all(asyncio.run(all_ended()))
