"""What a load looks like at a moment, as plain data: a view draws it. Pure, but for ``take``, which asks a ``Load``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opsctl.lab.load import LOOK_S, Load, Look

RATE_WINDOW_S = 5.0
NO_WEIGHT = -1  # of a server that gets no requests because it is not up


@dataclass(frozen=True)
class Column:
    """A slice of time. ``by_release`` and ``waiting`` are streams, on average; ``by_server`` is (release, streams)."""

    by_release: Mapping[str, float]
    waiting: float
    lost: int
    by_server: Mapping[str, tuple[str, float]]


@dataclass(frozen=True)
class Picture:
    """One moment, and what came before it."""

    service: str
    clients: int
    tokens: int | None  # of a stream; None: not known yet
    seconds: float
    looks: tuple[Look, ...]
    servers: tuple[str, ...]
    releases: tuple[str, ...]  # in the order in which they first answered
    tally: Mapping[tuple[str, bool], int]
    per_second: float  # tokens, all together

    @property
    def whole(self) -> int:
        return sum(count for (_, whole), count in self.tally.items() if whole)

    @property
    def lost(self) -> int:
        return sum(count for (_, whole), count in self.tally.items() if not whole)

    @property
    def look(self) -> Look | None:
        return self.looks[-1] if self.looks else None

    def in_flight(self) -> Counter[str]:
        """Streams by release, now."""
        return Counter() if self.look is None else by_release(self.look)


def take(load: Load) -> Picture:
    """The picture of a load just now."""
    looks = tuple(load.looks)
    return Picture(load.target.service, load.clients, load.tokens, load.now, looks, tuple(load.target.servers),
                   tuple(load.releases), dict(load.tally), load.tokens_per_second(RATE_WINDOW_S))


def by_release(look: Look) -> Counter[str]:
    """Streams in flight by release; of an instance that has not said which, under an empty name."""
    count: Counter[str] = Counter()
    for server, streams in look.in_flight.items():
        count[look.releases.get(server, "")] += streams
    return count


def state(look: Look, server: str) -> str:
    """``serving``, ``draining``, ``drained``, ``at 50 %``, ``down``; empty when the load balancer does not say."""
    weight = look.weights.get(server)
    if weight is None:
        return ""
    if weight == NO_WEIGHT:
        return "down"
    if weight == 0:
        return "draining" if look.in_flight.get(server) else "drained"
    return "serving" if weight >= 100 else f"at {weight} %"


def looks_a_column(width: int, seconds: float) -> int:
    """So many that ``width`` columns show at least the last ``seconds``."""
    return max(1, math.ceil(seconds / LOOK_S / width))


def columns(looks: Sequence[Look], servers: Sequence[str], width: int, size: int) -> list[Column]:
    """The last ``width`` slices of ``size`` looks each. They begin at fixed times, so that nothing flickers."""
    slices: dict[int, list[Look]] = {}
    for look in looks:
        slices.setdefault(round(look.at / LOOK_S) // size, []).append(look)
    return [_column(slices[number], servers) for number in sorted(slices)[-width:]]


def _column(looks: Sequence[Look], servers: Sequence[str]) -> Column:
    streams: Counter[str] = Counter()
    for look in looks:
        streams += by_release(look)
    return Column({release: count / len(looks) for release, count in streams.items()},
                  sum(look.waiting for look in looks) / len(looks), sum(look.lost for look in looks),
                  {server: (looks[-1].releases.get(server, ""),
                            sum(look.in_flight.get(server, 0) for look in looks) / len(looks)) for server in servers})
