"""The gate: may this engine take requests? Each check is healthy, unhealthy, or inconclusive, which never passes.

What an answer means (``health`` ... ``speed``, ``overall``) is pure and table-tested; ``check`` and ``measure`` ask the
engine on this host directly. ``/v1/completions`` for all that is counted: it works without a chat template, and
llama.cpp and vLLM answer it alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from opsctl.agent import probes
from opsctl.agent.probes import Answer, Exchange, Patience
from opsctl.agent.settings import Placement
from opsctl.serving.adapter import Adapter

Verdict = Literal["healthy", "unhealthy", "inconclusive"]

# Short: where the vocabulary is bytes every letter is a token, and the smallest context that a release may have is 64.
PROMPT = "one two"
LENGTH = 32  # tokens; an engine that ends early or does not stop does not hit it by chance, and it fits that context
CHAT_LENGTH = 16  # a template puts a hundred tokens around the prompt; that it answers at all is the question
SPEED_LENGTH = 128  # tokens; over fewer, the jitter of a fast engine's stream outweighs its speed
PROMPT_ROOM = 32  # tokens of the context that are not asked for

TRIES = 3  # at a speed, or at an engine that says "later"
PAUSE_S = 1.0
# 32 tokens in silence: below half a token a second an engine is of no use. 128 of them at that speed take 256 s.
PATIENCE = Patience(silence_s=60, total_s=300)
GET_TIMEOUT_S = 10.0
SETTLE_S = 0.1  # an engine counts a request as running for a moment after its last byte
SETTLE_TRIES = 5

LATER = (429, 503)  # "not now": says nothing about the release
NO_SPEED_WANTED = 0.0


@dataclass(frozen=True)
class Check:
    """One question and what its answer means; ``detail`` is for a person."""

    name: str
    verdict: Verdict
    detail: str = ""

    def as_document(self) -> dict[str, str]:
        return {"name": self.name, "verdict": self.verdict, "detail": self.detail}


@dataclass(frozen=True)
class Baseline:
    """What the release before showed on this instance. ``chat``: it answered a chat completion."""

    tokens_per_second: float | None = None
    chat: bool = False


@dataclass(frozen=True)
class Target:
    """An engine on this host. ``name`` is ``service@release``; ``context`` in tokens, 0 when the release says none."""

    placement: Placement
    engine: Adapter
    name: str
    context: int = 0


@dataclass(frozen=True)
class Report:
    """A gate's outcome. ``tokens_per_second`` is None when it could not be measured."""

    checks: tuple[Check, ...]
    tokens_per_second: float | None = None

    @property
    def verdict(self) -> Verdict:
        return overall(self.checks)

    @property
    def chat(self) -> bool:
        return any(check.name == "chat" and check.verdict == "healthy" for check in self.checks)


def overall(checks: Sequence[Check]) -> Verdict:
    """Unhealthy beats inconclusive beats healthy; no check at all is inconclusive. Pure."""
    verdicts = {check.verdict for check in checks}
    for verdict in ("unhealthy", "inconclusive", "healthy"):
        if verdict in verdicts:
            return verdict
    return "inconclusive"


def wrong(checks: Sequence[Check]) -> str:
    """The checks that kept a gate from passing, in words. Pure."""
    return "; ".join(f"{check.name}: {check.detail}" for check in checks if check.verdict == overall(checks))


def health(answer: Answer) -> Check:
    """Of the engine's own health path. Pure."""
    return _status("health", answer.status) or Check("health", "healthy")


def identity(answer: Answer, name: str) -> Check:
    """``/v1/models`` lists ``service@release``: what answers is what was started. Pure."""
    refused = _status("identity", answer.status)
    if refused:
        return refused
    names = probes.names_in(answer.text)
    if name in names:
        return Check("identity", "healthy", name)
    return Check("identity", "unhealthy", f"serves {', '.join(sorted(names)) or 'nothing'}, not {name}")


def completion(exchange: Exchange, length: int = LENGTH) -> Check:
    """An answer in one piece, of exactly the length that was asked for. Pure."""
    return _whole("completion", exchange, length, lambda choice: choice["text"])


def chat(exchange: Exchange) -> Check:
    """A chat completion. Its text is the model's business: one that reasons may not get beyond its thoughts. Pure."""
    return _whole("chat", exchange, CHAT_LENGTH, lambda choice: choice["message"] and "answered")


@dataclass(frozen=True)
class Stream:
    """A streamed completion, read. ``tokens`` is what the engine counted itself, None when it did not say.

    ``rate``: tokens per second, the wait for the first one included.
    """

    tokens: int | None
    text: bool
    done: bool
    rate: float | None
    problem: str = ""


def read_stream(exchange: Exchange) -> Stream:
    """Server-sent events out of the batches in which they arrived. Pure."""
    tokens: int | None = None
    text = done = False
    at: list[float] = []  # when each event with something of the answer arrived
    for seconds, event in _events(exchange.batches):
        if event == "[DONE]":
            done = True
            continue
        try:
            document = json.loads(event)
            choices = document.get("choices", [])
            text = text or any(choice["text"] for choice in choices)
            usage = document.get("usage")
            tokens = usage["completion_tokens"] if usage else tokens
        except (ValueError, KeyError, TypeError, AttributeError):
            return Stream(tokens, text, done, None, f"an event is no completion: {event[:100]}")
        if "error" in document:
            return Stream(tokens, text, done, None, f"the stream says an error: {event[:200]}")
        if choices:
            at.append(seconds)
    return Stream(tokens, text, done, _rate(tokens, at))


def stream(exchange: Exchange, length: int) -> Check:
    """A stream of exactly the length that was asked for, with its end. Pure."""
    broken = _broken("stream", exchange)
    if broken:
        return broken
    read = read_stream(exchange)
    if read.problem:
        return Check("stream", "unhealthy", read.problem)
    if not read.done:
        return Check("stream", "unhealthy", "ended without data: [DONE]")
    if read.tokens != length:
        said = "no count of tokens" if read.tokens is None else f"{read.tokens} tokens"
        return Check("stream", "unhealthy", f"{said}, asked for {length}")
    return Check("stream", "healthy", f"{length} tokens") if read.text else Check("stream", "unhealthy", "no text")


def speed(samples: Sequence[float], disturbed: int, baseline: Baseline, min_speed_percent: int, slowed: str = ""
          ) -> Check:
    """The best of the undisturbed samples (tokens per second) against the release before. Pure.

    ``disturbed``: how many others were discarded because requests of somebody else were in flight. ``slowed``: what
    else makes this host slow just now, such as heat; then the release cannot be blamed.
    """
    before = baseline.tokens_per_second
    best = max(samples, default=None)
    found = "not measured" if best is None else f"{best:.1f} tokens/s"
    if before is None or not min_speed_percent:
        return Check("speed", "healthy", f"{found}; nothing to compare it with" if before is None else
                     f"{found}; the release before {before:.1f}, any speed will do")
    against = f"{found}; the release before {before:.1f}, wanted {min_speed_percent} % of it"
    if best is not None and best >= wanted_speed(baseline, min_speed_percent):
        return Check("speed", "healthy", against)
    if disturbed:
        return Check("speed", "inconclusive", f"{against}; requests of somebody else were in flight")
    if best is None or slowed:
        return Check("speed", "inconclusive", f"{against}; {slowed}" if slowed else against)
    return Check("speed", "unhealthy", against)


def wanted_speed(baseline: Baseline, min_speed_percent: int) -> float:
    """Tokens per second; 0 when any will do. Pure."""
    if baseline.tokens_per_second is None:
        return NO_SPEED_WANTED
    return baseline.tokens_per_second * min_speed_percent / 100


def speed_length(context: int) -> int:
    """Tokens of a stream that is measured, in a context of so many tokens (0: not known). Pure."""
    return max(1, min(SPEED_LENGTH, context - PROMPT_ROOM)) if context else SPEED_LENGTH


def check(target: Target, baseline: Baseline, min_speed_percent: int, *, patience: Patience = PATIENCE,
          pause: Callable[[float], None] = time.sleep, slowed: Callable[[], str] = lambda: "") -> Report:
    """Puts every question to the engine; the first unhealthy answer ends it. ``slowed`` is asked after the speed."""
    placement = target.placement
    checks: list[Check] = []
    questions: list[Callable[[], Check]] = [
        lambda: health(probes.ask(placement, target.engine.health_path, GET_TIMEOUT_S)),
        lambda: identity(probes.ask(placement, "/v1/models", GET_TIMEOUT_S), target.name),
        lambda: completion(_complete(target, LENGTH, patience)),
    ]
    if baseline.chat:
        questions.append(lambda: chat(_chat(target, patience)))
    for question in questions:
        checks.append(_asked(question, pause))
        if checks[-1].verdict == "unhealthy":
            return Report(tuple(checks))
    streamed = _streams(target, wanted_speed(baseline, min_speed_percent), patience, pause)
    checks.append(streamed.check)
    if streamed.check.verdict != "unhealthy":
        checks.append(speed(streamed.samples, streamed.disturbed, baseline, min_speed_percent, slowed()))
    return Report(tuple(checks), max(streamed.samples, default=None))


def measure(target: Target, *, patience: Patience = PATIENCE, pause: Callable[[float], None] = time.sleep) -> Baseline:
    """What an engine shows that serves now, for the gate of the next release.

    The middle of its samples, not the best: the next release is not held against the luckiest moment of this one.
    """
    streamed = _streams(target, None, patience, pause)
    if streamed.check.verdict != "healthy":
        return Baseline()
    rate = statistics.median(streamed.samples) if streamed.samples else None
    return Baseline(rate, chat(_chat(target, patience)).verdict == "healthy")


@dataclass(frozen=True)
class _Streamed:
    check: Check
    samples: tuple[float, ...]
    disturbed: int


def _streams(target: Target, enough: float | None, patience: Patience, pause: Callable[[float], None]) -> _Streamed:
    """Streams until one was as fast as ``enough`` tokens per second, ``TRIES`` at the most; None: all of them.

    After one that was too slow it waits: whatever held the engine or this reader up may be over then.
    """
    length = speed_length(target.context)
    samples: list[float] = []
    disturbed = 0
    verdict = Check("stream", "inconclusive")
    for attempt in range(TRIES):
        if attempt and (enough is not None or disturbed or verdict.verdict == "inconclusive"):
            pause(PAUSE_S)
        before = _others(target)
        exchange = _complete(target, length, patience, stream=True)
        now = stream(exchange, length)
        if now.verdict != "inconclusive" or attempt == 0:
            verdict = now
        if now.verdict == "unhealthy":
            break
        rate = read_stream(exchange).rate
        if now.verdict == "inconclusive" or rate is None:
            continue
        if before or _others_stay(target, pause):
            disturbed += 1
            continue
        samples.append(rate)
        if enough is not None and rate >= enough:
            break
    return _Streamed(verdict, tuple(samples), disturbed)


def _others(target: Target) -> int:
    """Requests in flight that are none of ours; 0 when the engine does not say."""
    return sum(count or 0 for count in probes.in_flight(target.placement, target.engine))


def _others_stay(target: Target, pause: Callable[[float], None]) -> bool:
    for attempt in range(SETTLE_TRIES):
        if attempt:
            pause(SETTLE_S)
        if not _others(target):
            return False
    return True


def _asked(question: Callable[[], Check], pause: Callable[[float], None]) -> Check:
    found = question()
    for _ in range(TRIES - 1):
        if found.verdict != "inconclusive":
            break
        pause(PAUSE_S)
        found = question()
    return found


def _complete(target: Target, length: int, patience: Patience, *, stream: bool = False) -> Exchange:
    body: dict[str, Any] = {"model": target.name, "prompt": PROMPT, "max_tokens": length, "temperature": 0,
                            "ignore_eos": True}
    if stream:
        body.update(stream=True, stream_options={"include_usage": True})
    return probes.post(target.placement, "/v1/completions", body, patience)


def _chat(target: Target, patience: Patience) -> Exchange:
    body = {"model": target.name, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": CHAT_LENGTH,
            "temperature": 0, "ignore_eos": True}
    return probes.post(target.placement, "/v1/chat/completions", body, patience)


def _status(name: str, status: int) -> Check | None:
    if status == 200:
        return None
    if status in LATER:
        return Check(name, "inconclusive", f"HTTP {status}: not now")
    return Check(name, "unhealthy", f"HTTP {status}" if status else "no answer")


def _broken(name: str, exchange: Exchange) -> Check | None:
    if exchange.problem:
        return Check(name, "unhealthy", exchange.problem)
    return _status(name, exchange.status)


def _whole(name: str, exchange: Exchange, length: int, text_of: Callable[[Any], Any]) -> Check:
    broken = _broken(name, exchange)
    if broken:
        return broken
    try:
        document = json.loads(exchange.body)
        tokens, text = document["usage"]["completion_tokens"], text_of(document["choices"][0])
    except (ValueError, KeyError, TypeError, IndexError):
        start = exchange.body[:100].decode(errors="replace")
        return Check(name, "unhealthy", f"the answer is no completion: {start or 'nothing'}")
    if tokens != length:
        return Check(name, "unhealthy", f"{tokens} tokens, asked for {length}")
    return Check(name, "healthy", f"{length} tokens") if text else Check(name, "unhealthy", "no text")


def _events(batches: Sequence[tuple[float, bytes]]) -> list[tuple[float, str]]:
    """The data of server-sent events, each with the time at which its line was whole."""
    found: list[tuple[float, str]] = []
    rest = b""
    for seconds, data in batches:
        *lines, rest = (rest + data).split(b"\n")
        found += [(seconds, line[5:].strip().decode(errors="replace")) for line in lines if line.startswith(b"data:")]
    return found


def _rate(tokens: int | None, at: Sequence[float]) -> float | None:
    """Tokens per second from the request to the last event with something of the answer.

    Not between the events: a reader that is held up on a busy host finds many at once, and 128 tokens in half a
    millisecond are a speed that no release after it could match. The prompt is two words, so it costs next to nothing.
    """
    if not tokens or not at or at[-1] <= 0:
        return None
    return tokens / at[-1]
