"""The guard on the simulated plant, in a loop: what it costs in mild overheating, and what it prevents in worse.

Nothing here is evidence about real GPUs. Looks come at 1 or 4 a second, clocks take effect 0.3 s later, and the phase
between looks and trouble is varied, because it decides how much of the first second is lost.
"""

from __future__ import annotations

from dataclasses import replace

import guard_plant
import pytest
from guard_plant import Guard, Instance, Trouble

from opsctl.agent.guard.model import Rung
from opsctl.lab.gpu.profiles import Profile, named

BEGIN_S = 30.0
PHASES = (0.0, 0.07, 0.13, 0.19, 0.6)
# With and without T.Limit, with and without a memory sensor, wide and narrow limits.
MODELS = ("H200", "B200", "A100", "L40S", "T4", "RTX 4090", "V100")


def profile(model: str, tau_s: float) -> Profile:
    return replace(named(model), tau_s=tau_s)


def run(gpu: Profile, factor: float, bad_s: float, *, instances: int = 1, demand: float = 1.0, after_s: float = 0.0,
        phase: float = 0.0, guarded: bool = True) -> tuple[list[Instance], list[Guard]]:
    guards = [Guard() for _ in range(instances)]
    rules = guards if guarded else [guard_plant.nothing] * instances
    trouble = Trouble(factor, BEGIN_S, BEGIN_S + bad_s)
    return guard_plant.run(gpu, trouble, list(rules), demand, BEGIN_S + bad_s + after_s, phase=phase,
                         seed=round(phase * 100)), guards


def work(instances: list[Instance]) -> float:
    return sum(one.done for one in instances)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("phase", (0.0, 0.6))
def test_mild_overheating_is_left_to_the_drivers_governor(model: str, phase: float) -> None:
    """One busy GPU whose service has nobody else: what the weight sheds comes back."""
    gpu = profile(model, 20.0)
    for after_s in (0.0, 200.0):  # the bad time alone, and with what comes after
        guarded, guards = run(gpu, 1.33, 240.0, after_s=after_s, phase=phase)
        alone, _ = run(gpu, 1.33, 240.0, after_s=after_s, guarded=False)
        assert guarded[0].state.hw_thermal_s == 0.0
        assert work(guarded) >= 0.95 * work(alone)
        assert max(rung for _, rung in guards[0].rungs) <= Rung.LESS
    assert guards[0].rungs[-1][1] == Rung.NORMAL  # and after it everything is as before


@pytest.mark.parametrize("demand", [2.1, 2.7, 3.0])
def test_mild_overheating_in_a_pool_costs_nothing(demand: float) -> None:
    gpu = profile("H200", 20.0)
    guarded, _ = run(gpu, 1.33, 240.0, instances=3, demand=demand)
    alone, _ = run(gpu, 1.33, 240.0, instances=3, demand=demand, guarded=False)
    assert guarded[0].state.hw_thermal_s == 0.0
    assert work(guarded) >= 0.95 * work(alone)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("model", MODELS)
def test_half_the_cooling_gone_is_met_before_the_hardware_does(model: str, phase: float) -> None:
    guarded, guards = run(profile(model, 8.0), 2.0, 60.0, phase=phase)
    assert guarded[0].state.hw_thermal_s < 0.3
    assert (guarded[0].lost, guards[0].stop) == (0.0, "")


def test_without_a_guard_the_hardware_would_have_met_it() -> None:
    alone, _ = run(profile("H200", 8.0), 2.0, 60.0, guarded=False)
    assert alone[0].state.hw_thermal_s > 2.0


@pytest.mark.parametrize("model", MODELS)
def test_half_the_cooling_gone_for_long_keeps_most_of_what_the_hardware_keeps(model: str) -> None:
    """SLOWED finds clocks that this cooling bears, without latching."""
    guarded, guards = run(profile(model, 8.0), 2.0, 400.0)
    alone, _ = run(profile(model, 8.0), 2.0, 400.0, guarded=False)
    assert work(guarded) >= 0.85 * work(alone)
    assert guarded[0].state.hw_thermal_s < 0.3
    assert not guards[0].memory.latched


@pytest.mark.parametrize("demand", [2.4, 3.0])
def test_a_hot_instance_of_three_sheds_half_of_its_streams_within_ten_seconds(demand: float) -> None:
    gpu = profile("H200", 8.0)
    before, _ = run(gpu, 1.0, 5.0, instances=3, demand=demand)
    after, _ = run(gpu, 2.0, 12.0, instances=3, demand=demand)  # the jump comes in the first 2 s
    assert after[0].streams / work_in_flight(after) < 0.5 * before[0].streams / work_in_flight(before)
    assert [one.lost for one in after] == [0.0, 0.0, 0.0]


def work_in_flight(instances: list[Instance]) -> float:
    return sum(one.streams for one in instances)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("model", ("H200", "A100", "V100"))
def test_most_of_the_cooling_gone_ends_in_an_orderly_stop_while_others_serve(model: str, phase: float) -> None:
    guarded, guards = run(profile(model, 8.0), 3.3, 30.0, instances=3, demand=3.0, phase=phase)
    rungs = [rung for _, rung in guards[0].rungs]
    assert rungs[:1] == [Rung.NORMAL] and Rung.STOP in rungs and Rung.STOP_NOW not in rungs
    assert (guarded[0].stops, guarded[0].lost, guarded[0].state.shut_down) == (1, 0.0, False)
    assert all(one.alive and one.stops == 0 for one in guarded[1:])


def test_without_a_guard_most_of_the_cooling_gone_loses_what_is_in_flight() -> None:
    alone, _ = run(profile("H200", 8.0), 3.3, 30.0, instances=3, demand=3.0, guarded=False)
    assert alone[0].state.shut_down and alone[0].lost > 5


def test_the_last_instance_of_a_service_is_not_stopped_however_hot() -> None:
    guarded, guards = run(profile("H200", 8.0), 3.3, 60.0)
    assert (guarded[0].stops, guarded[0].alive, guarded[0].state.shut_down) == (0, True, False)
    assert any("only 0 others serve" in words for words in guards[0].reasons)
    assert guarded[0].done > 0


def test_a_sudden_total_loss_of_cooling_is_faster_than_any_guard() -> None:
    """The honest limit: the hardware protects the silicon, and what is in flight is lost."""
    guarded, _ = run(profile("H200", 8.0), 20.0, 10.0, instances=3, demand=3.0)
    assert guarded[0].state.shut_down and guarded[0].lost > 0
    assert all(one.alive for one in guarded[1:])
