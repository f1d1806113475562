"""The drill on a real host: the guard's own decisions over an assumed loss of cooling, reckoned here. Pure.

Nothing is touched. The plant is a guess of first order from what the GPUs are like now; it says what the guard would
decide and when, not how hot this machine would become. Weights are taken to shed no heat, which is the bad case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsctl.agent.gpu import reasons
from opsctl.agent.guard.decide import decide
from opsctl.agent.guard.model import WORDS, Decision, Memory, Policy, Pool, Reading, Rung, Situation
from opsctl.agent.guard.trend import Trends
from opsctl.guarding.story import Story

INLET_C = 25.0
TAU_S = 8.0  # nobody has published one; the worse of the two that the guard's bench tries
IDLE = 0.15  # of the heat that is left without any work
TICK_S = 0.25
CLOSE_C = 15.0  # the reader looks four times a second from here on, else once
GOVERNOR_PER_C_S = 0.05  # the driver's own: of the clock, for each degree above the highest operating temperature
GOVERNOR_LEAST = 0.3
ENDS_S = 5.0  # an engine that is told to stop has stopped then
PATIENCE_S = 900.0
HW_SLOWDOWN, HW_THERMAL, SW_THERMAL = 0x8, 0x40, 0x20


@dataclass
class _Gpu:
    """A GPU on its way; ``told`` is its part of the guard's document."""

    told: dict[str, Any]
    start_c: float
    margin_c: float
    at_c: float
    governor: float = 1.0
    lost: bool = False

    @property
    def rise_c(self) -> int:
        """As sensors tell it, in whole degrees."""
        return math.floor(self.at_c) - math.floor(self.start_c)

    @property
    def left_c(self) -> float:
        return self.margin_c - self.rise_c


@dataclass
class _Instance:
    told: dict[str, Any]
    memory: Memory
    decision: Decision
    alive: bool = True
    ends_s: float | None = None

    def share(self) -> float:
        """Of the full heat that it makes with free clocks."""
        return 1.0 if self.alive else IDLE


def usable(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The GPUs that tell what a replay needs."""
    return [gpu for gpu in document["gpus"] if gpu["state"] == "ok" and gpu["temperature_c"] is not None
            and gpu["margin_c"] is not None]


def replay(document: Mapping[str, Any], policy: Policy, factor: float, for_s: float) -> Story:
    """What the host's guard would do while its cooling is ``factor`` times worse for ``for_s``, and then until all is
    normal again, at most ``PATIENCE_S``. ``document`` has ``usable`` GPUs."""
    gpus = [_Gpu(dict(gpu), gpu["temperature_c"], gpu["margin_c"], gpu["temperature_c"]) for gpu in usable(document)]
    instances = [_begin(one) for one in document["instances"]]
    trends, story, last_seen_s = Trends(), Story(), -1.0
    story.see(0.0, document)
    ticks = round((for_s + PATIENCE_S) / TICK_S)
    for tick in range(1, ticks + 1):
        now_s = tick * TICK_S
        bad = factor if now_s <= for_s else 1.0
        for gpu in gpus:
            _heat(gpu, bad, next((one for one in instances if one.told["instance"] == gpu.told["instance"]), None))
        close = any(gpu.left_c <= CLOSE_C for gpu in gpus)
        if not close and now_s - last_seen_s < 1.0:
            continue
        last_seen_s = now_s
        readings = {gpu.told["uuid"]: _reading(gpu, now_s) for gpu in gpus}
        trends.see(readings)
        for one in instances:
            _decide(one, document, policy, readings, trends, now_s)
        story.see(now_s, _document(document, gpus, instances, trends, now_s))
        if now_s > for_s and story.normal:
            break
    return story


def _begin(one: Mapping[str, Any]) -> _Instance:
    rung = Rung(one["rung"])
    memory = Memory(rung=rung, since_s=-float(one["since_s"]), latched=one["latched"], stopped=one["stopped"])
    return _Instance(dict(one), memory, Decision(rung, rung, one["weight"]), alive=not one["stopped"])


def _heat(gpu: _Gpu, factor: float, one: _Instance | None) -> None:
    """A tick of the plant: heat against cooling, the driver's governor, the hardware's own slowdown and its end."""
    if gpu.lost:
        gpu.at_c += (INLET_C - gpu.at_c) * TICK_S / TAU_S
        return
    exact = gpu.margin_c - (gpu.at_c - gpu.start_c)
    step = GOVERNOR_PER_C_S * exact * TICK_S
    gpu.governor = min(1.0, max(GOVERNOR_LEAST, gpu.governor + step))
    clock = gpu.governor
    if one is not None and one.decision.clock_percent is not None and one.decision.acts:
        clock = min(clock, one.decision.clock_percent / 100)
    if exact <= Reading.slowdown_margin_c:
        clock = min(clock, 0.5)
    share = (IDLE + (1 - IDLE) * clock) * (1.0 if one is None else one.share())
    target_c = INLET_C + (gpu.start_c - INLET_C) * factor * share
    gpu.at_c += (target_c - gpu.at_c) * TICK_S / TAU_S
    gpu.lost = exact <= Reading.shutdown_margin_c


def _reading(gpu: _Gpu, now_s: float) -> Reading:
    told = gpu.told
    if gpu.lost:
        return Reading(told["uuid"], told["index"], now_s, "lost")
    memory = told["memory_margin_c"]
    return Reading(told["uuid"], told["index"], now_s, temperature_c=math.floor(gpu.at_c), margin_c=gpu.left_c,
                   margin_source=told["margin_source"] or "", reasons=_bits(gpu), clock_max_mhz=told["clock_max_mhz"],
                   memory_margin_c=None if memory is None else memory - gpu.rise_c)


def _bits(gpu: _Gpu) -> int:
    if gpu.left_c <= Reading.slowdown_margin_c:
        return HW_SLOWDOWN | HW_THERMAL
    return SW_THERMAL if gpu.left_c <= 0 and gpu.governor < 1 else 0


def _decide(one: _Instance, document: Mapping[str, Any], policy: Policy, readings: Mapping[str, Reading],
            trends: Trends, now_s: float) -> None:
    mine = tuple(readings[gpu["uuid"]] for gpu in document["gpus"]
                 if gpu["instance"] == one.told["instance"] and gpu["uuid"] in readings)
    if one.ends_s is not None and now_s >= one.ends_s:
        one.alive, one.ends_s = False, None
    pool = one.told["pool"]
    situation = Situation(
        now_s, mine, {reading.uuid: trends.of(reading.uuid, now_s) for reading in mine}, 0.0,
        pool=Pool(pool["others"], pool["min_serving"], pool["words"]), alive=one.alive,
        enforcing=document["enforcing"])
    one.memory, one.decision = decide(policy, one.memory, situation)
    if one.decision.stop and one.decision.acts and one.alive and one.ends_s is None:
        one.ends_s = now_s if one.decision.stop == "now" else now_s + ENDS_S
    if one.decision.start and one.decision.acts:
        one.alive = True


def _document(document: Mapping[str, Any], gpus: list[_Gpu], instances: list[_Instance], trends: Trends, now_s: float
              ) -> dict[str, Any]:
    """As the guard would write it then."""
    return {**document, "gpus": [_gpu(gpu, instances, trends, now_s) for gpu in gpus],
            "instances": [_instance(one) for one in instances]}


def _gpu(gpu: _Gpu, instances: list[_Instance], trends: Trends, now_s: float) -> dict[str, Any]:
    trend, reading = trends.of(gpu.told["uuid"], now_s), _reading(gpu, now_s)
    held = next((one.decision.clock_percent for one in instances if one.told["instance"] == gpu.told["instance"]
                 and one.decision.acts), None)
    fastest = gpu.told["clock_max_mhz"]
    return {**gpu.told, "state": reading.state, "temperature_c": reading.temperature_c, "margin_c": reading.margin_c,
            "memory_margin_c": reading.memory_margin_c, "slope_c_per_s": trend.slope_c_per_s,
            "time_to_slowdown_s": trend.time_to_slowdown_s, "reasons": reasons.words(reading.reasons),
            "clock_limit_mhz": None if held is None or fastest is None else round(fastest * held / 100)}


def _instance(one: _Instance) -> dict[str, Any]:
    made = one.decision
    return {**one.told, "rung": int(made.rung), "word": WORDS[made.rung], "wanted": int(made.wanted),
            "weight": made.weight, "down": made.down, "clock_percent": made.clock_percent, "stop": made.stop,
            "acts": made.acts, "latched": one.memory.latched, "stopped": one.memory.stopped,
            "reasons": list(made.reasons)}


def with_pool(document: Mapping[str, Any], others: Mapping[str, int]) -> dict[str, Any]:
    """``others`` that serve, by service, where the guard has not asked its load balancers yet."""
    instances = []
    for one in document["instances"]:
        pool = dict(one["pool"])
        if pool["others"] is None and one["service"] in others:
            pool |= {"others": others[one["service"]], "words": ""}
        instances.append({**one, "pool": pool})
    return {**document, "instances": instances}


def with_load(document: Mapping[str, Any]) -> str:
    """Why a replay may show little: idle GPUs make little heat. Empty when they work."""
    busy = [gpu["utilisation_percent"] for gpu in usable(document) if gpu["utilisation_percent"] is not None]
    return ("its GPUs are nearly idle now, so worse cooling heats them little; replay it under load"
            if busy and max(busy) < 20 else "")
