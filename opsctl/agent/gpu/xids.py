"""How often each GPU reported which error (XID), and when last. Pure: times come from the caller, by the boot clock,
which nobody sets back; what is exported is worked out from it and the wall clock.

The same error comes from NVML and from the kernel's log; it counts once. Two that come from the same source are two.
``xids.tsv`` has what they are called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SAME_S = 5.0  # between the two tellings of one error
RECENT = 5  # that opsctl-host state tells of a GPU: of the last day
DAY_S = 24 * 3600.0
CLOCK_SET_S = 0.5  # less is a wall clock that is steered
WORDS = Path(__file__).with_name("xids.tsv")
UNKNOWN = "Unknown Error"


@dataclass
class Count:
    """One error of one GPU. ``at`` is the boot clock's, in seconds."""

    count: int = 0
    at: float = -math.inf
    open: dict[str, list[float]] = field(default_factory=dict)  # by source: times that the other has not told yet


class Xids:
    """Counts since the agent began; ``pci`` is the address as NVML writes it."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, int], Count] = {}
        self._last: dict[str, int] = {}
        self._offset_s = 0.0

    def settle(self, offset_s: float) -> None:
        """``offset_s`` is the wall clock's time less the boot clock's. Times stay as they are until it was set anew."""
        if abs(offset_s - self._offset_s) > CLOCK_SET_S:
            self._offset_s = offset_s

    def wall(self, at: float) -> float:
        """Seconds since 1970, by the wall clock as it goes now."""
        return at + self._offset_s

    def seen(self, source: str, pci: str, xid: int, at: float) -> bool:
        """``source`` is ``event`` or ``log``. False: the other source told of it already."""
        one = self._counts.setdefault((pci, xid), Count())
        for other, times in one.open.items():
            times[:] = [time for time in times if abs(time - at) <= SAME_S]
            if other != source and times:
                times.pop(0)
                return False
        one.open.setdefault(source, []).append(at)
        one.count += 1
        if at >= max((count.at for (where, _), count in self._counts.items() if where == pci), default=-math.inf):
            self._last[pci] = xid
        one.at = max(one.at, at)
        return True

    def of(self, pci: str) -> dict[int, Count]:
        """By number."""
        return {xid: count for (where, xid), count in sorted(self._counts.items()) if where == pci}

    def last(self, pci: str) -> int:
        """The number of the newest, 0 when there was none."""
        return self._last.get(pci, 0)

    def addresses(self) -> set[str]:
        return {pci for pci, _ in self._counts}

    def recent(self, pci: str, now: float) -> list[dict[str, float | int]]:
        """The newest first: ``{"xid", "count", "at"}``; ``now`` is the boot clock's, ``at`` seconds since 1970."""
        found = sorted(self.of(pci).items(), key=lambda item: -item[1].at)[:RECENT]
        found = [(xid, one) for xid, one in found if now - one.at <= DAY_S]
        return [{"xid": xid, "count": one.count, "at": self.wall(one.at)} for xid, one in found]


@dataclass(frozen=True)
class Grade:
    """What is known of an XID: NVIDIA's words and immediate action, and how grave it is to us."""

    words: str = UNKNOWN
    action: str = "CONTACT_SUPPORT"  # NVIDIA's word for what no row says
    severity: str = "warning"


def words_of(xid: int) -> str:
    """``GPU has fallen off the bus`` for 79; 0 is none."""
    return grade_of(xid).words


def grade_of(xid: int) -> Grade:
    """Of one that nobody knows: never dropped, a warning."""
    return _grades().get(xid, Grade())


@cache
def _grades() -> dict[int, Grade]:
    rows = [line.split("\t") for line in WORDS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    names = ("words", "action", "severity")
    return {int(xid): Grade(**{name: value for name, value in zip(names, (words, action, severity), strict=True)
                               if value != "-"}) for xid, words, action, severity, _ in rows}
