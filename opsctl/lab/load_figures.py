"""What became of the streams of a load, as figures. Pure."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opsctl.agent.manifest import split_directory_name
from opsctl.lab.load import Record


@dataclass(frozen=True)
class Row:
    """The streams that one release answered on one instance. Seconds are of whole streams, None without any."""

    release: str  # its version; empty: not known
    server: str  # empty: no instance answered
    whole: int
    lost: int
    median_s: float | None
    p95_s: float | None
    most_in_flight: int  # at one moment


@dataclass(frozen=True)
class Figures:
    rows: tuple[Row, ...]
    whole: int
    lost: int
    median_s: float | None
    p95_s: float | None
    tokens: tuple[int, int]  # of a stream: least and most
    reasons: tuple[tuple[str, str, int], ...]  # why, the instance, how many; the most frequent first

    def as_document(self) -> dict[str, Any]:
        return {"whole": self.whole, "lost": self.lost, "median_s": self.median_s, "p95_s": self.p95_s,
                "tokens": {"least": self.tokens[0], "most": self.tokens[1]}, "rows": [asdict(row) for row in self.rows],
                "reasons": [{"why": why, "server": server, "count": count} for why, server, count in self.reasons]}


def version(release: str) -> str:
    """``v2`` of ``v2-0123456789ab``: what a person calls it."""
    return split_directory_name(release)[0]


def figures(records: Sequence[Record]) -> Figures:
    """All that there is to say of some streams."""
    groups: defaultdict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.release, record.server].append(record)
    whole = [record.seconds for record in records if record.whole]
    reasons = Counter((record.lacking, record.server) for record in records if not record.whole)
    wanted = [record.wanted for record in records] or [0]
    return Figures(
        tuple(_row(release, server, group) for (release, server), group in sorted(groups.items())),
        len(whole), len(records) - len(whole), _median(whole), p95(whole), (min(wanted), max(wanted)),
        tuple((why, server, count) for (why, server), count in reasons.most_common()))


def _row(release: str, server: str, records: Sequence[Record]) -> Row:
    whole = [record.seconds for record in records if record.whole]
    return Row(version(release), server, len(whole), len(records) - len(whole), _median(whole), p95(whole),
               most_in_flight(records))


def most_in_flight(records: Sequence[Record]) -> int:
    """How many streams were being answered at the same moment, at the most."""
    steps = sorted(step for record in records if record.first_byte is not None
                   for step in ((record.first_byte, 1), (record.end, -1)))
    now = most = 0
    for _, change in steps:
        now += change
        most = max(most, now)
    return most


def _median(seconds: Sequence[float]) -> float | None:
    return round(statistics.median(seconds), 3) if seconds else None


def p95(seconds: Sequence[float]) -> float | None:
    """The nearest-rank 95th percentile; None without any."""
    return round(sorted(seconds)[-(-95 * len(seconds) // 100) - 1], 3) if seconds else None
