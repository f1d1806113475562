"""Three hosts serve under load and overheat: what the guard does to traffic, clocks and units, and what it costs.

Streams of 3 to 8 s through real HAProxy. Only the heat is simulated; guard, setter and everything else are real.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby

import pytest
from command import succeeds
from conftest import NAME, LabFleet, lab_of_a_module, unwatched
from heat import Watch, cool, guard, locked_mhz, pause, policy, sh, share, silicon, slowdown_s, unguarded, wait_for
from under_load import SECONDS_PER_STREAM, be_nice, told

from opsctl.fleet.inventory import read_fleet
from opsctl.lab.load import Load, target
from opsctl.lab.model import write_model
from opsctl.releases.remote import HOST_PROGRAM

pytestmark = [pytest.mark.lab, pytest.mark.slow]  # a quarter of an hour

SERVER = "gpu-1.chat.0"
GPUS = "gpu-1=1xH200,gpu-2=1xH200,gpu-3=1xH200"
HOSTS = ("gpu-1", "gpu-2", "gpu-3")
CLIENTS = 24
WARM_C = 72  # near what the cooling as built lets it come to at full load: 77.5
ENGINE = ("threads=1", "parallel=16", "max_model_len=512", "drain_timeout_s=30")


@pytest.fixture(scope="module")
def hot(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFleet]:
    """Three hosts with one H200 each that serve the slow model; their guard enforces."""
    directory = tmp_path_factory.mktemp("hot") / "fleet"
    with lab_of_a_module(f"{NAME}-heat", len(HOSTS), directory, GPUS) as fleet:
        unwatched(fleet.directory)
        succeeds("bundle", "build", inventory=fleet.inventory)
        file = fleet.directory / "v1.gguf"
        write_model(file, "mid")
        words = [word for setting in ENGINE for word in ("--set", setting)]
        succeeds("model", "import", file, "--service", "chat", "--version", "v1", *words, inventory=fleet.inventory)
        be_nice(fleet)
        succeeds("provision", inventory=fleet.inventory)
        assert not guard(fleet, "gpu-1")["document"]["enforcing"]  # a host's first day is for looking
        succeeds("guard", "mode", "enforce", "--yes", inventory=fleet.inventory)
        for host in HOSTS:
            wait_for(lambda host=host: guard(fleet, host)["document"]["enforcing"], 15, f"{host} enforces")
        yield fleet


def load_on(fleet: LabFleet) -> Load:
    return Load(target(read_fleet(fleet.inventory), "chat"), clients=CLIENTS, seconds_per_stream=SECONDS_PER_STREAM)


@pytest.fixture
def mended(hot: LabFleet) -> Iterator[LabFleet]:
    """The fleet as built: before a test and after it everything is cool, serves, and nothing is latched."""
    yield hot
    for host in HOSTS:
        succeeds("lab", "fault", host, "clear", "--name", hot.name)
        sh(hot, host, f"{HOST_PROGRAM} guard-unlatch chat.0 --by test")
    with quick_climb(hot):
        for host in HOSTS:
            wait_for(lambda host=host: at_rest(hot, host), 120, f"{host} is back to normal")


@contextmanager
def quick_climb(fleet: LabFleet) -> Iterator[None]:
    """The guards climb within seconds, for the time between two tests."""
    with ExitStack() as stack:
        for host in HOSTS:
            stack.enter_context(policy(fleet, host, climb_dwell_s=2.0))
        yield


def at_rest(fleet: LabFleet, host: str) -> bool:
    seen = guard(fleet, host)
    active = fleet.run(host, ["systemctl", "is-active", "inference@chat.0"]).stdout.strip()
    return seen["word"] == "normal" and seen["weight"] == 100 and locked_mhz(fleet, host) == 0 and active == "active"


def warmed(fleet: LabFleet, load: Load) -> None:
    load.wait_until_steady(120)
    wait_for(lambda: silicon(fleet, "gpu-1").machine.gpus[0].now.temperature_c >= WARM_C, 120, "gpu-1 is warm")


def test_a_weak_fan_costs_next_to_nothing(mended: LabFleet) -> None:
    """Resistance x 1.33: the driver's own governor is the best policy, and the guard stays out of its way."""
    fleet = mended
    with load_on(fleet) as load:
        warmed(fleet, load)
        before = slowdown_s(fleet, "gpu-1")
        with Watch(fleet, "gpu-1", load.target.statistics[0]) as watch:
            cool(fleet, "gpu-1", 1.33)
            pause(60)
        guarded = [moment.clock_mhz for moment in watch.moments[len(watch.moments) // 3:]]
        seen = guard(fleet, "gpu-1")
        # the hardware alone, on the same machine just after: a guard that may shed load and touches no clock
        with unguarded(fleet, "gpu-1"):
            wait_for(lambda: guard(fleet, "gpu-1")["clock_percent"] is None, 30, "the control has its clocks")
            with Watch(fleet, "gpu-1", load.target.statistics[0]) as control:
                pause(30)
        alone = [moment.clock_mhz for moment in control.moments]
        assert slowdown_s(fleet, "gpu-1") == before
    assert seen["rung"] <= 1, seen
    kept = (sum(guarded) / len(guarded)) / (sum(alone) / len(alone))
    assert kept >= 0.95, f"{kept:.3f} of what the hardware alone keeps"
    assert not load.lost, told(load)


def test_a_dead_fan_moves_the_requests_before_the_hardware_slows(mended: LabFleet) -> None:
    """Resistance x 2 on a small heat sink: half the host's share is gone within 10 s, and no stream."""
    fleet = mended
    with load_on(fleet) as load:
        warmed(fleet, load)
        before = slowdown_s(fleet, "gpu-1")
        with Watch(fleet, "gpu-1", load.target.statistics[0]) as watch:
            pause(5)
            usual = sum(share(moment, SERVER) for moment in watch.moments) / len(watch.moments)
            cool(fleet, "gpu-1", 2, tau_s=8)
            wait_for(lambda: watch.first(lambda moment: moment.weights.get(SERVER, 100) < 100), 30, "the guard acts")
            pause(15)
        threshold = watch.first(lambda moment: moment.weights.get(SERVER, 100) < 100)
        assert threshold is not None
        halved = watch.first(lambda moment: moment.at > threshold.at and share(moment, SERVER) < usual / 2)
        assert halved is not None, guard(fleet, "gpu-1")
        assert halved.at - threshold.at <= 10, f"{halved.at - threshold.at:.1f} s"
        assert slowdown_s(fleet, "gpu-1") - before < 0.3
    assert not load.lost, told(load)


def test_no_cooling_to_speak_of_moves_all_requests_at_once(mended: LabFleet) -> None:
    """Resistance x 3.3, and others have room: at 1 % and the least clocks the host holds out; nothing is stopped."""
    fleet = mended
    with load_on(fleet) as load:
        warmed(fleet, load)
        cool(fleet, "gpu-1", 3.3, tau_s=8)
        wait_for(lambda: guard(fleet, "gpu-1")["weight"] == 1, 20, "it gets next to nothing")
        pause(10)
        count = load.count
        pause(10)
        assert load.count > count  # the others serve
    assert not load.lost, told(load)


def test_what_heats_on_is_stopped_in_order_and_starts_again(mended: LabFleet) -> None:
    """Resistance x 3.3, and clients that go past the load balancer keep the host busy: an orderly stop.

    The GPU may still reach its shutdown: no program is quick enough for that.
    """
    fleet = mended
    where = target(read_fleet(fleet.inventory), "chat")
    address, port = where.servers[SERVER]
    past = replace(where, urls=(f"http://{address}:{port}/v1",), statistics=())
    with load_on(fleet) as load, Load(past, clients=8, seconds_per_stream=SECONDS_PER_STREAM):
        warmed(fleet, load)
        cool(fleet, "gpu-1", 3.3, tau_s=8)
        wait_for(lambda: guard(fleet, "gpu-1")["stopped"] or guard(fleet, "gpu-1")["down"], 60, "it stops")
        seen = guard(fleet, "gpu-1")
        pause(10)
        count = load.count
        pause(10)
        assert load.count > count, seen  # the others serve
        wait_for(lambda: load.in_flight(SERVER) == 0, 60, "what it was answering has ended")
    others = [record for record in load.records if record.server != SERVER]
    assert others
    assert all(record.whole for record in others), told(load)


def test_all_overheat_and_then_all_are_blind_and_requests_still_succeed(mended: LabFleet) -> None:
    fleet = mended
    with load_on(fleet) as load:
        warmed(fleet, load)
        for host in HOSTS:
            cool(fleet, host, 2.2, tau_s=20)
        for host in HOSTS:
            wait_for(lambda host=host: guard(fleet, host)["weight"] < 100, 60, f"{host} gets less")
        pause(15)
        assert not [host for host in HOSTS if guard(fleet, host)["stopped"]]
        for host in HOSTS:
            succeeds("lab", "fault", host, "nvml-hang", "90s", "--name", fleet.name)
        for host in HOSTS:
            wait_for(lambda host=host: guard(fleet, host)["weight"] == 1, 80, f"{host} is blind and at 1 %")
        count = load.count
        pause(10)
        assert load.count > count
        assert not [host for host in HOSTS if guard(fleet, host)["stopped"]]
        for host in HOSTS:
            succeeds("lab", "fault", host, "clear", "--name", fleet.name)
    assert not load.lost, told(load)


RUNGS = {"less": {"less_margin_c": 90}, "slowed": {"slowed_margin_c": 90}, "least": {"least_margin_c": 90}}
PROCESSES = {
    "agent": "systemctl kill --kill-whom=main --signal=KILL opsctl-agent",
    "reader": "pkill -KILL -f opsctl.agent.gpu.chil[d]",
    "setter": "systemctl kill --kill-whom=main --signal=KILL opsctl-setter",
}


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("process", PROCESSES)
def test_whatever_is_killed_clocks_come_back(mended: LabFleet, rung: str, process: str) -> None:
    """A rung that the numbers force; the process dies; the guard goes on; and clocks are free when it lets go."""
    fleet, host = mended, "gpu-2"
    with policy(fleet, host, **{**RUNGS[rung], "climb_dwell_s": 2.0, "climb_margin_c": 1, "stop_margin_c": -90}):
        wait_for(lambda: guard(fleet, host)["word"] == rung, 20, f"it is at {rung}")
        wait_for(lambda: bool(locked_mhz(fleet, host)) == (rung != "less"), 20, "clocks are as the rung says")
        sh(fleet, host, PROCESSES[process])
        pause(3)
        wait_for(lambda: guard(fleet, host)["word"] == rung, 30, f"it is at {rung} again")
        wait_for(lambda: bool(locked_mhz(fleet, host)) == (rung != "less"), 30, "clocks are as the rung says, again")
    with policy(fleet, host, climb_dwell_s=2.0):
        wait_for(lambda: locked_mhz(fleet, host) == 0, 60, "clocks are the driver's again")


def test_an_agent_that_does_not_come_back_leaves_no_clock_behind(mended: LabFleet) -> None:
    fleet, host = mended, "gpu-2"
    with policy(fleet, host, least_margin_c=90, stop_margin_c=-90):
        wait_for(lambda: locked_mhz(fleet, host), 20, "clocks are locked")
        sh(fleet, host, "systemctl mask --runtime --now opsctl-agent 2>/dev/null; systemctl kill --signal=KILL "
                        "opsctl-agent 2>/dev/null; true")
        began = time.monotonic()
        wait_for(lambda: locked_mhz(fleet, host) == 0, 15, "the setter lets go by itself")
        assert time.monotonic() - began < 15
    sh(fleet, host, "systemctl unmask --runtime opsctl-agent && systemctl start opsctl-agent")


def test_a_hanging_driver_is_told_and_halves_and_is_never_a_reason_to_stop(mended: LabFleet) -> None:
    """NVML blocks for 60 s: the page answers, the age grows, the weight falls to half and to 1 %, and comes back."""
    fleet, host = mended, "gpu-3"
    address = read_fleet(fleet.inventory).host(host).management_address
    restarts = sh(fleet, host, "systemctl show --property=NRestarts --value opsctl-agent")
    succeeds("lab", "fault", host, "nvml-hang", "60s", "--name", fleet.name)
    began, weights, ages = time.monotonic(), [], []
    while time.monotonic() - began < 62:
        with urllib.request.urlopen(f"http://{address}:9400/metrics", timeout=2) as answer:
            page = answer.read().decode()
        ages.append(next(float(line.split()[-1]) for line in page.splitlines()
                         if line.startswith("opsctl_gpu_sample_age_seconds{")))
        weights.append(guard(fleet, host)["weight"])
        pause(1)
    assert max(ages) > 50, ages
    assert [weight for weight, _ in groupby(weights)] == [100, 50, 1]
    wait_for(lambda: guard(fleet, host)["weight"] == 100, 120, "it recovers")
    assert sh(fleet, host, "systemctl show --property=NRestarts --value opsctl-agent") == restarts


def test_a_lost_gpu_takes_its_instance_down_by_name(mended: LabFleet) -> None:
    fleet, host = mended, "gpu-3"
    succeeds("lab", "fault", host, "lost", "--name", fleet.name)
    seen = wait_for(lambda: guard(fleet, host)["down"], 15, "it is down")
    assert "GPU 0 lost" in seen
    assert not guard(fleet, host)["stopped"]


def test_a_balancer_that_starts_while_the_agent_is_dead_sends_nothing_to_who_is_drained(mended: LabFleet) -> None:
    fleet = mended
    succeeds("drain", "gpu-1", "--wait", "--yes", inventory=fleet.inventory)
    sh(fleet, "gpu-1", "systemctl stop opsctl-agent")
    try:
        sh(fleet, "ops-1", "systemctl restart haproxy")
        with load_on(fleet) as load:
            load.wait_until_steady(60)
            pause(5)
        assert load.count
        assert not [record for record in load.records if record.server == SERVER], told(load)
    finally:
        sh(fleet, "gpu-1", "systemctl start opsctl-agent")
        succeeds("undrain", "gpu-1", "--yes", inventory=fleet.inventory)
