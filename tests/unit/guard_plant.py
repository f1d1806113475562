"""A service on the simulated plant, and what may rule its GPUs: the guard, nothing, a power cap, hysteresis. Pure.

A request is a stream of ``STREAM_S`` at full clock; a load balancer sends each new one where the number in flight over
the weight is least (HAProxy's leastconn). One GPU per instance, the first one's cooling goes bad. No evidence about
real GPUs: the plant is first-order, and its numbers are nobody's measurement.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from opsctl.agent.guard.decide import decide
from opsctl.agent.guard.model import Memory, Policy, Pool, Rung, Situation
from opsctl.agent.guard.readings import readings
from opsctl.agent.guard.trend import Trends
from opsctl.lab.gpu import plant
from opsctl.lab.gpu.plant import Drive, State
from opsctl.lab.gpu.profiles import Profile

TICK_S = 0.05
TOLD_S = 0.25  # how often the history tells
STREAM_S = 5.5  # 3 to 8 s
FULL_STREAMS = 16.0  # in flight at once, the GPU is fully busy and each gets its full speed
FAST_S, SLOW_S, NEAR_C = 0.25, 1.0, 15.0  # how often the reader looks, and from which margin on the faster
CLOCK_DELAY_S, WEIGHT_DELAY_S = 0.3, 1.0  # setter; agent check
LONGEST_STREAM_S = 8.0
DRAIN_S = 60.0  # an engine that is told to stop finishes what it has, for so long


@dataclass(frozen=True)
class Asked:
    """What rules an instance asks for."""

    share: float = 1.0  # of the highest clock
    weight: int = 100
    stop: str = ""
    start: bool = False


Rule = Callable[["Instance", float, list["Instance"]], Asked]


@dataclass
class Instance:
    """One GPU and its engine."""

    profile: Profile
    state: State
    rule: Rule
    next_look_s: float = 0.0
    power_limit_w: float = 0.0
    asked: Asked = field(default_factory=Asked)
    pending: list[tuple[float, str, float]] = field(default_factory=list)  # when, what, value
    share: float = 1.0
    weight: int = 100
    streams: float = 0.0  # in flight
    alive: bool = True
    draining_until_s: float | None = None
    drained_streams: float = 0.0  # in flight when it was told to stop
    done: float = 0.0  # streams finished
    lost: float = 0.0
    moves: int = 0
    stops: int = 0
    history: list[tuple[float, float, float]] = field(default_factory=list)  # second, core, clock share


@dataclass(frozen=True)
class Trouble:
    """The cooling of the first instance is worse by ``factor`` from ``begin_s`` to ``end_s``."""

    factor: float
    begin_s: float = 120.0
    end_s: float = 900.0


def nothing(_instance: Instance, _now_s: float, _all: list[Instance]) -> Asked:
    return Asked()


def hysteresis(low_c: float, high_c: float) -> Rule:
    """On/off: clocks at 40 % below one margin, free above the other."""
    def rule(instance: Instance, _now_s: float, _all: list[Instance]) -> Asked:
        margin = plant.margin_c(instance.profile, instance.state)
        share = 0.4 if margin < low_c else 1.0 if margin > high_c else instance.asked.share
        return Asked(share)
    return rule


class Guard:
    """The guard over one instance, as the agent runs it: look, trend, decide."""

    def __init__(self, policy: Policy | None = None, others: int | None = None) -> None:
        self.policy, self.trends, self.memory = policy or Policy(), Trends(), Memory()
        self.others = others  # None: count them
        self.rungs: list[tuple[float, Rung]] = []
        self.reasons: tuple[str, ...] = ()
        self.stop = ""

    def __call__(self, instance: Instance, now_s: float, all_of_them: list[Instance]) -> Asked:
        seen = readings([look(instance)], now_s, self.policy)
        self.trends.see(seen)
        others = sum(1 for one in all_of_them if one is not instance and one.alive and one.weight > 1)
        missing = ("GPU-0",) if instance.state.shut_down else ()
        self.memory, decision = decide(self.policy, self.memory, Situation(
            now_s, tuple(seen.values()), {uuid: self.trends.of(uuid, now_s) for uuid in seen}, 0.0, missing,
            Pool(others if self.others is None else self.others), alive=instance.alive))
        if not self.rungs or self.rungs[-1][1] != decision.rung:
            self.rungs.append((now_s, decision.rung))
        self.reasons = decision.reasons
        return Asked((decision.clock_percent or 100) / 100, 0 if decision.down else decision.weight, decision.stop,
                     decision.start)


def look(instance: Instance) -> dict[str, object]:
    """What the reader says of the GPU, for all ways to learn the margin that its profile has."""
    profile, state = instance.profile, instance.state
    core = math.floor(state.core_c)
    thresholds = {"slowdown": profile.slowdown_c, "shutdown": profile.shutdown_c,
                  "max_operating": profile.max_operating_c}
    told: dict[str, object] = {"uuid": "GPU-0", "index": 0, "state": "lost" if state.shut_down else "ok",
                               "temperature_c": core, "margin_c": plant.margin_c(profile, state),
                               "margin_source": "margin_api" if profile.t_limit else "thresholds",
                               "reasons": state.reasons, "thresholds_c": thresholds}
    if profile.t_limit:
        told["offsets_c"] = {"slowdown": profile.max_operating_c - profile.slowdown_c,
                             "shutdown": profile.max_operating_c - profile.shutdown_c, "max_operating": 0}
    if profile.memory_max_c is not None:
        thresholds["memory_max"] = profile.memory_max_c
        told["memory_temperature_c"] = math.floor(state.memory_c)
    return told


def warm(profile: Profile, load: float) -> State:
    """A GPU that has long been under a load."""
    state = plant.at_rest(profile)
    for _ in range(round(20 * max(profile.tau_s, profile.memory_tau_s))):
        state = plant.step(profile, state, Drive(load, profile.power_default_w), 0.5)
    return replace(state, hw_thermal_s=0.0, sw_thermal_s=0.0, governor=1.0)


def run(profile: Profile, trouble: Trouble, rules: list[Rule], demand: float, end_s: float, *,
        power_share: float = 1.0, phase: float = 0.0, seed: int = 0) -> list[Instance]:
    """``demand`` in instances at full clock. ``phase`` moves the looks against the trouble; ``seed`` its jitter."""
    shaken = random.Random(seed)  # noqa: S311 - a repeatable run
    load = min(1.0, demand / len(rules))
    state = warm(profile, load)
    found = [Instance(profile, state, rule, next_look_s=phase, power_limit_w=profile.power_default_w * power_share,
                      streams=FULL_STREAMS * load) for rule in rules]
    now_s = 0.0
    while now_s < end_s:
        _balance(found, demand * FULL_STREAMS / STREAM_S * TICK_S)
        for number, one in enumerate(found):
            bad = number == 0 and trouble.begin_s <= now_s < trouble.end_s
            _live(one, now_s, trouble.factor if bad else 1.0)
            if now_s >= one.next_look_s:
                _rule(one, now_s, found)
                near = plant.margin_c(profile, one.state) <= NEAR_C
                one.next_look_s = now_s + (FAST_S if near else SLOW_S) * shaken.uniform(0.95, 1.1)
        now_s += TICK_S
    return found


def _balance(found: list[Instance], arriving: float) -> None:
    """New streams, to those with the fewest in flight for their weight."""
    open_ = [one for one in found if one.alive and one.weight > 0 and one.draining_until_s is None]
    parts = 4
    for _ in range(parts if open_ else 0):
        least = min(open_, key=lambda one: one.streams / one.weight)
        least.streams += arriving / parts


def _live(one: Instance, now_s: float, cooling: float) -> None:
    """A tick of the engine and its GPU."""
    for due in [due for due in one.pending if due[0] <= now_s]:
        one.pending.remove(due)
        if due[1] == "share":
            one.share = due[2]
        else:
            one.weight = int(due[2])
    load = min(1.0, one.streams / FULL_STREAMS) if one.alive else 0.0
    locked = 0 if one.share >= 1.0 else round(one.profile.clock_sm_max_mhz * one.share)
    drive = Drive(load, one.power_limit_w, cooling, locked_max_mhz=locked)
    was_there = not one.state.shut_down
    one.state = plant.step(one.profile, one.state, drive, TICK_S)
    if one.state.shut_down:
        if was_there:
            one.lost, one.streams, one.alive = one.lost + one.streams, 0.0, False
        return
    per_s = load * FULL_STREAMS / STREAM_S
    if one.draining_until_s is not None:  # the longest ends as long after the drain began as it lasts
        per_s = max(per_s, one.drained_streams / LONGEST_STREAM_S)
    served = min(one.streams, per_s * one.state.share * TICK_S)
    one.streams -= served
    one.done += served
    if one.draining_until_s is not None and (one.streams < 0.5 or now_s >= one.draining_until_s):
        one.lost += one.streams if one.streams >= 0.5 else 0.0
        one.streams, one.alive, one.draining_until_s = 0.0, False, None
        one.stops += 1
    if round(now_s / TICK_S) % round(TOLD_S / TICK_S) == 0:
        one.history.append((now_s, one.state.core_c, one.state.share if one.alive else 0.0))


def _rule(one: Instance, now_s: float, found: list[Instance]) -> None:
    asked = one.rule(one, now_s, found)
    if asked.share != one.asked.share:
        one.pending.append((now_s + CLOCK_DELAY_S, "share", asked.share))
        one.moves += 1
    if asked.weight != one.asked.weight:
        one.pending.append((now_s + WEIGHT_DELAY_S, "weight", asked.weight))
        one.moves += 1
    one.asked = asked
    if asked.stop == "drain" and one.alive and one.draining_until_s is None:
        one.draining_until_s, one.drained_streams = now_s + DRAIN_S, one.streams
    elif asked.stop == "now" and one.alive:
        one.draining_until_s = now_s
    elif asked.start and not one.alive and not one.state.shut_down:
        one.alive = True
