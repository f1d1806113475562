"""How fast each GPU heats, from sensors that tell whole degrees. Keeps a few seconds of readings; no clock of its own.

A reading that flickers by one degree must not look like a loss of cooling, and a loss of cooling must be seen within a
second. So there are two looks: three seconds of readings, of which the median of all pairs' slopes is taken
(Theil-Sen: a third of them may be nonsense), and the last second alone once it rose by three degrees in more than one
step, which neither flicker nor one wrong reading does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import median

from opsctl.agent.guard.model import Reading, Trend

KEPT_S = 3.05
LONG_S = 1.4  # the least span of the longer look
SHORT_S = 1.05
SHORT_RISE_C = 3.0
LONG_RISE_C = 2.0  # less is what a sensor of whole degrees makes of nothing
GAP_S = 2.6  # two missing seconds: what came before says nothing of now
RISING_C_PER_S = 0.05

Point = tuple[float, float, float]  # seconds, margin, where the hardware slows the GPU down


class Trends:
    """The last seconds of each GPU's margin."""

    def __init__(self) -> None:
        self._points: dict[str, tuple[str, list[Point]]] = {}  # by UUID: the margin's source, and points

    def see(self, readings: Mapping[str, Reading] | Iterable[Reading]) -> None:
        """Take readings in. One that is no younger than the last is left out; a gap begins anew."""
        for reading in readings.values() if isinstance(readings, Mapping) else readings:
            if reading.state != "ok" or reading.margin_c is None:
                continue
            source, points = self._points.get(reading.uuid, (reading.margin_source, []))
            if points and reading.at_s <= points[-1][0]:
                continue
            if source != reading.margin_source or (points and reading.at_s - points[-1][0] > GAP_S):
                points = []
            kept = [point for point in points if reading.at_s - point[0] <= KEPT_S]
            added = (reading.at_s, reading.margin_c, reading.slowdown_margin_c)
            self._points[reading.uuid] = (reading.margin_source, [*kept, added])

    def of(self, uuid: str, now_s: float) -> Trend:
        """Where it goes at ``now_s``; an empty Trend when too little or nothing young is known."""
        _, points = self._points.get(uuid, ("", []))
        if not points or not -GAP_S <= now_s - points[-1][0] <= GAP_S:
            return Trend()
        at_s, margin, slowdown = points[-1]
        slope = slope_c_per_s([(seconds, -one) for seconds, one, _ in points])
        if margin <= slowdown:
            return Trend(slope, 0.0)
        if slope is None or slope < RISING_C_PER_S:
            return Trend(slope)
        left = (margin - slowdown) / slope - max(0.0, now_s - at_s)
        return Trend(slope, max(0.0, left))


def slope_c_per_s(points: Sequence[tuple[float, float]]) -> float | None:
    """Degrees per second of (seconds, degrees), in the order of time; 0 for less than the sensor can tell. Pure."""
    if len(points) < 3 or points[-1][0] - points[0][0] < 0.4:
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
