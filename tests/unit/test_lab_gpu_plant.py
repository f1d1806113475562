"""The physics of a simulated GPU, against tables: what heats, what throttles, what is shut down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opsctl.lab.gpu import plant
from opsctl.lab.gpu.plant import Drive, State, at_rest, clock_mhz, margin_c, step
from opsctl.lab.gpu.profiles import Profile, named

H200 = named("H200")
FULL = Drive(load=1.0, power_limit_w=700.0)
TICK_S = 0.1
# The toy simulation of the design took these, and no memory.
TOY = replace(H200, power_idle_w=80.0, memory_max_c=None)


def after(profile: Profile, state: State, drive: Drive, seconds: float) -> State:
    for _ in range(round(seconds / TICK_S)):
        state = step(profile, state, drive, TICK_S)
    return state


def warm(profile: Profile, drive: Drive = FULL) -> State:
    """After ten minutes under load, which is for ever."""
    return after(profile, at_rest(profile), drive, 600)


def run_toy(resistance: float, tau_s: float) -> tuple[float, State, float | None]:
    """1500 s at full load, cooling worse from 120 s to 900 s; returns mean clock, end, seconds to the shutdown."""
    profile = replace(TOY, tau_s=tau_s)
    state, work, shut_down = replace(at_rest(profile), core_c=77.5), 0.0, None
    for tick in range(15_000):
        bad = 1_200 <= tick < 9_000
        state = step(profile, state, replace(FULL, cooling_factor=resistance / 0.075 if bad else 1.0), TICK_S)
        work += state.share
        if state.shut_down:
            shut_down = tick * TICK_S - 120
            break
    return work / 15_000, state, shut_down


@pytest.mark.parametrize(("resistance", "tau_s", "mean_clock", "hardware_s"), [
    (0.10, 20.0, 0.934, 0.0),
    (0.10, 8.0, 0.933, 0.0),
    (0.15, 8.0, 0.760, 2.9),
    (0.15, 20.0, 0.760, 2.7),
])
def test_the_table_of_the_toy_simulation(resistance: float, tau_s: float, mean_clock: float, hardware_s: float) -> None:
    mean, state, shut_down = run_toy(resistance, tau_s)
    assert (round(mean, 3), shut_down) == (mean_clock, None)
    assert state.hw_thermal_s == pytest.approx(hardware_s, abs=0.2)


@pytest.mark.parametrize(("resistance", "seconds"), [(0.25, 2.3), (0.5, 0.5)])
def test_a_sudden_loss_of_cooling_is_faster_than_the_governor(resistance: float, seconds: float) -> None:
    assert run_toy(resistance, 8.0)[2] == pytest.approx(seconds, abs=0.15)


@pytest.mark.parametrize("model", ["H200", "B200", "A100", "L40S", "T4", "RTX 4090", "V100"])
def test_cooling_as_built_never_throttles(model: str) -> None:
    profile = named(model)
    state = warm(profile, Drive(1.0, profile.power_default_w))
    assert state.power_w == pytest.approx(profile.power_default_w)
    assert (state.share, state.reasons & (plant.SW_THERMAL | plant.HW_THERMAL)) == (1.0, 0)
    assert 5 < margin_c(profile, state) < 12


@pytest.mark.parametrize("factor", [1.33, 1.5, 2.0])
def test_the_governor_holds_the_core_near_its_maximum(factor: float) -> None:
    state = after(H200, warm(H200), replace(FULL, cooling_factor=factor), 300)
    assert state.core_c == pytest.approx(87, abs=0.6)
    assert state.reasons == plant.SW_THERMAL
    assert state.sw_thermal_s > 200
    assert (state.hw_thermal_s == 0) == (factor < 2)


def test_who_sheds_load_in_time_spares_the_hardware() -> None:
    """At a cooling half as good, with half the load: no slowdown by hardware."""
    profile = replace(H200, tau_s=8.0)
    alone = after(profile, warm(profile), replace(FULL, cooling_factor=2.0), 60)
    shed = after(profile, warm(profile), replace(FULL, cooling_factor=2.0, load=0.4), 60)
    assert alone.hw_thermal_s > 1
    assert (shed.hw_thermal_s, shed.share) == (0, 1.0)


def test_slowdown_halves_the_clock_and_says_both_bits() -> None:
    state = step(H200, replace(at_rest(H200), core_c=89.5), FULL, TICK_S)
    assert state.share == 0.5
    assert state.reasons & 0x48 == 0x48
    assert clock_mhz(H200, state, FULL) == 990


def test_a_gpu_that_was_shut_down_draws_nothing_and_stays_so() -> None:
    state = step(H200, replace(at_rest(H200), core_c=97.0), FULL, TICK_S)
    assert state.shut_down
    later = after(H200, state, FULL, 120)
    assert later.shut_down
    assert later.power_w == 0
    assert later.core_c < 30


@pytest.mark.parametrize(("limit_w", "power_w", "reasons"), [(700, 700, 0), (450, 450, plant.POWER_CAP),
                                                            (200, 200, plant.POWER_CAP)])
def test_the_power_cap(limit_w: float, power_w: float, reasons: int) -> None:
    state = warm(H200, replace(FULL, power_limit_w=limit_w))
    assert state.power_w == pytest.approx(power_w, abs=0.5)
    assert state.reasons == reasons
    assert (state.power_cap_s > 0) == bool(reasons)


def test_a_cap_does_not_act_on_a_light_load() -> None:
    state = warm(H200, Drive(load=0.2, power_limit_w=450))
    assert (state.share, state.reasons) == (1.0, 0)


def test_locked_clocks_act_on_every_load() -> None:
    drive = Drive(load=0.2, power_limit_w=700, locked_max_mhz=990)
    state = warm(H200, drive)
    assert state.share == 0.5
    assert clock_mhz(H200, state, drive) == 990
    assert state.power_w == pytest.approx(76 + 624 * 0.2 * 0.5)


def test_an_idle_gpu() -> None:
    state = warm(H200, replace(FULL, load=0.0))
    assert (state.reasons, state.power_w, clock_mhz(H200, state, FULL)) == (plant.IDLE, 76.0, 345)
    assert state.core_c == pytest.approx(25 + 0.075 * 76)


def test_memory_has_its_own_temperature_and_limit() -> None:
    profile = replace(H200, memory_max_c=80)
    state = warm(profile)
    assert state.reasons & plant.SW_THERMAL
    assert state.memory_c == pytest.approx(80, abs=0.6)
    assert margin_c(profile, state) == 80 - int(state.memory_c)


def test_a_late_tick_is_the_same_plant() -> None:
    late = step(H200, at_rest(H200), FULL, 3.0)
    assert late.core_c == pytest.approx(after(H200, at_rest(H200), FULL, 3.0).core_c)
    assert late.energy_j == pytest.approx(2100, rel=0.01)
