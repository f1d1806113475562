"""What the reader says of the GPUs, as the guard's readings. Pure.

The margin is the one that ``gpu/sample.py`` chose (margin API, fields, thresholds); a GPU that tells none of these is
measured against the policy's ``fallback_max_operating_c``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from opsctl.agent.guard.model import Policy, Reading

SLOWDOWN_C, SHUTDOWN_C = -2.0, -8.0  # H100 and H200; for a GPU that does not say
CLOSEST_C = 1.0  # the hardware's two limits lie at least so far apart


def readings(gpus: Iterable[Mapping[str, Any]], at_s: float, policy: Policy) -> dict[str, Reading]:
    """By UUID. A GPU without UUID (lost before it ever answered) is left out: it is missing, which others say."""
    found = (_reading(gpu, at_s, policy) for gpu in gpus if gpu.get("uuid"))
    return {reading.uuid: reading for reading in found}


def _reading(gpu: Mapping[str, Any], at_s: float, policy: Policy) -> Reading:
    uuid, index, state = str(gpu["uuid"]), int(gpu.get("index", -1)), str(gpu.get("state", "ok"))
    core, thresholds = _number(gpu.get("temperature_c")), _numbers(gpu.get("thresholds_c"))
    margin, source = _number(gpu.get("margin_c")), str(gpu.get("margin_source", ""))
    if margin is None and core is not None:
        margin, source = policy.fallback_max_operating_c - core, "configured"
    if state == "ok" and margin is None:
        state = "unreadable"  # the guard cannot do anything with it
    if state != "ok":
        return Reading(uuid, index, at_s, state)
    slowdown, shutdown = _limits(source, _numbers(gpu.get("offsets_c")), thresholds)
    memory, memory_max = _number(gpu.get("memory_temperature_c")), thresholds.get("memory_max")
    clock = _number(gpu.get("clock_sm_max_mhz"))
    return Reading(
        uuid, index, at_s, state, temperature_c=core, margin_c=margin, margin_source=source,
        slowdown_margin_c=slowdown, shutdown_margin_c=shutdown,
        memory_margin_c=None if memory is None or memory_max is None else memory_max - memory,
        reasons=int(_number(gpu.get("reasons")) or 0), clock_max_mhz=None if clock is None else int(clock),
    )


def _limits(source: str, offsets: Mapping[str, float], thresholds: Mapping[str, float]) -> tuple[float, float]:
    """On the margin's scale, where the hardware slows the GPU down and where it switches it off: both 0 or less.

    A margin from thresholds that lack the highest operating temperature counts from the slowdown itself.
    """
    nothing = "slowdown" if source == "thresholds" and "max_operating" not in thresholds else "max_operating"

    def limit(name: str) -> float | None:
        if name in offsets and nothing == "max_operating":
            return offsets[name]
        if name in thresholds and nothing in thresholds and source != "configured":
            return thresholds[nothing] - thresholds[name]
        return None

    slowdown, shutdown = limit("slowdown"), limit("shutdown")
    if slowdown is None or slowdown > 0:  # above the highest operating temperature: that is no limit of this GPU
        slowdown = SLOWDOWN_C
    if shutdown is None or shutdown > slowdown - CLOSEST_C:
        shutdown = min(SHUTDOWN_C, slowdown - CLOSEST_C) if shutdown is None else slowdown - CLOSEST_C
    return slowdown, shutdown


def _number(value: Any) -> float | None:
    """A number that is one: neither text nor NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # noqa: PLR0124 - NaN
        return None
    return float(value)


def _numbers(table: Any) -> dict[str, float]:
    pairs = ((name, _number(value)) for name, value in dict(table or {}).items())
    return {name: value for name, value in pairs if value is not None}
