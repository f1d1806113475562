"""How fast each GPU heats, from sensors that tell whole degrees. Keeps a few seconds of readings; no clock of its own.

A reading that flickers by one degree must not look like a loss of cooling, and a loss of cooling must be seen within a
second. So there are two looks: three seconds of readings, of which the median of all pairs' slopes is taken
(Theil-Sen: a third of them may be nonsense), and the last second alone once it rose by three degrees in more than one
step, which neither flicker nor one wrong reading does. A reader that needs longer for each sample is slow, not silent:
its last four readings are looked at, and what counts as a gap grows with its period.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median

from opsctl.agent.guard.model import Reading, Trend

KEPT_S = 3.05
KEPT_SLOW_S, KEPT_SLOW = 12.1, 4  # where those seconds hold too few: so many readings, of so long ago at most
FEWEST = 3  # points that make a slope
LONG_S = 1.4  # the least span of the longer look
SHORT_S = 1.05
SHORT_RISE_C = 3.0
LONG_RISE_C = 2.0  # less is what a sensor of whole degrees makes of nothing
GAP_S = 2.6  # two missing seconds: what came before says nothing of now
GAP_PERIODS = 2.1  # of a reader that is slower than that
PERIODS_SEEN = 2
RISING_C_PER_S = 0.05

Point = tuple[float, float, float]  # seconds, margin, where the hardware slows the GPU down


@dataclass(frozen=True)
class _Course:
    """One GPU's. ``gaps_s``: between its last three readings, whatever became of the points."""

    source: str
    points: tuple[Point, ...] = ()
    gaps_s: tuple[float, ...] = ()

    @property
    def gap_s(self) -> float:
        """More than this is a gap. The lesser of two counts, so that one look that hung is one."""
        period_s = min(self.gaps_s) if len(self.gaps_s) == PERIODS_SEEN else 0.0
        return min(KEPT_SLOW_S, max(GAP_S, GAP_PERIODS * period_s))


class Trends:
    """The last seconds of each GPU's margin."""

    def __init__(self) -> None:
        self._courses: dict[str, _Course] = {}  # by UUID

    def see(self, readings: Mapping[str, Reading] | Iterable[Reading]) -> None:
        """Take readings in. One that is no younger than the last is left out; a gap begins anew."""
        for reading in readings.values() if isinstance(readings, Mapping) else readings:
            if reading.state != "ok" or reading.margin_c is None:
                continue
            course = self._courses.get(reading.uuid, _Course(reading.margin_source))
            points, gaps_s = course.points, course.gaps_s
            if points:
                since_s = reading.at_s - points[-1][0]
                if since_s <= 0:
                    continue
                gaps_s = (*gaps_s, since_s)[-PERIODS_SEEN:]
                if since_s > replace(course, gaps_s=gaps_s).gap_s:
                    points = ()
            if course.source != reading.margin_source:
                points = ()
            added = (reading.at_s, reading.margin_c, reading.slowdown_margin_c)
            self._courses[reading.uuid] = _Course(reading.margin_source, _kept((*points, added)), gaps_s)

    def of(self, uuid: str, now_s: float) -> Trend:
        """Where it goes at ``now_s``; an empty Trend when too little or nothing young is known."""
        course = self._courses.get(uuid, _Course(""))
        points = course.points
        if not points or not -GAP_S <= now_s - points[-1][0] <= course.gap_s:
            return Trend()
        at_s, margin, slowdown = points[-1]
        slope = slope_c_per_s([(seconds, -one) for seconds, one, _ in points])
        if margin <= slowdown:
            return Trend(slope, 0.0)
        if slope is None or slope < RISING_C_PER_S:
            return Trend(slope)
        left = (margin - slowdown) / slope - max(0.0, now_s - at_s)
        return Trend(slope, max(0.0, left))


def _kept(points: tuple[Point, ...]) -> tuple[Point, ...]:
    last = points[-1][0]
    kept = tuple(point for point in points if last - point[0] <= KEPT_S)
    if len(kept) >= FEWEST:
        return kept
    return tuple(point for point in points[-KEPT_SLOW:] if last - point[0] <= KEPT_SLOW_S)


def slope_c_per_s(points: Sequence[tuple[float, float]]) -> float | None:
    """Degrees per second of (seconds, degrees), in the order of time; 0 for less than the sensor can tell. Pure."""
    if len(points) < FEWEST or points[-1][0] - points[0][0] < 0.4:
        return None
    last = points[-1][0]
    short = [point for point in points if last - point[0] <= SHORT_S]
    steps = [value for _, value in short]
    if len(short) >= 3 and steps[-1] - steps[0] >= SHORT_RISE_C and steps[-2] > steps[0]:
        return _theil_sen(short)
    if last - points[0][0] < LONG_S:
        return None
    slope = _theil_sen(points)
    values = [value for _, value in points]
    quiet = max(values) - min(values) < LONG_RISE_C
    return 0.0 if quiet else slope


def _theil_sen(points: Sequence[tuple[float, float]]) -> float:
    return median((b - a) / (t - s) for (s, a), (t, b) in combinations(points, 2))
