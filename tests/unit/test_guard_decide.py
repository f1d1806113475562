"""The guard's decision about one instance, against tables: what it does, when it does not, and in which words."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import replace
from typing import Any

import pytest

from opsctl.agent.guard import book
from opsctl.agent.guard.decide import decide
from opsctl.agent.guard.model import Decision, Memory, Policy, Pool, Reading, Rung, Situation, Trend

POLICY = Policy()
NORMAL, LESS, SLOWED, LEAST, STOP, STOP_NOW = Rung
NOW_S = 1000.0
SW, HW, BRAKE = 0x20, 0x48, 0x88
COOL = Trend(0.0, None)


def gpu(margin: float | None, index: int = 0, **more: Any) -> Reading:
    return Reading(f"GPU-{index}", index, NOW_S, margin_c=margin, margin_source="margin_api", temperature_c=60, **more)


def situation(*gpus: Reading, trend: Trend = COOL, others: int | None = 2, **more: Any) -> Situation:
    values: dict[str, Any] = {"now_s": NOW_S, "age_s": 0.4, "pool": Pool(others, 1, more.pop("words", "")), **more}
    return Situation(readings=gpus, trends={one.uuid: trend for one in gpus}, **values)


def at(rung: Rung, age_s: float = 100.0, **more: Any) -> Memory:
    return Memory(rung, NOW_S - age_s, **more)


def decided(memory: Memory, now: Situation, policy: Policy = POLICY) -> Decision:
    return decide(policy, memory, now)[1]


def run(memory: Memory, now: Situation, seconds: float, step: float = 1.0) -> tuple[Memory, Decision]:
    """The same situation for some seconds, each second decided anew."""
    for n in range(round(seconds / step) + 1):
        then = replace(now, now_s=now.now_s + n * step)
        memory, decision = decide(POLICY, memory, then)
    return memory, decision


@pytest.mark.parametrize(("reading", "trend", "rung"), [
    (gpu(20), COOL, NORMAL),
    (gpu(4), COOL, NORMAL),
    (gpu(3), COOL, LESS),
    (gpu(0), COOL, LESS),
    (gpu(-1), COOL, LESS),  # where the driver's own governor holds an H200: clocks are left to it
    (gpu(-2), COOL, LEAST),
    (gpu(10), Trend(6.0, 2.9), SLOWED),
    (gpu(10), Trend(6.0, 1.9), LEAST),
    (gpu(10), Trend(15.0, 0.0), LEAST),  # what was left has gone by since the reading
    (gpu(9), Trend(0.9, 12.0), NORMAL),
    (gpu(11), Trend(15.0, 0.9), NORMAL),  # a load that begins on a GPU that was cold
    (gpu(6, reasons=SW), COOL, LESS),
    (gpu(6, reasons=HW), COOL, LEAST),
    (gpu(6, reasons=BRAKE), COOL, NORMAL),  # the power brake is the building's alarm
    (gpu(6, memory_margin_c=2), COOL, LESS),
    (gpu(6, memory_margin_c=-2), COOL, SLOWED),
    (gpu(6, memory_margin_c=-4), COOL, LEAST),
    (gpu(6, memory_margin_c=-9), COOL, LEAST),
    # other limits, other ladders: T4 is slowed down at -8 and switched off at -11
    (gpu(-5, slowdown_margin_c=-8, shutdown_margin_c=-11), COOL, LESS),
    (gpu(-6, slowdown_margin_c=-8, shutdown_margin_c=-11), COOL, SLOWED),
    (gpu(-8, slowdown_margin_c=-8, shutdown_margin_c=-11), COOL, LEAST),
])
def test_down_from_normal_at_once(reading: Reading, trend: Trend, rung: Rung) -> None:
    memory, decision = decide(POLICY, at(NORMAL), situation(reading, trend=trend))
    assert (memory.rung, decision.rung, decision.wanted) == (rung, rung, rung)
    assert (decision.weight, decision.clock_percent) == {
        NORMAL: (100, None), LESS: (70, None), SLOWED: (30, 80), LEAST: (1, 35)}[rung]
    assert (decision.stop, decision.down, decision.acts) == ("", "", True)
    assert bool(decision.reasons) == (rung > NORMAL)


@pytest.mark.parametrize(("margin", "limits", "wanted"), [
    (-3, (-2, -8), LEAST), (-4, (-2, -8), STOP), (-6, (-2, -8), STOP), (-7, (-2, -8), STOP_NOW),
    (-2, (-2, -5), LEAST), (-3, (-2, -5), STOP), (-4, (-2, -5), STOP_NOW),  # L40S: a degree before its shutdown
    (-3, (-3, -5), LEAST), (-4, (-3, -5), STOP_NOW),  # B200: from slowdown to shutdown it is two degrees
])
def test_how_hot_is_hot_enough_for_a_stop(margin: float, limits: tuple[float, float], wanted: Rung) -> None:
    reading = gpu(margin, slowdown_margin_c=limits[0], shutdown_margin_c=limits[1])
    assert decided(at(LEAST), situation(reading, trend=Trend(-0.5))).wanted == wanted


def test_the_worst_gpu_moves_the_instance_and_is_named_first() -> None:
    gpus = [gpu(30, index) for index in range(8)]
    gpus[3], gpus[5] = gpu(-1, 3), gpu(2, 5)
    now = replace(situation(*gpus), trends={"GPU-3": Trend(0.9, 2.1)})
    decision = decided(at(NORMAL), now)
    assert decision.rung == SLOWED
    assert decision.reasons == (
        "GPU 3: margin -1 C, slowdown in 2.1 s at +0.9 C/s: clocks 80 %, weight 30 %.", "GPU 5: margin 2 C.")


def test_of_eight_hot_gpus_three_are_told() -> None:
    reasons = decided(at(NORMAL), situation(*(gpu(1, index) for index in range(8)))).reasons
    assert len(reasons) == 4 and reasons[-1] == "5 more of its GPUs are hot."


@pytest.mark.parametrize(("memory", "now", "stop"), [
    (at(NORMAL), {}, ""),  # first the least, so that everybody sees it
    (at(LEAST, 1.9), {}, ""),
    (at(LEAST, 2.0), {}, "drain"),
    (at(LEAST, 2.0), {"others": 0}, ""),
    (at(LEAST, 2.0), {"others": None}, ""),
    (at(LEAST, 2.0), {"enforcing": False}, ""),
    (at(LEAST, 2.0), {"alive": False}, ""),
    (at(LEAST, 2.0), {"age_s": 5.1}, ""),
    (at(LEAST, 2.0), {"missing": ("GPU-7",)}, ""),
    (at(STOP, 1.0), {}, "drain"),  # told again: the order before may have been refused
    (at(STOP, 1.0), {"others": 0}, ""),
    (at(STOP, 1.0), {"others": None}, ""),
])
def test_a_stop_needs_time_at_least_and_others_that_serve(memory: Memory, now: dict[str, Any], stop: str) -> None:
    after, decision = decide(POLICY, memory, situation(gpu(-4), **now))
    assert decision.stop == stop
    assert decision.weight == 1
    if memory.rung < STOP and not stop:
        assert after.rung <= LEAST


@pytest.mark.parametrize(("now", "words"), [
    ({"others": 0}, "Would stop, but only 0 others serve, and 1 must."),
    ({"others": 0, "words": "10.0.0.2: chat.1 has weight 1"},
     "Would stop, but only 0 others serve, and 1 must (10.0.0.2: chat.1 has weight 1)."),
    ({"others": None, "words": "http://10.0.0.2:9101/;csv: connection refused"},
     "Would stop, but the load balancer's page cannot be read: http://10.0.0.2:9101/;csv: connection refused."),
    ({"enforcing": False}, "Would stop, but only observes yet."),
])
def test_why_it_does_not_stop(now: dict[str, Any], words: str) -> None:
    decision = decided(at(LEAST, 60), situation(gpu(-5), **now))
    assert (decision.rung, decision.weight, decision.clock_percent) == (LEAST, 1, 35)
    assert words in decision.reasons


def test_what_the_least_does_not_help_is_stopped() -> None:
    still = situation(gpu(-2, reasons=HW), trend=Trend(0.0, 0.0))
    assert decided(at(LEAST, 3), still).rung == STOP
    assert decided(at(LEAST, 3), situation(gpu(-2, reasons=HW), trend=Trend(-0.5, 0.0))).rung == LEAST
    assert decided(at(LEAST, 1), still).rung == LEAST
    assert decided(at(LEAST, 3), replace(still, trends={})).rung == LEAST
    assert decided(at(LEAST, 3), situation(gpu(0), trend=Trend(0.5, 4.0))).rung == STOP  # too hot, and still heating
    assert decided(at(LEAST, 3), situation(gpu(0), trend=Trend(0.2, 10.0))).rung == LEAST
    assert decided(at(LEAST, 3), situation(gpu(1), trend=Trend(0.5, 6.0))).rung == LEAST


def test_it_kills_only_what_it_was_allowed_to_stop() -> None:
    hot = situation(gpu(-7))
    assert decided(at(NORMAL), hot).rung == LEAST
    assert decided(at(LEAST, 60), hot).stop == "drain"
    assert decided(at(STOP, 1), hot).stop == "now"
    assert decided(at(STOP, 1), replace(hot, pool=Pool(0))).stop == ""
    assert decided(at(LEAST, 60), replace(hot, pool=Pool(0))).rung == LEAST


def test_a_stopping_instance_is_down_for_load_balancers_and_one_that_may_not_stop_is_not() -> None:
    assert decided(at(LEAST, 3), situation(gpu(-4))).down == "too hot: stopping"
    assert decided(at(LEAST, 3), situation(gpu(-4), others=0)).down == ""


def test_up_a_rung_for_each_dwell_with_margin_and_no_rising_slope() -> None:
    memory, _ = run(at(LEAST), situation(gpu(8)), 29)
    assert memory.rung == LEAST
    for seconds, rung in ((30, SLOWED), (60, LESS), (90, NORMAL)):
        assert run(at(LEAST), situation(gpu(8)), seconds)[0].rung == rung
    assert run(at(LEAST), situation(gpu(7)), 300)[0].rung == LEAST
    assert run(at(LEAST), situation(gpu(8), trend=Trend(0.4, 25.0)), 300)[0].rung == LEAST
    assert run(at(LEAST), situation(gpu(8), trend=Trend()), 300)[0].rung == LEAST  # nobody knows the slope
    assert run(at(LEAST), situation(gpu(8, memory_margin_c=5)), 300)[0].rung == LEAST
    assert run(at(LEAST), situation(gpu(8, 0), gpu(7, 1)), 300)[0].rung == LEAST


def test_it_does_not_climb_to_a_rung_that_it_would_leave_at_once() -> None:
    """The driver slows the GPU down for a sensor that the margin does not know."""
    memory, _ = run(at(LESS), situation(gpu(20, reasons=SW)), 300)
    assert (memory.rung, memory.descents_s) == (LESS, ())


def test_a_time_of_nought_is_never() -> None:
    never = replace(POLICY, slowed_time_s=0.0, least_time_s=0.0)
    for left in (0.0, 0.1, 2.0):
        assert decided(at(NORMAL), situation(gpu(9), trend=Trend(9.0, left)), never).rung == NORMAL


def test_a_warm_moment_begins_the_dwell_anew() -> None:
    memory, _ = run(at(LEAST), situation(gpu(8)), 25)
    warm = replace(situation(gpu(7)), now_s=NOW_S + 26)
    memory, _ = decide(POLICY, memory, warm)
    memory, decision = run(memory, replace(situation(gpu(8)), now_s=NOW_S + 27), 29)
    assert memory.rung == LEAST
    assert "Calm for 29 s; up to slowed after 30 s." in decision.reasons


def test_slowed_is_slower_each_time_that_it_was_too_fast() -> None:
    for count, clocks in ((1, 80), (2, 65), (3, 50)):
        times = tuple(NOW_S - 60 * n for n in range(count, 0, -1))
        assert decided(at(SLOWED, descents_s=times), situation(gpu(5))).clock_percent == clocks


def flap(memory: Memory, times: int) -> Memory:
    now_s = NOW_S
    for _ in range(times):
        memory, _ = decide(POLICY, memory, replace(situation(gpu(-2)), now_s=now_s))
        for _second in range(120):
            now_s += 1
            memory, _ = decide(POLICY, memory, replace(situation(gpu(9)), now_s=now_s))
        now_s += 1
    return memory


def test_flapping_latches_until_a_person_says_so() -> None:
    """It stays at SLOWED, with clocks as low as the least: so it serves something, and cannot heat much."""
    assert (flap(at(NORMAL), 3).rung, flap(at(NORMAL), 3).latched) == (NORMAL, False)
    memory = flap(at(NORMAL), 4)
    assert (memory.rung, memory.latched) == (SLOWED, True)
    now_s = NOW_S + 500
    memory, decision = run(memory, replace(situation(gpu(30)), now_s=now_s), 600)
    assert (memory.rung, decision.weight, decision.clock_percent) == (SLOWED, 30, 35)
    assert "No way up before `opsctl guard unlatch HOST`" in " ".join(decision.reasons)
    lifted = replace(memory, latched=False)
    assert run(lifted, replace(situation(gpu(30)), now_s=now_s + 601), 60)[0].rung == NORMAL


def test_what_keeps_falling_while_it_is_latched_stays_at_the_least() -> None:
    memory = flap(at(NORMAL), 6)
    assert (memory.rung, memory.latched) == (LEAST, True)
    assert run(memory, replace(situation(gpu(30)), now_s=NOW_S + 800), 300)[0].rung == LEAST


@pytest.mark.parametrize("rung", [LESS, SLOWED])
def test_a_latched_instance_stays_where_it_is(rung: Rung) -> None:
    memory, decision = run(at(rung, latched=True), situation(gpu(40)), 600)
    assert (memory.rung, decision.rung) == (rung, rung)


def test_a_lifted_latch_does_not_fall_at_the_next_way_down() -> None:
    lifted = replace(flap(at(NORMAL), 4), latched=False)
    now_s = NOW_S + 600
    memory, _ = run(lifted, replace(situation(gpu(9)), now_s=now_s), 120)
    memory, _ = decide(POLICY, memory, replace(situation(gpu(-2)), now_s=now_s + 121))
    assert (memory.rung, memory.latched) == (LEAST, False)


def test_ways_down_that_are_far_apart_do_not_latch() -> None:
    times = tuple(NOW_S - 1801 - n for n in range(5, 0, -1))
    assert not decide(POLICY, at(NORMAL, descents_s=times), situation(gpu(-2)))[0].latched


def test_one_way_down_in_steps_is_one() -> None:
    memory = at(NORMAL)
    for n, (margin, trend) in enumerate(((3, COOL), (1, Trend(1.0, 3.0)), (-2, COOL))):
        memory, _ = decide(POLICY, memory, replace(situation(gpu(margin), trend=trend), now_s=NOW_S + n))
    assert (memory.rung, len(memory.descents_s)) == (LEAST, 1)


def test_a_latched_instance_may_be_stopped_and_is_not_started() -> None:
    memory, decision = decide(POLICY, at(LEAST, latched=True), situation(gpu(-4)))
    assert (memory.rung, decision.stop) == (STOP, "drain")
    memory, decision = run(memory, situation(gpu(40), alive=False), 300)
    assert (memory.stopped, decision.start) == (True, False)
    assert "unlatch" in " ".join(decision.reasons)


LIMITS = {"H200": (-2, -8), "T4": (-8, -11), "B200": (-3, -5)}


def goes(memory: Memory, now_s: float, model: str, course: list[tuple[int, float]]) -> tuple[Memory, Decision, float]:
    """(seconds, margin) after each other; the engine stops five seconds after it was told to, and starts when told."""
    slowdown, shutdown = LIMITS[model]
    ends_s, alive = float("inf"), not memory.stopped
    for seconds, margin in course:
        reading = gpu(margin, slowdown_margin_c=slowdown, shutdown_margin_c=shutdown)
        for _ in range(seconds * 2):
            now_s += 0.5
            alive = alive and now_s < ends_s
            now = situation(reading, trend=Trend(-0.1), alive=alive, now_s=now_s)
            memory, decision = decide(POLICY, memory, now)
            ends_s = min(ends_s, now_s + 5) if decision.stop else ends_s
            if decision.start:
                alive, ends_s = True, float("inf")
    return memory, decision, now_s


@pytest.mark.parametrize("model", LIMITS)
def test_a_room_that_slowly_heats_up_stops_an_instance_and_does_not_latch_it(model: str) -> None:
    slowdown = LIMITS[model][0]
    worst = {"H200": -4, "T4": -10, "B200": -4}[model]
    slowly = [(60, margin) for margin in range(6, worst, -1)] + [(20, worst)]
    memory, decision, now_s = goes(at(NORMAL), NOW_S, model, slowly)
    assert (memory.stopped, memory.latched, len(memory.descents_s)) == (True, False, 2)
    memory, decision, now_s = goes(memory, now_s, model, [(60, 15)])
    assert (memory.stopped, memory.latched, decision.down) == (False, False, "")  # the room is cool: it serves again
    cool, _, _ = goes(memory, now_s, model, [(200, 15)])
    assert cool.rung == NORMAL
    memory, _, _ = goes(memory, now_s, model, [(60, slowdown), (20, worst)])  # and a second time, at once
    assert (memory.stopped, memory.latched) == (True, True)


def test_a_second_stop_latches() -> None:
    once = at(LEAST, descents_s=(NOW_S - 10,))
    after, _ = decide(POLICY, once, situation(gpu(-4)))
    assert (after.rung, after.latched, len(after.descents_s)) == (STOP, False, 2)
    again = at(LEAST, descents_s=(*after.descents_s, NOW_S - 10))
    assert decide(POLICY, again, situation(gpu(-4)))[0].latched


def test_what_the_guard_stopped_starts_when_it_is_cool_and_climbs_from_least() -> None:
    memory, decision = run(at(STOP, 10), situation(gpu(20), alive=False), 29)
    assert (memory.stopped, decision.start, decision.stop, decision.weight) == (True, False, "", 1)
    assert decision.down == "too hot: stopped by the guard"
    memory, decision = run(at(STOP, 10), situation(gpu(20), alive=False), 30)
    assert decision.start
    memory, decision = decide(POLICY, memory, replace(situation(gpu(20)), now_s=NOW_S + 31))
    assert (memory.rung, memory.stopped, decision.start, decision.down, decision.weight) == (LEAST, False, False, "", 1)


def test_what_the_guard_stopped_stays_down_while_it_is_hot_and_is_not_stopped_again() -> None:
    memory, decision = run(at(STOP, 10), situation(gpu(2), alive=False), 300)
    assert (memory.stopped, decision.start, decision.stop) == (True, False, "")
    assert decision.reasons[0].startswith("Stopped by the guard: GPU 0 has a margin of 2 C")


def test_what_drains_stays_told_to_stop_and_what_was_never_stopped_comes_back() -> None:
    """On a higher rung nobody would start it again; but a setter that is down must not keep a cool instance away."""
    memory, decision = run(at(STOP, 1), situation(gpu(20)), 719)
    assert (memory.rung, decision.down, decision.weight) == (STOP, "too hot: stopping", 1)
    memory, decision = run(memory, replace(situation(gpu(20)), now_s=NOW_S + 720), 31)
    assert (memory.rung, memory.stopped, decision.stop, decision.down) == (SLOWED, False, "", "")


def test_the_order_to_stop_is_said_for_some_seconds_and_each_minute_while_it_is_too_hot() -> None:
    def said(margin: float, seconds: int) -> list[tuple[int, str]]:
        memory, found = at(LEAST), []
        for n in range(seconds):
            now = situation(gpu(-4 if n == 0 else margin), trend=Trend(-0.1))
            memory, decision = decide(POLICY, memory, replace(now, now_s=NOW_S + n))
            assert decision.down == "too hot: stopping"
            found += [(n, decision.stop)] if decision.stop else []
        return found

    assert said(-3, 300) == [(n, "drain") for n in range(5)]
    assert [n for n, _ in said(-5, 130)] == [*range(5), *range(60, 65), *range(120, 125)]
    assert said(-7, 50) == [(0, "drain"), *((n, "now") for n in range(1, 6))]  # it escalates at once


@pytest.mark.parametrize("drain_s", [2, 30, 655])
@pytest.mark.parametrize("observes", [False, True])
def test_a_stop_is_the_guards_however_long_it_takes_and_whatever_becomes_of_the_mode(drain_s: int, observes: bool
                                                                                    ) -> None:
    """A person goes to observe while it drains, and back when it has stopped."""
    memory, decision = decide(POLICY, at(LEAST), situation(gpu(-4)))
    assert (decision.stop, memory.told_stop_s) == ("drain", NOW_S)
    draining = replace(situation(gpu(20), enforcing=not observes), now_s=NOW_S + 1)
    memory, decision = run(memory, draining, drain_s)
    assert (memory.stopped, decision.weight) == (False, 1)
    ended = replace(situation(gpu(20), alive=False, enforcing=not observes), now_s=NOW_S + drain_s + 2)
    memory, decision = decide(POLICY, memory, ended)
    assert (memory.stopped, memory.told_stop_s, decision.down) == (True, None, "too hot: stopped by the guard")
    enforces = replace(situation(gpu(20), alive=False), now_s=NOW_S + drain_s + 3)
    assert run(memory, enforces, 30)[1].start


def test_what_long_outlived_its_order_may_climb_in_observe_mode_too() -> None:
    memory, _ = decide(POLICY, at(LEAST), situation(gpu(-4)))
    now = replace(situation(gpu(20), enforcing=False), now_s=NOW_S + 1)
    memory, decision = run(memory, now, 718)
    assert (memory.rung, decision.reasons) == (LEAST, ("Stays at least: told to stop 719 s ago.",))
    memory, _ = run(memory, replace(now, now_s=NOW_S + 720), 100)
    assert (memory.rung, memory.told_stop_s) == (NORMAL, None)
    gone = replace(now, alive=False, now_s=NOW_S + 900)
    assert not decide(POLICY, memory, gone)[0].stopped  # somebody else stopped it


def test_a_stop_that_seemed_to_fail_is_the_guards_and_one_that_was_refused_is_not() -> None:
    """The setter may be slow to answer, and systemd does it all the same; a refusal is believed."""
    before = at(LEAST, descents_s=(NOW_S - 10,))
    told, _ = decide(POLICY, before, situation(gpu(-4)))
    failed = replace(told, rung=LEAST, since_s=NOW_S + 5)
    ended = replace(situation(gpu(20), alive=False), now_s=NOW_S + 60)
    assert decide(POLICY, failed, ended)[0].stopped
    refused = replace(failed, told_stop_s=None, descents_s=before.descents_s, latched=before.latched)
    assert not decide(POLICY, refused, ended)[0].stopped
    memory, decision = run(refused, replace(situation(gpu(-4)), now_s=NOW_S + 5), 2)
    assert (memory.rung, decision.stop, len(memory.descents_s)) == (STOP, "drain", 2)  # it is tried again, and counts


def test_a_stop_under_way_lasts_through_a_restart() -> None:
    memory, _ = decide(POLICY, at(LEAST), situation(gpu(-4)))
    assert book.memory(json.loads(json.dumps(dataclasses.asdict(memory)))) == memory
    old = {"rung": 4, "since_s": NOW_S, "descents_s": [NOW_S]}  # of an agent from before
    assert decide(POLICY, book.memory(old), situation(gpu(20), alive=False))[0].stopped


def test_stops_that_are_refused_again_and_again_do_not_latch() -> None:
    memory = at(NORMAL)
    for n in range(600):
        memory, decision = decide(POLICY, memory, replace(situation(gpu(-5)), now_s=NOW_S + n))
        if decision.stop:
            memory = replace(memory, rung=LEAST, since_s=NOW_S + n, told_stop_s=None)
    assert (memory.latched, len(memory.descents_s)) == (False, 2)


def test_observing_starts_nothing_and_says_who_must() -> None:
    stopped = at(STOP, 10, stopped=True)
    memory, decision = run(stopped, situation(gpu(20), alive=False, enforcing=False), 60)
    assert (memory.stopped, decision.start) == (True, False)
    assert "start it by hand, or type `opsctl guard mode enforce`" in decision.reasons[0]
    then = replace(situation(gpu(20), alive=False), now_s=NOW_S + 61)
    assert decide(POLICY, memory, then)[1].start


def test_who_starts_a_stopped_instance_is_believed() -> None:
    memory, decision = decide(POLICY, at(STOP, 10, stopped=True), situation(gpu(2)))
    assert (memory.stopped, memory.rung, decision.stop, decision.down) == (False, LEAST, "", "")


def test_what_somebody_else_stopped_is_not_the_guards_to_start() -> None:
    memory, decision = run(at(LEAST), situation(gpu(-5), alive=False), 60)
    assert (memory.stopped, memory.rung, decision.start) == (False, LEAST, False)
    memory, decision = run(memory, replace(situation(gpu(30), alive=False), now_s=NOW_S + 61), 300)
    assert (memory.stopped, decision.start) == (False, False)


@pytest.mark.parametrize("rung", [NORMAL, LESS, SLOWED, LEAST, STOP])
@pytest.mark.parametrize(("age_s", "at_most"), [(5.1, 100), (15.0, 100), (15.1, 50), (45.1, 1), (1e9, 1)])
def test_blind_it_holds_then_halves_then_asks_for_the_least_and_touches_nothing(
        rung: Rung, age_s: float, at_most: int) -> None:
    for gpus in ((gpu(-9),), (gpu(50),), ()):
        memory = at(rung, descents_s=(NOW_S - 100,))
        now = situation(*gpus, trend=Trend(20.0, 0.1), age_s=age_s)
        after, decision = run(memory, now, 300)
        before = decided(memory, situation(gpu(7)))
        assert (after.rung, decision.rung, decision.stop, decision.start) == (rung, rung, "", False)
        assert decision.clock_percent == before.clock_percent
        assert decision.weight == min(before.weight, at_most)
        assert decision.down == ""
        assert f"for {age_s:.0f} s" in decision.reasons[0]


def test_a_young_agent_holds_the_rung_that_it_remembers() -> None:
    _, decision = decide(POLICY, at(SLOWED), situation(age_s=0.0))
    assert (decision.rung, decision.weight, decision.clock_percent) == (SLOWED, 30, 80)


def test_all_go_blind_together_and_all_still_serve() -> None:
    assert all(decided(at(rung), situation(age_s=3600.0)).weight >= 1 for rung in Rung)


@pytest.mark.parametrize(("now", "words"), [
    (situation(gpu(20, 0), Reading("GPU-3", 3, NOW_S, "lost")), "GPU 3 lost"),
    (situation(gpu(20, 0), gpu(20, 1), missing=("GPU-1",)), "GPU 1 lost"),
    (situation(gpu(20, 0), missing=("GPU-1a2b3c4d-5e6f\n#; DROP",)), "GPU-1a2b3c4d lost"),
    (situation(missing=("GPU-\u00fc",)), "GPU- lost"),
    (situation(*(Reading(f"GPU-{n}", n, NOW_S, "lost") for n in range(8))), "GPU 0, GPU 1, GPU 2 and 5 more lost"),
])
def test_a_lost_gpu_takes_the_instance_down_in_words_that_fit_one_line(now: Situation, words: str) -> None:
    memory, decision = decide(POLICY, at(LESS), now)
    assert (decision.down, decision.clock_percent, decision.stop, memory.rung) == (words, None, "", LESS)
    assert decision.down.isascii() and decision.down.isprintable() and len(decision.down) < 60


def test_an_unreadable_gpu_holds_the_instance_and_halves_it_and_the_others_still_count() -> None:
    odd = Reading("GPU-1", 1, NOW_S, "unreadable")
    memory, decision = run(at(LESS), situation(gpu(30), odd), 300)
    assert (memory.rung, decision.weight, decision.down) == (LESS, 50, "")
    assert "GPU 1 cannot be read: weight at most 50 %, no way up." in decision.reasons
    assert decided(at(NORMAL), situation(gpu(-2), odd)).rung == LEAST
    assert decided(at(NORMAL), situation(odd)).rung == NORMAL


def test_observing_weights_act_and_the_rest_is_words() -> None:
    memory, decision = decide(POLICY, at(NORMAL), situation(gpu(-2), enforcing=False))
    assert (memory.rung, decision.weight, decision.clock_percent, decision.acts) == (LEAST, 1, 35, False)
    assert decision.reasons[0].endswith("would set clocks to 35 %, weight 1 %.")
    memory, decision = run(memory, situation(gpu(-7), enforcing=False), 60)
    assert (memory.rung, decision.wanted, decision.stop) == (LEAST, STOP_NOW, "")
    assert decide(POLICY, at(STOP), situation(gpu(-7), enforcing=False))[0].rung == LEAST


def test_a_memory_of_another_boot_waits_its_dwell() -> None:
    memory = Memory(LEAST, since_s=NOW_S + 5e6, calm_since_s=NOW_S + 5e6, descents_s=(NOW_S + 5e6,) * 3)
    assert run(memory, situation(gpu(9)), 29)[0].rung == LEAST
    assert run(memory, situation(gpu(9)), 30)[0].rung == SLOWED
    assert run(replace(memory, descents_s=()), situation(gpu(-4)), 3)[0].rung == STOP


def anything(chance: random.Random) -> tuple[Memory, Situation]:
    rung = chance.choice(list(Rung))
    memory = Memory(rung, NOW_S - chance.uniform(-10, 100), chance.choice((None, NOW_S - chance.uniform(-10, 100))),
                    tuple(NOW_S - chance.uniform(-10, 3000) for _ in range(chance.randrange(5))),
                    chance.random() < 0.3, chance.random() < 0.3, chance.random() < 0.3, None,
                    chance.choice((None, NOW_S - chance.uniform(-10, 1000))))
    gpus = [Reading(f"GPU-{n}", n, NOW_S, chance.choice(("ok", "ok", "ok", "ok", "lost", "unreadable")),
                    margin_c=chance.randrange(-12, 40), memory_margin_c=chance.choice((None, chance.randrange(-9, 30))),
                    reasons=chance.choice((0, 1, SW, HW, BRAKE))) for n in range(chance.randrange(5))]
    trends = {one.uuid: Trend(chance.choice((None, chance.uniform(-20, 20))),
                              chance.choice((None, chance.uniform(0, 20)))) for one in gpus if chance.random() < 0.8}
    return memory, Situation(
        NOW_S, tuple(one if one.state == "ok" else replace(one, margin_c=None) for one in gpus), trends,
        chance.choice((0.0, 1.0, 6.0, 16.0, 50.0)), chance.choice(((), (), ("GPU-9",))),
        Pool(chance.choice((None, 0, 1, 2, 3)), chance.choice((0, 1, 2))), chance.random() < 0.8, chance.random() < 0.8)


def test_whatever_happens_some_things_never_do() -> None:
    chance = random.Random(7)  # noqa: S311 - a repeatable run
    stops = 0
    for _ in range(20_000):
        memory, now = anything(chance)
        after, decision = decide(POLICY, memory, now)
        assert 1 <= decision.weight <= 100
        assert decision.rung == after.rung
        assert decision.acts == now.enforcing
        pool = now.pool.others is not None and now.pool.others >= now.pool.min_serving
        fresh = now.age_s <= POLICY.hold_age_s
        if decision.stop:
            stops += 1
            assert pool and fresh and now.alive and now.enforcing and memory.rung >= LEAST
            assert decision.stop == "drain" or memory.rung >= STOP
        if decision.start:
            assert after.stopped and not after.latched and fresh and not now.alive and now.enforcing
        if decision.down:
            assert decision.down.isascii() and decision.down.isprintable()
            assert "lost" in decision.down or after.rung >= STOP or after.stopped
        if memory.latched and not memory.stopped and now.enforcing:
            assert after.rung >= min(memory.rung, SLOWED)
        if not fresh:
            assert after.rung >= min(memory.rung, LEAST) and not decision.stop
        assert all(words and "\n" not in words for words in decision.reasons)
    assert stops > 100  # else nothing was tried


def test_all_hosts_hot_and_nobody_stops() -> None:
    """Each sees the others' weights of a moment ago: at the least, nobody counts as serving."""
    memories, weights = [at(NORMAL) for _ in range(3)], [100, 100, 100]
    for n in range(600):
        told = list(weights)
        for host in range(3):
            others = sum(weight > 1 for at_, weight in enumerate(told) if at_ != host)
            hot = replace(situation(gpu(-7), others=others), now_s=NOW_S + n / 4)
            memories[host], decision = decide(POLICY, memories[host], hot)
            weights[host] = decision.weight
            assert (decision.stop, decision.down) == ("", "")
    assert weights == [1, 1, 1]
