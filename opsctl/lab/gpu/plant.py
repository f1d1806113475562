"""The physics and the driver of one GPU, stepped in time. Pure; degrees Celsius, watts, seconds.

First order: the core drifts with ``tau_s`` towards inlet + resistance x power, memory a few degrees above that. The
modelled driver holds the core at its maximum (SW thermal slowdown: an integrating governor), the hardware halves
clocks at the slowdown temperature, and the GPU falls off the bus at shutdown. Not evidence about real GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opsctl.lab.gpu.profiles import Profile

INLET_C = 25.0
STEP_S = 0.1  # longer steps are taken in parts, so that a silicon that was held up stays the same plant
LONGEST_S = 5.0  # ... but no more than this is made up for
GOVERNOR_PER_C_S = 0.05  # how fast the driver's governor moves the clock: share per degree and second
LEAST_SHARE = 0.3  # the governor goes no lower; the hardware's halving comes first
HARDWARE_SHARE = 0.5
IDLE_LOAD = 0.005
POWER_MEAN_S = 1.0  # NVML's power is a mean over a second since Ampere
CLOCK_STEP_MHZ = 15

IDLE, CLOCKS_SETTING, POWER_CAP, HW_SLOWDOWN, SW_THERMAL, HW_THERMAL = 0x1, 0x2, 0x4, 0x8, 0x20, 0x40


@dataclass(frozen=True, slots=True)
class Drive:
    """What acts on a GPU: ``load`` 0 to 1 is how busy it is at the clock it has; locked clocks of 0 are none.

    ``cooling_factor`` multiplies the thermal resistance: 1 as built, 2 a heat sink half as good.
    """

    load: float
    power_limit_w: float
    cooling_factor: float = 1.0
    locked_min_mhz: int = 0
    locked_max_mhz: int = 0
    inlet_c: float = INLET_C
    tau_s: float | None = None  # of the core; None: the profile's


@dataclass(frozen=True, slots=True)
class State:
    """A GPU at a moment. ``share`` is of the maximum clock; counters grow from the load of the driver on."""

    core_c: float
    memory_c: float
    power_w: float
    power_mean_w: float
    governor: float = 1.0
    share: float = 1.0
    reasons: int = IDLE
    energy_j: float = 0.0
    busy_s: float = 0.0
    power_cap_s: float = 0.0
    sw_thermal_s: float = 0.0
    hw_thermal_s: float = 0.0
    shut_down: bool = False


def at_rest(profile: Profile) -> State:
    """A GPU that has long been idle."""
    core = INLET_C + profile.thermal_resistance_c_per_w * profile.power_idle_w
    return State(core, core + profile.memory_above_core_c, profile.power_idle_w, profile.power_idle_w)


def step(profile: Profile, state: State, drive: Drive, seconds: float) -> State:
    """The GPU ``seconds`` later."""
    left = min(seconds, LONGEST_S)
    while left > 1e-9:
        state = _short_step(profile, state, drive, min(left, STEP_S))
        left -= STEP_S
    return state


def _short_step(profile: Profile, state: State, drive: Drive, seconds: float) -> State:
    if state.shut_down:
        return _cool(profile, state, drive, 0.0, seconds)
    too_hot = state.core_c - profile.max_operating_c
    if profile.memory_max_c is not None:
        too_hot = max(too_hot, state.memory_c - profile.memory_max_c)
    governor = min(1.0, max(LEAST_SHARE, state.governor - too_hot * GOVERNOR_PER_C_S * seconds))
    slowed = state.core_c >= profile.slowdown_c
    cap, locked = power_cap_share(profile, drive), locked_share(profile, drive)
    share = min(1.0, governor, cap, locked, HARDWARE_SHARE if slowed else 1.0)
    reasons = IDLE if drive.load < IDLE_LOAD else 0
    reasons |= CLOCKS_SETTING if locked < 1.0 and not reasons else 0
    reasons |= POWER_CAP if cap < 1.0 and cap <= share else 0
    reasons |= SW_THERMAL if governor < 0.999 else 0
    reasons |= HW_SLOWDOWN | HW_THERMAL if slowed else 0
    power = profile.power_idle_w + (profile.power_default_w - profile.power_idle_w) * drive.load * share
    cooled = _cool(profile, state, drive, power, seconds)
    return replace(
        cooled, governor=governor, share=share, reasons=reasons,
        busy_s=state.busy_s + drive.load * seconds,
        power_cap_s=state.power_cap_s + seconds * bool(reasons & POWER_CAP),
        sw_thermal_s=state.sw_thermal_s + seconds * bool(reasons & SW_THERMAL),
        hw_thermal_s=state.hw_thermal_s + seconds * slowed,
        shut_down=cooled.core_c >= profile.shutdown_c,
    )


def _cool(profile: Profile, state: State, drive: Drive, power_w: float, seconds: float) -> State:
    """Temperatures and energy after some time at a power."""
    rest = drive.inlet_c + profile.thermal_resistance_c_per_w * drive.cooling_factor * power_w
    core = state.core_c + (rest - state.core_c) * -math.expm1(-seconds / (drive.tau_s or profile.tau_s))
    above = rest + profile.memory_above_core_c
    memory = state.memory_c + (above - state.memory_c) * -math.expm1(-seconds / profile.memory_tau_s)
    mean = state.power_mean_w + (power_w - state.power_mean_w) * -math.expm1(-seconds / POWER_MEAN_S)
    return replace(state, core_c=core, memory_c=memory, power_w=power_w, power_mean_w=mean,
                   energy_j=state.energy_j + power_w * seconds)


def power_cap_share(profile: Profile, drive: Drive) -> float:
    """The share of the clock at which the load draws no more than the limit."""
    span = (profile.power_default_w - profile.power_idle_w) * drive.load
    if span <= 0:
        return 1.0
    least = profile.clock_sm_idle_mhz / profile.clock_sm_max_mhz
    return min(1.0, max(least, (drive.power_limit_w - profile.power_idle_w) / span))


def locked_share(profile: Profile, drive: Drive) -> float:
    if not drive.locked_max_mhz:
        return 1.0
    return min(1.0, max(drive.locked_max_mhz, profile.clock_sm_idle_mhz) / profile.clock_sm_max_mhz)


def clock_mhz(profile: Profile, state: State, drive: Drive) -> int:
    """The SM clock that NVML tells, in steps of the hardware; at rest the lowest allowed."""
    if state.reasons & IDLE:
        return min(max(profile.clock_sm_idle_mhz, drive.locked_min_mhz), profile.clock_sm_max_mhz)
    steps = math.floor(profile.clock_sm_max_mhz * state.share / CLOCK_STEP_MHZ + 1e-6) * CLOCK_STEP_MHZ
    at_most = profile.clock_sm_max_mhz if state.share >= 1.0 else steps
    return max(profile.clock_sm_idle_mhz, at_most)


def margin_c(profile: Profile, state: State) -> int:
    """Degrees to the nearest maximum operating temperature; negative above it."""
    margins = [profile.max_operating_c - math.floor(state.core_c)]
    if profile.memory_max_c is not None:
        margins.append(profile.memory_max_c - math.floor(state.memory_c))
    return min(margins)
