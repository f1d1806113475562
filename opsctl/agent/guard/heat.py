"""What heat alone asks for: one GPU's reading and trend to a rung, and the words for it. Pure.

Below 0 the margins of the policy are told for a GPU that its hardware slows down at -2 and switches off at -8; they are
stretched to the limits of the GPU at hand, so that a T4 (slowdown at -8) is not stopped where nothing is wrong with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from opsctl.agent.guard.model import Policy, Reading, Rung, Trend
from opsctl.agent.guard.readings import CLOSEST_C, SHUTDOWN_C, SLOWDOWN_C

SW_THERMAL, HW_THERMAL = 0x20, 0x40
STEADY_C_PER_S = 0.3  # no rising slope: below what a sensor of whole degrees tells from nothing in three seconds
TIMES_WORTH_SAYING_S = 60.0


@dataclass(frozen=True)
class Heat:
    """One GPU's. ``calm``: as far as it goes, the instance might climb."""

    reading: Reading
    rung: Rung
    words: str
    calm: bool


def heat(policy: Policy, reading: Reading, trend: Trend) -> Heat:
    """For a reading whose state is ``ok``."""
    by_margin = _by_margin(policy, reading)
    by_memory = _by_memory(policy, reading)
    by_time = _by_time(policy, reading, trend)
    return Heat(reading, max(by_margin, by_memory, by_time, _by_reasons(reading)),
                _words(reading, trend, memory=bool(by_memory)), _calm(policy, reading, trend))


def at_most(policy_c: float, reading: Reading) -> float:
    """A margin of the policy on this GPU's scale; never nearer to the shutdown than a degree."""
    if policy_c >= 0:
        return policy_c
    if policy_c >= SLOWDOWN_C:
        return policy_c * reading.slowdown_margin_c / SLOWDOWN_C
    beyond = (policy_c - SLOWDOWN_C) / (SHUTDOWN_C - SLOWDOWN_C)
    placed = reading.slowdown_margin_c + beyond * (reading.shutdown_margin_c - reading.slowdown_margin_c)
    return max(placed, reading.shutdown_margin_c + CLOSEST_C)


def not_helped(reading: Reading, trend: Trend) -> bool:
    """Slowed down by its hardware and not on its way down, or too hot and still heating: what was done does not do."""
    margin, slope = reading.margin_c, trend.slope_c_per_s
    if margin is None or slope is None:
        return False
    slowed = bool(reading.reasons & HW_THERMAL) or margin <= reading.slowdown_margin_c
    return (slowed and slope >= 0) or (margin <= 0 and slope > STEADY_C_PER_S)


def _by_margin(policy: Policy, reading: Reading) -> Rung:
    margin = reading.margin_c
    steps = ((Rung.STOP_NOW, policy.stop_now_margin_c), (Rung.STOP, policy.stop_margin_c),
             (Rung.LEAST, policy.least_margin_c), (Rung.SLOWED, policy.slowed_margin_c),
             (Rung.LESS, policy.less_margin_c))
    return Rung.NORMAL if margin is None else next(
        (rung for rung, limit in steps if margin <= at_most(limit, reading)), Rung.NORMAL)


def _by_memory(policy: Policy, reading: Reading) -> Rung:
    """The memory's own ladder. It has no way to stop: the hardware guards it, and the margin mostly knows it too."""
    margin = reading.memory_margin_c
    steps = ((Rung.LEAST, policy.memory_least_margin_c), (Rung.SLOWED, policy.memory_slowed_margin_c),
             (Rung.LESS, policy.memory_less_margin_c))
    return Rung.NORMAL if margin is None else next((rung for rung, limit in steps if margin <= limit), Rung.NORMAL)


def _by_time(policy: Policy, reading: Reading, trend: Trend) -> Rung:
    left, margin = trend.time_to_slowdown_s, reading.margin_c
    if left is None or margin is None or margin > policy.jump_margin_c:
        return Rung.NORMAL
    steps = ((Rung.LEAST, policy.least_time_s), (Rung.SLOWED, policy.slowed_time_s))
    return next((rung for rung, limit in steps if 0 < limit >= left), Rung.NORMAL)


def _by_reasons(reading: Reading) -> Rung:
    if reading.reasons & HW_THERMAL:
        return Rung.LEAST
    return Rung.LESS if reading.reasons & SW_THERMAL else Rung.NORMAL


def _calm(policy: Policy, reading: Reading, trend: Trend) -> bool:
    if trend.slope_c_per_s is None or trend.slope_c_per_s > STEADY_C_PER_S or reading.reasons & HW_THERMAL:
        return False
    memory = reading.memory_margin_c is None or reading.memory_margin_c >= policy.memory_climb_margin_c
    return reading.margin_c is not None and reading.margin_c >= policy.climb_margin_c and memory


def _words(reading: Reading, trend: Trend, *, memory: bool) -> str:
    """``GPU 3: margin -1 C, slowdown in 2.1 s at +0.9 C/s``."""
    found = [f"margin {reading.margin_c:g} C"]
    if reading.margin_source == "configured":
        found[0] += " (to a configured maximum)"
    if memory:
        found.append(f"memory margin {reading.memory_margin_c:g} C")
    if reading.reasons & HW_THERMAL or (reading.margin_c or 0.0) <= reading.slowdown_margin_c:
        found.append("the hardware slows it down")
    elif reading.reasons & SW_THERMAL:
        found.append("the driver slows it down")
    slope, left = trend.slope_c_per_s, trend.time_to_slowdown_s
    if slope and left and left <= TIMES_WORTH_SAYING_S:
        found.append(f"slowdown in {left:.1f} s at {slope:+.1f} C/s")
    elif slope:
        found.append(f"{slope:+.1f} C/s")
    return f"GPU {reading.index}: {', '.join(found)}"
