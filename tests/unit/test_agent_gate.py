"""The gate: what answers mean, by tables; and what it makes of engines that misbehave, over real HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_kit import Engine, engine

from opsctl.agent import gate, probes
from opsctl.agent.gate import (
    CHAT_LENGTH,
    LENGTH,
    PROMPT,
    SPEED_LENGTH,
    Baseline,
    Check,
    Report,
    Target,
    overall,
    read_stream,
    speed,
    speed_length,
    stream,
)
from opsctl.agent.guard.slowed import by_what
from opsctl.agent.probes import Answer, Exchange, Patience
from opsctl.agent.settings import Placement
from opsctl.serving import adapters
from opsctl.serving.llamacpp import LLAMACPP, SERVER

NAME = "chat@v2-0123456789ab"
IMPATIENT = Patience(silence_s=1.0, total_s=4.0)
H, U, I = "healthy", "unhealthy", "inconclusive"  # noqa: E741 - a table is read across


# Judgement. Pure.


@pytest.mark.parametrize(("verdicts", "verdict"), [
    ([H, H], H), ([H, I], I), ([I, U, H], U), ([U], U), ([], I),
])
def test_unhealthy_beats_inconclusive_beats_healthy(verdicts: list[Any], verdict: str) -> None:
    assert overall([Check("x", one) for one in verdicts]) == verdict


@pytest.mark.parametrize(("status", "verdict"), [(200, H), (503, I), (429, I), (500, U), (404, U), (0, U)])
def test_health(status: int, verdict: str) -> None:
    assert gate.health(Answer(status)).verdict == verdict


@pytest.mark.parametrize(("answer", "verdict"), [
    (Answer(200, json.dumps({"data": [{"id": "chat", "aliases": ["chat", NAME]}]})), H),  # llama.cpp
    (Answer(200, json.dumps({"data": [{"id": "chat"}, {"id": NAME, "root": "/x"}]})), H),  # vLLM
    (Answer(200, json.dumps({"data": [{"id": "chat@v1-0123456789ab"}]})), U),
    (Answer(200, "<html>"), U), (Answer(503), I), (Answer(0), U), (Answer(401), U),
])
def test_identity(answer: Answer, verdict: str) -> None:
    assert gate.identity(answer, NAME).verdict == verdict


def whole(document: Any, status: int = 200) -> Exchange:
    return Exchange(status, ((0.1, json.dumps(document).encode()),))


def said(tokens: Any = LENGTH, **choice: Any) -> Any:
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


@pytest.mark.parametrize(("exchange", "verdict"), [
    (whole(said(text="x")), H),
    (whole(said(text="")), U), (whole(said(LENGTH - 1, text="x")), U), (whole(said(LENGTH + 1, text="x")), U),
    (whole(said("32", text="x")), U), (whole({"choices": []}), U), (whole([]), U), (whole(None), U),
    (Exchange(200, ((0.1, b"garbage"),)), U), (Exchange(200), U),
    (whole({}, 503), I), (whole({}, 429), I), (whole({}, 500), U), (whole({}, 400), U),
    (Exchange(0, problem="silent for 60 s"), U),
    (Exchange(200, ((0.1, json.dumps(said(text="x")).encode()),), "not done after 300 s"), U),
])
def test_a_completion(exchange: Exchange, verdict: str) -> None:
    assert gate.completion(exchange).verdict == verdict


@pytest.mark.parametrize(("exchange", "verdict"), [
    (whole(said(CHAT_LENGTH, message={"content": "x"})), H),
    (whole(said(CHAT_LENGTH, message={"content": None, "reasoning_content": "x"})), H),
    (whole(said(CHAT_LENGTH - 1, message={"content": "x"})), U), (whole({}, 400), U), (whole({}, 503), I),
])
def test_a_chat_completion(exchange: Exchange, verdict: str) -> None:
    assert gate.chat(exchange).verdict == verdict


def event(**document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


TOKEN = event(choices=[{"text": "x", "finish_reason": None}])
LAST = event(choices=[{"text": "", "finish_reason": "length"}], usage={"completion_tokens": 3})  # llama.cpp
USAGE = event(choices=[], usage={"completion_tokens": 3})  # vLLM
DONE = b"data: [DONE]\n\n"


def batches(*data: bytes) -> Exchange:
    """One a second."""
    return Exchange(200, tuple((float(second), one) for second, one in enumerate(data, 1)))


@pytest.mark.parametrize(("exchange", "verdict", "detail"), [
    (batches(TOKEN, TOKEN, LAST, DONE), H, "3 tokens"),
    (batches(TOKEN, TOKEN, TOKEN, USAGE, DONE), H, "3 tokens"),
    (batches(TOKEN + TOKEN[:20], TOKEN[20:] + TOKEN + USAGE + DONE), H, "3 tokens"),  # events as they are cut
    (batches(b": comment\n\n" + TOKEN, b"event: x\n" + TOKEN, b"data:" + TOKEN[6:], USAGE, DONE), H, "3 tokens"),
    (batches(TOKEN, TOKEN, LAST), U, "[DONE]"), (batches(TOKEN, TOKEN, LAST, DONE[:-5]), U, "[DONE]"),
    (batches(TOKEN, TOKEN, TOKEN, DONE), U, "no count of tokens"),
    (batches(TOKEN, event(choices=[], usage={"completion_tokens": 2}), DONE), U, "2 tokens, asked for 3"),
    (batches(event(choices=[{"text": ""}]), USAGE, DONE), U, "no text"),
    (batches(b"data: garbage\n\n", DONE), U, "no completion"),
    (batches(b"data: []\n\n", DONE), U, "no completion"),
    (batches(event(choices=[{"delta": {"content": "x"}}]), DONE), U, "no completion"),  # of another path
    (batches(TOKEN, event(error={"message": "out of memory"}), DONE), U, "out of memory"),
    (batches(b"<html>"), U, "[DONE]"), (Exchange(200), U, "[DONE]"),
    (Exchange(503), I, "503"), (Exchange(500), U, "500"), (Exchange(0), U, "no answer"),
    (Exchange(200, ((1.0, TOKEN),), "the connection failed"), U, "failed"),
])
def test_a_stream(exchange: Exchange, verdict: str, detail: str) -> None:
    found = stream(exchange, 3)
    assert (found.verdict, detail in found.detail) == (verdict, True), found


@pytest.mark.parametrize(("exchange", "rate"), [
    (batches(TOKEN, TOKEN, TOKEN, USAGE, DONE), 3 / 3),  # a count of tokens alone is no part of the answer
    (batches(b"", b"", TOKEN, TOKEN, LAST, DONE), 3 / 5),  # what the prompt took counts too
    (batches(b"", TOKEN + TOKEN + TOKEN + USAGE + DONE), 3 / 2),  # the reader was late: no burst is a speed
    (Exchange(200, ((2.0, TOKEN + TOKEN), (2.0005, TOKEN + USAGE + DONE))), 3 / 2.0005),
    (batches(TOKEN, TOKEN), None), (batches(USAGE, DONE), None), (Exchange(200), None),
])
def test_tokens_per_second(exchange: Exchange, rate: float | None) -> None:
    assert read_stream(exchange).rate == rate


@pytest.mark.parametrize(("samples", "disturbed", "before", "percent", "verdict"), [
    ([50.0], 0, 100.0, 50, H), ([49.9], 0, 100.0, 50, U),
    ([10.0, 20.0, 60.0], 0, 100.0, 50, H),  # the best counts
    ([10.0, 20.0, 30.0], 0, 100.0, 50, U),
    ([], 3, 100.0, 50, I), ([10.0], 2, 100.0, 50, I), ([60.0], 2, 100.0, 50, H), ([], 0, 100.0, 50, I),
    ([1.0], 0, None, 50, H), ([], 3, None, 50, H),  # nothing to compare it with
    ([1.0], 0, 100.0, 0, H), ([], 3, 100.0, 0, H),
    ([150.0], 0, 100.0, 200, U),
])
def test_the_speed(samples: list[float], disturbed: int, before: float | None, percent: int, verdict: str) -> None:
    assert speed(samples, disturbed, Baseline(before), percent).verdict == verdict


@pytest.mark.parametrize(("samples", "verdict"), [([10.0], I), ([60.0], H)])
def test_a_release_is_not_blamed_for_heat(samples: list[float], verdict: str) -> None:
    found = speed(samples, 0, Baseline(100.0), 50, "the guard holds GPU 3 at 690 MHz")
    assert found.verdict == verdict
    assert ("690 MHz" in found.detail) == (verdict == I)


@pytest.mark.parametrize(("gpu", "words"), [
    ({}, ""), ({"clock_limit_mhz": 690}, "the guard holds GPU 3 at 690 MHz"),
    ({"power_limit_set_w": 245}, "the guard holds GPU 3 at 245 W"),
    ({"reasons": ["power cap", "hardware thermal slowdown"]}, "GPU 3: hardware thermal slowdown"),
    ({"clock_limit_mhz": 690, "instance": "chat.1"}, ""),
])
def test_what_slows_an_instance(gpu: dict[str, Any], words: str) -> None:
    one = {"instance": "chat.0", "index": 3, "clock_limit_mhz": None, "power_limit_set_w": None, "reasons": [], **gpu}
    assert by_what({"words": "", "gpus": [one]}, "chat.0") == words
    assert by_what({"words": "the guard said nothing", "gpus": [one]}, "chat.0") == ""
    assert by_what(None, "chat.0") == ""


@pytest.mark.parametrize(("context", "length"), [(0, SPEED_LENGTH), (4096, SPEED_LENGTH), (64, 32), (20, 1)])
def test_a_small_context_is_not_overrun(context: int, length: int) -> None:
    assert speed_length(context) == length


def test_what_is_asked_for_fits_the_smallest_context() -> None:
    (smallest,) = [option.minimum for option in LLAMACPP.options if option.name == "max_model_len"]
    for length in (LENGTH, CHAT_LENGTH, speed_length(int(smallest))):
        assert len(PROMPT) + 2 + length <= smallest  # a token a letter, and what a tokenizer adds
    assert "llamacpp" in adapters()


def test_what_kept_it_from_passing() -> None:
    checks = [Check("a", H, "fine"), Check("b", I, "busy"), Check("c", I, "later")]
    assert gate.wrong(checks) == "b: busy; c: later"
    assert gate.wrong([*checks, Check("d", U, "short")]) == "d: short"


# Engines that misbehave, over HTTP.


def ask(one: Engine, baseline: Baseline | None = None, percent: int = 50) -> Report:
    return gate.check(target(one), baseline or Baseline(), percent, patience=IMPATIENT, pause=lambda _: None)


def target(one: Engine) -> Target:
    return Target(one.placement, LLAMACPP, NAME)


def test_a_well_one_passes_and_its_speed_is_told() -> None:
    with engine(names=("chat", NAME)) as one:
        report = ask(one, Baseline(None, chat=True))
        assert [(check.name, check.verdict) for check in report.checks] == [
            ("health", H), ("identity", H), ("completion", H), ("chat", H), ("stream", H), ("speed", H)]
        assert (report.verdict, report.chat) == (H, True)
        assert report.tokens_per_second is not None
        assert report.tokens_per_second > 10
        (path, body) = one.moods.asked[0]
        assert (path, body["model"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == (
            "/v1/completions", NAME, LENGTH, True, 0)


def test_chat_is_asked_only_where_the_release_before_answered_one() -> None:
    with engine(names=(NAME,), chat=400) as one:
        assert ask(one).verdict == H
        assert not [path for path, _ in one.moods.asked if "chat" in path]
        assert ask(one, Baseline(None, chat=True)).verdict == U


@pytest.mark.parametrize(("moods", "check", "verdict"), [
    ({"health": 503}, "health", I), ({"health": 500}, "health", U),
    ({"names": ("chat@v1-0123456789ab",)}, "identity", U),
    ({"lacks": 1}, "completion", U), ({"text": ""}, "completion", U), ({"garbage": b"<html>"}, "identity", U),
    ({"completions": 500}, "completion", U), ({"completions": 429}, "completion", I),
    ({"completions": 503}, "stream", I), ({"completions_later": 2}, "completion", H),
    ({"done": False}, "stream", U), ({"usage": False}, "stream", U), ({"error": True}, "stream", U),
    ({"breaks": True}, "stream", U), ({"chunks_of": 8}, "stream", H),
    ({"token_s": 0.05}, "stream", U),  # 128 of them take longer than anybody waits
])
def test_one_that_misbehaves(moods: dict[str, Any], check: str, verdict: str) -> None:
    with engine(**{"names": (NAME,), **moods}) as one:
        report = ask(one)
        found = {each.name: each for each in report.checks}
        assert found[check].verdict == verdict, report.checks
        assert report.verdict == verdict
        assert verdict == H or found[check].detail


def test_one_that_trickles_is_not_waited_for() -> None:
    with engine(names=(NAME,), trickles_s=0.2) as one:
        assert ask(one).checks[-1].detail == f"not done after {IMPATIENT.total_s:.0f} s"


def test_no_more_is_asked_for_than_its_context_holds() -> None:
    with engine(names=(NAME,)) as one:
        gate.check(replace(target(one), context=64), Baseline(), 50, patience=IMPATIENT)
        assert [body["max_tokens"] for _, body in one.moods.asked if body.get("stream")] == [32]


def test_garbage_in_a_completion() -> None:
    with engine(names=(NAME,)) as one:
        one.moods.asked = _Spoil(one)  # type: ignore[assignment]
        report = ask(one)
        assert report.checks[-1].name == "completion"
        assert "garbage" in report.checks[-1].detail


class _Spoil(list[Any]):
    """From the first completion on."""

    def __init__(self, one: Engine) -> None:
        super().__init__()
        self._one = one

    def append(self, value: Any) -> None:
        super().append(value)
        self._one.moods.garbage = b"garbage"


def test_one_that_hangs_is_given_up() -> None:
    with engine(names=(NAME,), hangs=threading.Event()) as one:
        report = ask(one)
        assert (report.checks[-1].name, report.verdict) == ("completion", U)
        assert "silent" in report.checks[-1].detail


def test_one_that_is_gone() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = Engine(None, free.getsockname()[1])  # type: ignore[arg-type]
        report = ask(gone)
    assert [check.verdict for check in report.checks] == [U]


def test_the_first_unhealthy_answer_ends_it() -> None:
    with engine(names=(), health=500) as one:
        assert [check.name for check in ask(one).checks] == ["health"]
        assert one.moods.asked == []


def test_one_that_is_too_slow() -> None:
    with engine(names=(NAME,)) as one:
        report = ask(one, Baseline(10_000.0))
        assert (report.checks[-1].name, report.verdict) == ("speed", U)
        assert len([body for _, body in one.moods.asked if body.get("stream")]) == gate.TRIES
        assert ask(one, Baseline(10_000.0), percent=1).verdict == H
        assert ask(one, Baseline(10_000.0), percent=0).verdict == H
        assert ask(one).verdict == H


def test_it_waits_between_two_tries_that_were_too_slow() -> None:
    waited: list[float] = []
    with engine(names=(NAME,)) as one:
        gate.check(target(one), Baseline(1e9), 50, patience=IMPATIENT, pause=waited.append)
        assert waited == [gate.PAUSE_S] * (gate.TRIES - 1)
        waited.clear()
        gate.check(target(one), Baseline(), 50, patience=IMPATIENT, pause=waited.append)
        assert waited == []


def test_requests_of_others_make_its_speed_inconclusive() -> None:
    with engine(names=(NAME,), running=1) as one:
        assert ask(one, Baseline(1e9)).verdict == I
        assert ask(one).verdict == H  # no speed is wanted


def test_one_that_says_later_for_ever_does_not_pass() -> None:
    with engine(names=(NAME,), completions=503) as one:
        report = ask(one, Baseline(1000.0))
        assert report.verdict == I
        assert len(one.moods.asked) == 2 * gate.TRIES


def test_the_release_before_is_measured_the_same_way() -> None:
    with engine(names=(NAME,)) as one:
        found = gate.measure(target(one), patience=IMPATIENT, pause=lambda _: None)
        assert found.tokens_per_second is not None
        assert found.chat
        one.moods.chat = 400
        assert not gate.measure(target(one), patience=IMPATIENT, pause=lambda _: None).chat
        one.moods.running = 1
        assert gate.measure(target(one), patience=IMPATIENT, pause=lambda _: None).tokens_per_second is None
        one.moods.completions = 500
        assert gate.measure(target(one), patience=IMPATIENT, pause=lambda _: None) == Baseline()


# The real engine.


@pytest.fixture(scope="module")
def llamacpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Placement]:
    tried = subprocess.run([sys.executable, "-c", "import xllamacpp"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"the engine does not load here: {tried.stderr.strip().splitlines()[-1]}")
    from opsctl.lab.model import write_model

    model: Path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_model(model, "small")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-I", SERVER, "--model", model, "--address", "127.0.0.1", "--port", str(port),
         "--name", "chat", "--name", NAME, "--parallel", "4", "--max-model-len", "64", "--threads", "1"],
        stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("serving")
    yield Placement("chat.0", "chat", 0, "127.0.0.1", port)
    process.kill()
    process.wait()


def test_the_real_engine_passes(llamacpp: Placement) -> None:
    """In the smallest context that a release may have."""
    real = Target(llamacpp, LLAMACPP, NAME, 64)
    baseline = gate.measure(real)
    assert baseline.tokens_per_second is not None
    assert baseline.chat
    report = gate.check(real, replace(baseline, tokens_per_second=baseline.tokens_per_second / 10), 50)
    assert report.verdict == H, report.checks
    assert report.tokens_per_second is not None
    assert not sum(count or 0 for count in probes.in_flight(llamacpp, LLAMACPP))


def test_the_real_engine_is_not_another_release(llamacpp: Placement) -> None:
    report = gate.check(Target(llamacpp, LLAMACPP, "chat@v9-0123456789ab", 64), Baseline(), 50)
    assert (report.checks[-1].name, report.verdict) == ("identity", U)


def test_the_real_engine_can_be_too_slow(llamacpp: Placement) -> None:
    report = gate.check(Target(llamacpp, LLAMACPP, NAME, 64), Baseline(1e9), 50)
    assert (report.checks[-1].name, report.verdict) == ("speed", U)


def test_other_requests_on_the_real_engine_make_its_speed_inconclusive(llamacpp: Placement) -> None:
    enough = threading.Event()

    def keep_busy() -> None:
        while not enough.is_set():
            probes.post(llamacpp, "/v1/completions", {"prompt": "a", "max_tokens": 48, "ignore_eos": True}, IMPATIENT)

    others = [threading.Thread(target=keep_busy) for _ in range(6)]  # 4 slots: some always wait
    for other in others:
        other.start()
    try:
        report = gate.check(Target(llamacpp, LLAMACPP, NAME, 64), Baseline(1e9), 50, patience=Patience(30, 60))
    finally:
        enough.set()
        for other in others:
            other.join()
    assert (report.checks[-1].name, report.verdict) == ("speed", I), report.checks
