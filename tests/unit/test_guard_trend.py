"""Slopes from whole degrees: a loss of cooling within a second, flicker and clock jumps never."""

from __future__ import annotations

import math
import random

import pytest

from opsctl.agent.guard.model import Reading, Trend
from opsctl.agent.guard.trend import Trends


def seen(points: list[tuple[float, float]], source: str = "margin_api") -> Trends:
    """(second, core) of a GPU whose highest operating temperature is 87."""
    trends = Trends()
    for at_s, core in points:
        trends.see({"a": Reading("a", 0, at_s, temperature_c=core, margin_c=87 - core, margin_source=source)})
    return trends


def ramp(slope: float, *, start: float = 70.3, seconds: float = 3.0, step: float = 0.25, phase: float = 0.0
         ) -> list[tuple[float, float]]:
    count = round(seconds / step) + 1
    return [(phase + n * step, math.floor(start + slope * n * step)) for n in range(count)]


@pytest.mark.parametrize("step", [0.25, 1.0])
@pytest.mark.parametrize("slope", [0.9, 1.5, 3.0, 6.5, 15.0])
def test_a_steady_rise_is_told_within_a_third(slope: float, step: float) -> None:
    for offset in range(10):
        points = ramp(slope, start=60 + offset / 10, step=step)
        trend = seen(points).of("a", points[-1][0])
        assert trend.slope_c_per_s == pytest.approx(slope, rel=0.34, abs=0.33)
        assert trend.time_to_slowdown_s == pytest.approx(max(0.0, (89 - points[-1][1]) / trend.slope_c_per_s))


def test_a_loss_of_cooling_shows_within_a_second_and_is_not_watered_down_by_the_calm_before() -> None:
    for offset in range(10):
        calm = [(n / 4, 77.0) for n in range(12)]
        trends = seen(calm + [(2.75 + n / 4, math.floor(77 + offset / 10 + 6.5 * n / 4)) for n in range(1, 4)])
        slope = trends.of("a", 3.5).slope_c_per_s
        assert slope is not None and slope > 3.5


@pytest.mark.parametrize("step", [0.25, 1.0])
def test_flicker_of_one_degree_is_no_slope(step: float) -> None:
    chance = random.Random(1)  # noqa: S311 - a repeatable run
    trends, steepest = Trends(), 0.0
    for n in range(2000):
        core = 80 + chance.choice((0, 1))
        trends.see([Reading("a", 0, n * step, margin_c=87 - core, margin_source="margin_api")])
        steepest = max(steepest, abs(trends.of("a", n * step).slope_c_per_s or 0.0))
    assert steepest == 0.0


def test_one_wrong_reading_is_no_slope() -> None:
    points = [(n / 4, 77.0) for n in range(12)]
    for core in (87.0, 57.0):
        assert (seen([*points, (3.0, core)]).of("a", 3.0).slope_c_per_s or 0.0) == pytest.approx(0, abs=0.01)
        assert (seen([*points, (3.0, core), (3.25, 77.0)]).of("a", 3.25).slope_c_per_s or 0) == 0


def test_cooling_and_standing_have_no_time_to_the_slowdown() -> None:
    assert seen(ramp(-2.0)).of("a", 3.0).time_to_slowdown_s is None
    assert seen(ramp(-2.0)).of("a", 3.0).slope_c_per_s == pytest.approx(-2, rel=0.3)
    assert seen(ramp(0.0)).of("a", 3.0) == Trend(0.0, None)


def test_beyond_the_slowdown_the_time_is_nought() -> None:
    assert seen([(0.0, 90.0)]).of("a", 0.0) == Trend(None, 0.0)


def test_the_time_runs_on_between_readings() -> None:
    trends = seen(ramp(2.0, start=75.0))
    first, later = trends.of("a", 3.0).time_to_slowdown_s, trends.of("a", 4.0).time_to_slowdown_s
    assert first is not None and later == pytest.approx(first - 1.0)


@pytest.mark.parametrize(("points", "now_s", "why"), [
    ([(0.0, 70), (0.25, 70), (3.0, 85)], 3.0, "a short gap, of a look that hung"),
    ([(0.0, 70), (1.0, 70), (1.0, 70), (2.0, 70)], 2.0, "the same reading twice"),
    ([(0.0, 70), (0.25, 70), (0.5, 85)], 0.5, "one wrong reading after a start"),
    ([(0.0, 70), (1.0, 70), (10.0, 85)], 10.0, "a gap: suspended, or a reader that hung"),
    ([(100.0, 70), (101.0, 70), (5.0, 60), (102.0, 70), (103.0, 70)], 103.0, "out of order"),
    ([(0.0, 70), (1.0, 75), (2.0, 80)], 9.0, "old"),
    ([(0.0, 70), (1.0, 75), (2.0, 80)], -5.0, "a clock that went back"),
    ([(1.0, 70), (1.0, 80), (1.0, 86)], 1.0, "the same reading again"),
    ([], 1.0, "nothing"),
])
def test_jumps_of_time_make_no_slope(points: list[tuple[float, float]], now_s: float, why: str) -> None:
    trend = seen(points).of("a", now_s)
    assert (trend.slope_c_per_s or 0.0, trend.time_to_slowdown_s) == (0.0, None), why


def test_another_way_to_learn_the_margin_is_no_slope() -> None:
    trends = seen([(0.0, 60), (0.5, 60)])
    for n, margin in enumerate((4, 4, 4)):
        trends.see([Reading("a", 0, 1 + n * 0.5, margin_c=margin, margin_source="configured")])
    assert (trends.of("a", 2.0).slope_c_per_s or 0.0) == 0.0


def test_each_gpu_has_its_own() -> None:
    trends = seen(ramp(3.0))
    for n in range(13):
        trends.see([Reading("b", 1, n / 4, margin_c=30, margin_source="margin_api"), Reading("c", 2, n / 4, "lost")])
    assert trends.of("b", 3.0) == Trend(0.0, None)
    assert trends.of("c", 3.0) == Trend() == trends.of("unknown", 3.0)


@pytest.mark.parametrize("period", [1.4, 1.55, 1.6, 2.0, 2.5, 3.0, 4.0])
def test_a_reader_that_is_slow_tells_a_slope_all_the_time(period: float) -> None:
    """Else nothing climbs or starts any more, for without a slope nobody is calm."""
    shaken = random.Random(2)  # noqa: S311 - a repeatable run
    for slope in (0.0, 1.0):
        trends, at_s = Trends(), 0.0
        for n in range(40):
            at_s += period * shaken.uniform(0.9, 1.1)
            trends.see([Reading("a", 0, at_s, margin_c=60 - math.floor(slope * at_s), margin_source="margin_api")])
            for later in (0.0, period / 2, period):
                found = trends.of("a", at_s + later).slope_c_per_s
                if n >= 4:
                    assert found == pytest.approx(slope, abs=0.4)


@pytest.mark.parametrize("period", [1.6, 2.0, 3.0, 4.0])
def test_flicker_of_one_degree_is_no_slope_for_a_slow_reader(period: float) -> None:
    chance = random.Random(3)  # noqa: S311 - a repeatable run
    trends, slopes = Trends(), set()
    for n in range(500):
        margin = 7 - chance.choice((0, 1))
        trends.see([Reading("a", 0, n * period, margin_c=margin, margin_source="margin_api")])
        slopes.add(trends.of("a", n * period).slope_c_per_s)
    assert slopes == {None, 0.0}


def test_a_slow_reader_sees_a_loss_of_cooling() -> None:
    points = [(n * 2.0, 75.0) for n in range(5)] + [(10.0, 79.0), (12.0, 82.0)]
    left = seen(points).of("a", 12.0).time_to_slowdown_s
    assert left is not None and left < 6


def test_one_look_that_hung_does_not_make_a_reader_slow() -> None:
    trends = seen([(0.0, 70), (1.0, 70), (2.0, 70), (7.0, 85), (8.0, 85)])
    assert trends.of("a", 8.0) == Trend(None, None)
    assert seen([(0.0, 70), (1.0, 70), (2.0, 70)]).of("a", 4.7) == Trend()
