"""The plan of a change: who moves, in which wave, what it costs, what is refused before anything is touched."""

from __future__ import annotations

from typing import Any

import pytest

from opsctl.agent.ledger import Line
from opsctl.errors import OpsctlError, RefusedError, UsageError
from opsctl.fleet.model import Placement, Service
from opsctl.releases import plan as plans
from opsctl.releases.plan import Step, Target

OLD, NEW, OTHER = "a" * 64, "b" * 64, "c" * 64
TARGET = Target("chat", "v2", NEW, 1000)
TIP = Target("chat", "v1", OLD)
VERSIONS = {OLD: "v1", NEW: "v2", OTHER: "v0"}


def instance(name: str = "chat.0", digest: str = OLD, **changes: Any) -> dict[str, Any]:
    return {"instance": name, "service": "chat", "release": VERSIONS.get(digest, ""), "digest": digest,
            "unit": "active", "health": "healthy", "weight": 100, "unfinished": False, "voice": "up 100%",
            "gate": {"stop_s": 1.0, "start_s": 2.0, "gate_s": 3.0, "at": "2026-11-22T01:00:00Z"}} | changes


def state(*instances: dict[str, Any], digests: tuple[str, ...] = (OLD,), free: int = 10_000) -> dict[str, Any]:
    return {"instances": list(instances or (instance(),)), "drains": [], "free_bytes": free, "releases": [
        {"service": "chat", "version": VERSIONS[digest], "digest": digest, "complete": True, "engine_built": True}
        for digest in digests]}


def placements(*hosts: str, per_host: int = 1) -> list[Placement]:
    return [Placement(f"chat.{index}", "chat", index, host, "192.0.2.1", 8100 + index)
            for host in hosts for index in range(per_host)]


def service(min_serving: int = 1) -> Service:
    return Service("chat", "gpu", 8100, 8000, min_serving=min_serving)


def make(states: dict[str, Any], *, per_host: int = 1, min_serving: int = 1, **options: Any) -> plans.Plan:
    return plans.make_plan(service(min_serving), TARGET, placements(*states, per_host=per_host), states,
                           **{"stage_plans": {}, "tip": TIP} | options)


def test_a_fleet_of_three_moves_in_three_waves_and_keeps_two() -> None:
    plan = make({f"gpu-{n}": state() for n in (1, 2, 3)})
    assert [(step.name, step.wave, step.now, step.next, step.back) for step in plan.steps] == [
        (f"gpu-{n}.chat.0", n, "v1-aaaaaaaaaaaa", "v2-bbbbbbbbbbbb", "v1-aaaaaaaaaaaa") for n in (1, 2, 3)]
    assert (plan.serving, plan.least_serving, plan.outage) == (3, 2, False)
    plans.check(plan, allow_outage=False)


@pytest.mark.parametrize(("count", "waves", "sizes"), [
    (1, plans.WAVES, [1]),
    (2, plans.WAVES, [1, 1]),
    (8, plans.WAVES, [1, 2, 5]),
    (20, plans.WAVES, [1, 5, 14]),
    (5, "2", [2, 2, 1]),
    (5, "100%", [5]),
    (5, "1, 40%", [1, 2, 2]),
])
def test_waves(count: int, waves: str, sizes: list[int]) -> None:
    steps = [Step(f"gpu-{n}", "chat.0", "", "", "move", True) for n in range(count)]
    assert [len(wave) for wave in plans.split(steps, waves)] == sizes


@pytest.mark.parametrize("waves", ["", "0", "1,,2", "50 %%", "half", "-1"])
def test_waves_that_nobody_can_read_are_refused(waves: str) -> None:
    with pytest.raises(UsageError, match="--waves") as refused:
        plans.split([Step("gpu-1", "chat.0", "", "", "move", True)], waves)
    assert refused.value.code == "update.bad_waves"


def test_who_serves_nobody_goes_first_and_one_of_each_host_before_the_second() -> None:
    states = {"gpu-1": state(instance(), instance("chat.1")),
              "gpu-2": state(instance(unit="failed", health="unknown"), instance("chat.1"))}
    plan = make(states, per_host=2)
    assert [step.name for step in sorted(plan.moves, key=lambda step: step.wave)] == [
        "gpu-2.chat.0", "gpu-1.chat.0", "gpu-1.chat.1", "gpu-2.chat.1"]


def test_what_is_there_already_is_left_alone() -> None:
    plan = make({"gpu-1": state(instance(digest=NEW)), "gpu-2": state()}, tip=TARGET)
    assert [step.action for step in plan.steps] == ["nothing", "move"]
    assert not plan.steps[0].earlier


def test_what_an_unfinished_rollout_moved_can_go_back_to_what_the_ledger_says() -> None:
    plan = make({"gpu-1": state(instance(digest=NEW), digests=(OLD, NEW)), "gpu-2": state()})
    assert (plan.steps[0].action, plan.steps[0].earlier, plan.steps[0].back) == ("nothing", True, "v1-aaaaaaaaaaaa")
    gone = make({"gpu-1": state(instance(digest=NEW), digests=(NEW,)), "gpu-2": state()})
    assert (gone.steps[0].earlier, gone.steps[0].back) == (True, "")


def test_an_instance_whose_change_was_cut_off_is_moved_again() -> None:
    plan = make({"gpu-1": state(instance(digest=NEW, unfinished=True)), "gpu-2": state()})
    assert plan.steps[0].action == "move"


def test_only_the_chosen_are_changed_and_all_count() -> None:
    plan = make({f"gpu-{n}": state() for n in (1, 2, 3)}, chosen=frozenset({"gpu-2"}))
    assert [step.host for step in plan.steps] == ["gpu-2"]
    assert plan.serving == 3


def test_a_silent_host_is_named_and_serves_nobody() -> None:
    plan = make({"gpu-1": state(), "gpu-2": OpsctlError("host.unreachable", "silent")})
    assert (plan.silent, plan.serving, plan.outage) == (("gpu-2",), 1, True)


def test_one_instance_alone_is_an_outage_with_its_seconds() -> None:
    plan = make({"gpu-1": state()})
    with pytest.raises(RefusedError) as refused:
        plans.check(plan, allow_outage=False)
    assert refused.value.code == "update.outage"
    assert "1 serving, and min_serving is 1" in refused.value.message
    assert "about 6 s" in refused.value.message
    assert "--allow-outage" in refused.value.hint
    plans.check(plan, allow_outage=True)


def test_an_outage_nobody_measured_says_so() -> None:
    plan = make({"gpu-1": state(instance(gate=None))})
    with pytest.raises(RefusedError, match="not measured yet"):
        plans.check(plan, allow_outage=False)


def test_an_instance_that_serves_nobody_costs_no_outage() -> None:
    plan = make({"gpu-1": state(instance(unit="failed", health="unknown"))})
    assert not plan.outage


def test_an_instance_that_comes_up_first_spares_the_next() -> None:
    dead = instance(unit="failed", health="unknown")
    assert not make({"gpu-1": state(dead), "gpu-2": state()}).outage
    drained = {**state(instance(weight=0)), "drains": [{"instance": "chat.0", "owner": "operator:ann", "weight": 0}]}
    assert make({"gpu-1": drained, "gpu-2": state()}).outage


@pytest.mark.parametrize("digest", [OLD, NEW])
def test_the_drain_of_a_dead_run_ends_with_it(digest: str) -> None:
    drains = [{"instance": "chat.0", "owner": "run:R0", "weight": 0}]
    left = {**state(instance(digest=digest, weight=0)), "drains": drains}
    assert not make({"gpu-1": left, "gpu-2": state()}).outage
    operators = {**left, "drains": [*drains, {"instance": "chat.0", "owner": "operator:ann", "weight": 0}]}
    assert make({"gpu-1": operators, "gpu-2": state()}).outage


def test_two_instances_on_one_host_are_no_outage() -> None:
    plan = make({"gpu-1": state(instance(), instance("chat.1"))}, per_host=2)
    assert (plan.outage, plan.least_serving) == (False, 1)


def test_a_full_disk_is_refused_for_all_hosts_at_once() -> None:
    full = {"staged": False, "fetch_bytes": 5_000_000, "link_files": 0, "free_after_bytes": -1, "fits": False}
    plan = make({f"gpu-{n}": state() for n in (1, 2)}, stage_plans={"gpu-1": full, "gpu-2": full})
    with pytest.raises(RefusedError, match=r"gpu-1 .*gpu-2") as refused:
        plans.check(plan, allow_outage=True)
    assert refused.value.code == "host.disk_full"


def test_without_a_stage_plan_the_whole_release_is_counted() -> None:
    plan = make({"gpu-1": state(free=900), "gpu-2": state(digests=(OLD, NEW), free=10)})
    assert [(part.host, part.staged, part.fetch, part.fits) for part in plan.hosts] == [
        ("gpu-1", False, 1000, False), ("gpu-2", True, 0, True)]


def line(number: int, digest: str, at: str, action: str = "serve") -> Line:
    return Line(number, VERSIONS[digest], digest, at, "ann", action=action)


@pytest.mark.parametrize(("lines", "digest", "passed", "found"), [
    pytest.param([line(1, OLD, "2026-11-22T00:00:00Z")], NEW, "2026-11-22T01:00:00Z", {NEW: "v2"},
                 id="the ledger never heard of it"),
    pytest.param([line(1, OTHER, "2026-11-20T00:00:00Z"), line(2, OLD, "2026-11-22T00:00:00Z")], OTHER,
                 "2026-11-21T00:00:00Z", {}, id="behind"),
    pytest.param([line(1, NEW, "2026-11-20T00:00:00Z"), line(2, NEW, "2026-11-21T00:00:00Z", "bad"),
                  line(3, OLD, "2026-11-21T00:00:00Z")], NEW, "2026-11-22T00:00:00Z", {NEW: "v2"},
                 id="tried again after it was marked"),
    pytest.param([line(1, OLD, "2026-11-22T00:00:00Z")], OLD, "2026-11-22T01:00:00Z", {}, id="on the tip"),
    pytest.param([], NEW, "2026-11-22T01:00:00Z", {}, id="no ledger"),
])
def test_an_unfinished_rollout_is_told_from_being_behind(lines: list[Line], digest: str, passed: str,
                                                        found: dict[str, str]) -> None:
    states = {"gpu-1": state(instance(digest=digest, gate={"at": passed})), "gpu-2": OpsctlError("x", "silent")}
    assert plans.unfinished(states, "chat", lines) == found
