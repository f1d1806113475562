"""Releases are changed under load, and what is lost is counted, with teeth.

Engines here drop their streams as soon as they are told to end, clients try nothing twice, and a stream counts when all
its tokens arrived. So every stream that an engine still had when it was stopped shows, and the controls prove it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from command import opsctl, succeeds
from conftest import NAME, LabFleet, lab_of_a_module, unwatched
from under_load import (
    LEAST_IN_FLIGHT,
    DrainWatch,
    be_nice,
    import_slow,
    load_on,
    lost,
    reload_balancer,
    told,
    without_server_state,
)

from opsctl.lab.load import Load
from opsctl.releases.remote import HOST_PROGRAM
from opsctl.releases.store import find

pytestmark = pytest.mark.lab

STREAMS = 1500
GPU_HOSTS = 3
UNIT = "inference@chat.0.service"
SERVER = "gpu-1.chat.0"
# HAProxy asks the agents of its servers one after the other when it starts: the last one may get requests for longest.
LAST = "gpu-3.chat.0"
RELOADS = 15
OWNER = "operator:test"


@pytest.fixture(scope="module")
def busy(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFleet]:
    """Three hosts that serve v1 of the slow model; v2 lies in the bundle."""
    name = f"{NAME}-load"
    directory = tmp_path_factory.mktemp("busy") / "fleet"
    with lab_of_a_module(name, GPU_HOSTS, directory) as fleet:
        unwatched(fleet.directory)
        succeeds("bundle", "build", inventory=fleet.inventory)
        import_slow(fleet, "v1", seed=0)
        be_nice(fleet)
        succeeds("provision", inventory=fleet.inventory)
        import_slow(fleet, "v2", seed=1)
        yield fleet


def release(lab: LabFleet, version: str) -> str:
    stored = find(lab.directory / "bundle", "chat", version)
    assert stored is not None
    return stored.directory.name


def verb(lab: LabFleet, host: str, *arguments: str, timeout_s: float = 300.0) -> dict[str, Any]:
    """What opsctl-host answers as root on a machine."""
    done = lab.run(host, ["sudo", HOST_PROGRAM, *arguments], timeout_s=timeout_s)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def serving(lab: LabFleet) -> set[str]:
    """The versions that the instances serve; all of them must be healthy and get requests."""
    found = []
    for host in lab.gpu_hosts:
        (instance,) = verb(lab, host, "state", "--json")["instances"]
        assert (instance["health"], instance["voice"]) == ("healthy", "up 100%"), instance
        found.append(instance["release"])
    return set(found)


@pytest.mark.slow  # six minutes; test_rollouts.py has clients that stream through changes too
def test_an_update_and_a_rollback_of_three_hosts_lose_no_stream(busy: LabFleet) -> None:
    with load_on(busy) as load, DrainWatch(load) as watch, ThreadPoolExecutor(1) as operator:
        load.wait_until_steady()
        update = operator.submit(opsctl, "update-model", "--version", "v2", "--yes", inventory=busy.inventory)
        watch.wait_for(1, update)
        reload_balancer(busy)  # while an instance drains: the new process must know, the old one has its streams
        assert update.result().returncode == 0, f"{update.result().stderr}\n{told(load)}"
        assert serving(busy) == {"v2"}
        rollback = operator.submit(opsctl, "rollback", "--yes", inventory=busy.inventory)
        watch.wait_for(GPU_HOSTS + 2, rollback)
        reload_balancer(busy)
        assert rollback.result().returncode == 0, f"{rollback.result().stderr}\n{told(load)}"
        assert serving(busy) == {"v1"}
        while load.count < STREAMS:
            load.wait_for_look(60)
    records = load.records
    print(told(load), *watch.drains, sep="\n")  # noqa: T201 - shown with -s and on failure
    assert len(records) >= STREAMS
    assert not lost(records)
    assert [drain.server for drain in watch.drains] == [f"{host}.chat.0" for host in busy.gpu_hosts] * 2
    assert min(drain.in_flight for drain in watch.drains) >= LEAST_IN_FLIGHT, watch.drains
    answered = {(record.release, record.server) for record in records if record.whole}
    assert answered >= {(release(busy, version), f"{host}.chat.0")
                        for version in ("v1", "v2") for host in busy.gpu_hosts}
    assert 3 <= statistics.median(record.seconds for record in records) <= 8


@pytest.mark.slow
def test_the_same_change_without_the_drain_loses_streams(busy: LabFleet) -> None:
    """Stop, flip, start, under the same load: what a script for systemctl would do, without the drain before.

    By hand, because the product cannot be talked into it: a rollout pauses when its drain is not heard, and a cutover
    that is ordered alone holds traffic away while it measures the engine.
    """
    link = "/srv/opsctl/chat/current.0"
    (instance,) = verb(busy, "gpu-1", "state", "--json")["instances"]
    new = "v1" if instance["release"] == "v2" else "v2"
    succeeds("stage", "--version", new, inventory=busy.inventory)
    flip = f"ln -s releases/{release(busy, new)} {link}.new && mv -T {link}.new {link} && systemctl restart {UNIT}"
    with load_on(busy) as load:
        load.wait_until_steady()
        until = load.now + 60
        while load.in_flight(SERVER) < LEAST_IN_FLIGHT and load.now < until:
            load.wait_for_look()
        done = busy.run("gpu-1", ["sudo", "sh", "-c", flip], timeout_s=300)
        assert done.returncode == 0, done.stderr
        back = verb(busy, "ops-1", "balancer", "--wanted", SERVER, "--wait-s", "120")
        assert not back["missing"], back
    assert {server for _, server in lost(load.records)} == {SERVER}, told(load)
    assert load.lost >= LEAST_IN_FLIGHT, told(load)


@pytest.mark.slow
@pytest.mark.parametrize("remembers", [False, True])
def test_a_reload_forgets_a_drain_without_the_server_state_file(busy: LabFleet, remembers: bool) -> None:
    """Drained by hand and seen to be; then reloads; then the engine is restarted, for it is drained, is it not?"""
    with load_on(busy, clients=48) as load:
        load.wait_until_steady()
        verb(busy, "gpu-3", "drain", "chat.0", "--owner", OWNER)
        try:
            seen = verb(busy, "ops-1", "balancer", "--drained", LAST, "--wait-s", "120")
            assert not seen["busy"], seen
            assert verb(busy, "gpu-3", "idle", "chat.0", "--wait-s", "60")["idle"]
            assert not load.in_flight(LAST)
            if remembers:
                assert not reload_and_restart(busy, load)
            else:
                with without_server_state(busy):
                    # a stream that has the engine for itself is a quick one: some end before it does
                    assert any(reload_and_restart(busy, load) and load.lost for _ in range(5)), told(load)
        finally:
            verb(busy, "gpu-3", "undrain", "chat.0", "--owner", OWNER)
            back = verb(busy, "ops-1", "balancer", "--wanted", LAST, "--wait-s", "120")
        assert not back["missing"], back
    assert {server for _, server in lost(load.records)} == (set() if remembers else {LAST}), told(load)


def reload_and_restart(lab: LabFleet, load: Load) -> bool:
    """Restarts the engine as soon as a request comes to it, and gives True; or after many reloads, when none did."""
    came = False
    with restart_in_hand(lab) as restart:
        for _ in range(RELOADS):
            reload_balancer(lab)
            came = came_to(load, seconds=1.0)
            if came:
                break
        restart()
    load.wait_for_look(60)  # its streams have ended by now, this way or that
    return came


def came_to(load: Load, seconds: float) -> bool:
    """Whether the last server is answering a stream, within so many seconds."""
    waiting, until = threading.Event(), load.now + seconds
    while not load.in_flight(LAST) and load.now < until:
        waiting.wait(0.01)
    return load.in_flight(LAST) > 0


@contextmanager
def restart_in_hand(lab: LabFleet) -> Iterator[Callable[[], None]]:
    """Restarts the engine at once when called: the connection is there already, and streams last seconds only."""
    counted = f"systemctl reset-failed {UNIT}"  # ten starts an hour are too many, for a unit that nobody orders about
    line = f"sudo sh -c '{counted} && read line && exec systemctl restart {UNIT}'"
    with subprocess.Popen(["ssh", "-F", lab.directory / ".opsctl/ssh_config", "gpu-3", line], stdin=subprocess.PIPE,
                          text=True) as waiting:
        def restart() -> None:
            waiting.communicate("now\n", timeout=300)
            assert waiting.returncode == 0

        yield restart
