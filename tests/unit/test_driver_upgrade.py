"""A change of driver: what is planned and refused, who may be away, how it ends; by tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from opsctl.driver_upgrade import drive as driving
from opsctl.driver_upgrade import plan as plans
from opsctl.driver_upgrade import upgrade as upgrades
from opsctl.driver_upgrade.host import FailedError, Settings
from opsctl.driver_upgrade.plan import Instance, Plan, Step, make_plan
from opsctl.driver_upgrade.upgrade import Begin, End, Move, State, Upgrade, after, decide, failure
from opsctl.driver_upgrade.verb import check_version, with_driver
from opsctl.engines.ansible import Failure, PlaybookOutcome
from opsctl.engines.events import discard
from opsctl.errors import ConfigurationError, ExitCode, LockedError, OpsctlError, PausedError, RefusedError, UsageError
from opsctl.fleet.hosts import place_of
from opsctl.fleet.model import Fleet, Host, Placement, Service
from opsctl.fleet.placements import place
from opsctl.releases.plan import ALL_HEARD, Unheard
from opsctl.releases.rotation import AdriftError

OLD, NEW = "580.126.09", "595.71.05"
CHAT = Service("chat", "gpu", 8100, 8000)
CODE = Service("code", "gpu", 8200, 8001, instances_per_host=2, min_serving=2)


def host(number: int, **more: Any) -> Host:
    return Host(f"gpu-{number}", f"10.0.0.{number}", ("gpu",), variables={"nvidia_driver_version": NEW}, **more)


def look(*versions: str, loaded: str = "", phase: str = "", states: dict[str, str] | None = None) -> dict[str, Any]:
    change = {"run": "R1", "from": OLD, "to": NEW, "phase": phase, "instances": ["chat.0"]} if phase else None
    return {"versions": list(versions or (OLD,)), "loaded": loaded or (versions or (OLD,))[0], "states": states or {},
            "change": change, "rotation": {}, "kept": []}


def given_up(seen: dict[str, Any]) -> dict[str, Any]:
    return {**seen, "change": {**seen["change"], "to": "610.57.04"}}


def state(placements: list[Placement], *, unit: str = "active", drains: tuple[str, ...] = ()) -> dict[str, Any]:
    weight = 0 if drains else 100
    return {"instances": [{"instance": one.instance, "unit": unit, "weight": weight, "unfinished": False,
                           "health": "healthy" if unit == "active" else "unknown"} for one in placements],
            "drains": [{"instance": one.instance, "owner": owner, "weight": 0} for one in placements
                       for owner in drains]}


def planned(hosts: list[Host], services: tuple[Service, ...] = (CHAT,), looks: dict[str, Any] | None = None,
            states: dict[str, Any] | None = None, waves: str = "1,25%,100%") -> Plan:
    placements = place(Fleet(Path(), Path("inventory.ini"), tuple(hosts), services))
    said = {one.name: state([placement for placement in placements if placement.host == one.name]) for one in hosts}
    return make_plan(NEW, hosts, services, placements, {**said, **(states or {})},
                     {**{one.name: look() for one in hosts}, **(looks or {})}, waves=waves,
                     rotating={f"{one.host}.{one.instance}" for one in placements})


def waves_of(plan: Plan) -> dict[str, int]:
    return {step.host: step.wave for step in plan.steps}


class TestPlan:
    def test_a_canary_then_a_quarter_then_the_rest(self) -> None:
        plan = planned([host(number) for number in range(1, 9)])
        assert list(waves_of(plan).values()) == [1, 2, 2, 3, 3, 3, 3, 3]
        assert not plan.short

    def test_who_serves_nobody_goes_first_and_this_machine_last(self) -> None:
        hosts = [host(1, connection="local"), host(2), host(3)]
        stopped = {"gpu-3": state(list(place(Fleet(Path(), Path(), (hosts[2],), (CHAT,)))), unit="inactive")}
        plan = planned(hosts, states=stopped)
        assert waves_of(plan) == {"gpu-3": 1, "gpu-2": 2, "gpu-1": 3}
        assert [one.instance for step in plan.steps for one in step.takes if step.host == "gpu-3"] == []

    @pytest.mark.parametrize(("seen", "action"), [
        (look(NEW), "nothing"), (look(NEW, loaded=OLD), "change"), (look(OLD, NEW), "change"),
        (look(NEW, states={"nvidia-kernel-open-dkms": "half-configured"}), "change"),
        (look(NEW, phase="changing"), "change"), (look(NEW, phase="accepted"), "finish"),
        (look(OLD, phase="back"), "finish"), (look(OLD, phase="restored"), "back"),
        (look(OLD, phase="broken"), "back"),
        # of a run to another version, which was given up
        (given_up(look(NEW, phase="back")), "nothing"), (given_up(look(OLD, phase="accepted")), "change"),
        (given_up(look(NEW, phase="restored")), "change"), (given_up(look(NEW, phase="changing")), "change")])
    def test_what_a_host_lacks(self, seen: dict[str, Any], action: str) -> None:
        plan = planned([host(1), host(2)], looks={"gpu-1": seen})
        assert [step.action for step in plan.steps] == [action, "change"]
        assert plan.steps[0].old == (OLD if plan.steps[0].phase else seen["versions"][0])

    def test_an_operators_drain_stays_and_costs_nothing(self) -> None:
        both = list(place(Fleet(Path(), Path(), (host(1),), (CHAT,))))
        plan = planned([host(1), host(2)], states={"gpu-1": state(both, drains=("operator:ann",))})
        assert waves_of(plan) == {"gpu-1": 1, "gpu-2": 2}
        assert plan.steps[0].takes  # its engine is stopped all the same
        assert plan.short == ("chat",)  # and it will not come back for the other one

    @pytest.mark.parametrize(("hosts", "short"), [(1, ("chat", "code")), (2, ()), (3, ())])
    def test_every_service_of_a_host_counts(self, hosts: int, short: tuple[str, ...]) -> None:
        plan = planned([host(number) for number in range(1, hosts + 1)], (CHAT, CODE))
        assert plan.short == short
        if not short:
            plans.check(plan, allow_outage=False)
            return
        with pytest.raises(RefusedError, match="code has 2 serving, and min_serving is 2"):
            plans.check(plan, allow_outage=False)
        plans.check(plan, allow_outage=True)

    def test_a_silent_host_is_left_out_and_serves_nobody(self) -> None:
        gone = OpsctlError("host.unreachable", "gone")
        plan = planned([host(1), host(2)], looks={"gpu-2": gone}, states={"gpu-2": gone})
        assert plan.silent == ("gpu-2",)
        assert plan.short == ("chat",)

    def test_another_version_in_the_inventory_is_named_with_its_line(self, tmp_path: Path) -> None:
        inventory = tmp_path / "inventory.ini"
        inventory.write_text(f'[gpu]\ngpu-1\n\n[gpu:vars]\nnvidia_driver_version="{OLD}"\n')
        one = Host("gpu-1", "10.0.0.1", ("gpu",), variables={"nvidia_driver_version": OLD})
        places = {"gpu-1": place_of(inventory, "gpu-1", "nvidia_driver_version")}
        with pytest.raises(RefusedError, match=f"{inventory}:5: nvidia_driver_version={OLD} of gpu-1") as caught:
            plans.check_inventory([one], NEW, places)
        assert f'write nvidia_driver_version="{NEW}" there' in caught.value.hint
        plans.check_inventory([host(1)], NEW, {})

    def test_debians_packages_are_not_changed_by_this(self) -> None:
        debian = host(1)
        debian.variables["nvidia_driver_source"] = "debian"
        with pytest.raises(RefusedError, match="gpu-1") as caught:
            plans.check_source([host(2), debian])
        assert caught.value.code == "driver.debian"
        assert "opsctl drain gpu-1" in caught.value.hint
        plans.check_source([host(2)])

    def test_hosts_without_a_driver_of_ours_are_left_alone(self) -> None:
        bare = Host("ops-1", "10.0.0.9", ("lb",))
        assert with_driver((bare, host(1)), "") == (host(1),)
        with pytest.raises(UsageError, match="no host of --limit ops-1 has"):
            with_driver((bare,), "ops-1")

    @pytest.mark.parametrize("version", ["", "595", "595.71.05-1", "latest"])
    def test_an_exact_version_is_wanted(self, version: str) -> None:
        with pytest.raises(UsageError):
            check_version(version)


def step(number: int, wave: int, *services: str, **more: Any) -> Step:
    name = f"gpu-{number}"
    instances = tuple(Instance(f"{name}.{service}.{at}", f"{service}.{at}", service, True, True)
                      for service in services or ("chat",) for at in range(2 if service == "code" else 1))
    return Step(name, (OLD,), OLD, "change", instances, wave, **more)


def serving(steps: Sequence[Step], *without: int) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"chat": set(), "code": set()}
    for one in steps:
        for instance in one.instances:
            if one.host not in {f"gpu-{number}" for number in without}:
                found[instance.service].add(instance.name)
    return found


def upgrade(steps: Sequence[Step], *states: State, **more: Any) -> Upgrade:
    error = OpsctlError("driver.failed", "gpu: no")
    moves = [Move(one, states[at], error if states[at] in upgrades.STOPPING else None) if at < len(states) else
             Move(one) for at, one in enumerate(steps)]
    return Upgrade(NEW, tuple(moves), (CHAT, CODE) if any("code" in i.service for s in steps for i in s.instances)
                   else (CHAT,), **more)


THREE = (step(1, 1), step(2, 2), step(3, 2))


class TestUpgrade:
    def test_the_canary_goes_alone_and_the_others_follow(self) -> None:
        now = upgrade(THREE)
        assert decide(now, serving(THREE)) == Begin((THREE[0],))
        now = after(now, "gpu-1", State.CHANGED)
        assert decide(now, serving(THREE)) == Begin((THREE[1], THREE[2]))
        for name in ("gpu-2", "gpu-3"):
            now = after(now, name, State.CHANGED)
        assert decide(now, serving(THREE)) == End(ExitCode.DONE)
        assert failure(now, End(ExitCode.DONE), "R1") is None

    def test_the_budget_is_one_of_every_service(self) -> None:
        steps = [step(1, 1, "chat", "code"), step(2, 1, "chat", "code"), step(3, 1, "chat")]
        assert decide(upgrade(steps), serving(steps)) == Begin((steps[0], steps[2]))  # code keeps two
        assert decide(upgrade(steps), serving(steps, 2)) == Begin((steps[1], steps[2]))  # the second serves nobody now

    def test_who_fell_over_meanwhile_uses_it_up(self) -> None:
        now = upgrade(THREE, State.CHANGED)
        assert decide(now, serving(THREE, 1)) == Begin((THREE[1],))
        end = decide(now, {"chat": {"gpu-2.chat.0"}})
        assert end == Begin((THREE[2],))  # it serves nobody
        lone = upgrade([step(1, 1)])
        end = decide(lone, serving([step(1, 1)]))
        assert isinstance(end, End)
        assert end.exit_code is ExitCode.PAUSED
        assert "gpu-1 cannot be spared" in end.reason
        assert decide(upgrade([step(1, 1)], allow_outage=True), serving([step(1, 1)])) == Begin((step(1, 1),))

    def test_who_was_not_heard_is_not_free(self) -> None:
        steps = (step(1, 1), step(2, 1), step(3, 1))
        unheard = Unheard(frozenset({"gpu-1.chat.0"}))
        assert decide(upgrade(steps), serving(steps, 1), unheard) == Begin((steps[0],))
        assert decide(upgrade(steps), serving(steps, 1)) == Begin(steps[:2])  # it was heard to be down

    def test_a_load_balancer_that_is_not_heard_begins_nothing(self) -> None:
        blind = Unheard(why="the load balancer on ops-1 does not answer")
        end = decide(upgrade(THREE), {}, blind)
        assert isinstance(end, End)
        assert end.exit_code is ExitCode.PAUSED
        error = failure(upgrade(THREE), end, "R1")
        assert error is not None
        assert "ops-1 does not answer" in error.message
        assert decide(upgrade(THREE, *[State.CHANGED] * 3), {}, blind) == End(ExitCode.DONE)

    @pytest.mark.parametrize(("states", "exit_code", "words"), [
        ((State.CHANGED, State.BACK), 6, ("on 595.71.05: gpu-1", "back on the old driver and serving: gpu-2",
                                          "not touched: gpu-3")),
        ((State.CHANGED, State.BROKEN), 7, ("does not serve, and stays drained: gpu-2",)),
        ((State.CHANGED, State.BACK, State.BROKEN), 7, ()),
        ((State.CHANGED, State.BACK, State.ADRIFT), 7, ()),
        ((State.CHANGED, State.BACK, State.PAUSED), 6, ("not changed: gpu-3",)),
        ((State.CHANGED, State.BACK, State.UNSEEN), 7, ("no load balancer is seen to send to it: gpu-3",)),
        ((State.UNSEEN,), 8, ("no load balancer is seen to send to it: gpu-1",)),
        ((State.PAUSED,), 8, ("not changed: gpu-1", "not touched: gpu-2, gpu-3")),
        ((State.CHANGED, State.CHANGED, State.REBOOTING), 8, ("reboots: gpu-3",)),
        ((State.CHANGED, State.ADRIFT), 8, ("not known, and stays drained: gpu-2",))])
    def test_how_it_ends(self, states: tuple[State, ...], exit_code: int, words: tuple[str, ...]) -> None:
        now = upgrade(THREE, *states)
        end = decide(now, serving(THREE))
        assert isinstance(end, End)
        assert end.exit_code == exit_code
        error = failure(now, end, "R1")
        assert error is not None
        assert error.exit_code == exit_code
        for word in words:
            assert word in error.message
        if exit_code == 6:
            assert f'nvidia_driver_version="{OLD}" for gpu-2' in error.hint
        else:
            assert "opsctl resume R1" in error.hint

    def test_what_works_stays(self) -> None:
        now = upgrade(THREE, State.CHANGED, State.BACK)
        assert isinstance(decide(now, serving(THREE)), End)  # nothing else is begun, nothing is taken back


class PlayedHosts:
    """Hosts and Ansible, played: ``goes_wrong`` by (host, act), an error or a failure; ``acts`` is what was done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, goes_wrong: dict[tuple[str, str], Any]) -> None:
        self.acts: list[str] = []
        self.goes_wrong = goes_wrong
        played = self

        class Host:
            def __init__(self, _: Any, step: Step, *__: Any) -> None:
                self.step = step
                self.timings: dict[str, Any] = {}

            def close(self) -> None:
                pass

            def empty(self) -> None:
                played.act(self.step.host, "empty")

            def accept(self, version: str) -> None:
                played.act(self.step.host, f"accept {version}")

            def serve(self, phase: str) -> None:
                played.act(self.step.host, f"serve {phase}")

            def reboot(self) -> None:
                played.act(self.step.host, "reboot")

            def look(self) -> dict[str, Any]:
                installed, loaded = played.goes_wrong.get((self.step.host, "look"), (NEW, NEW))
                return {**look(installed, phase="changing"), "loaded": loaded}

        def play(_: Any, hosts: list[str], steps: list[str], __: Any) -> PlaybookOutcome:
            self.acts.append(f"{steps[0]} {' '.join(hosts)}")
            if error := goes_wrong.get(("play", steps[0])):
                raise error
            failures = [found for name in hosts if (found := goes_wrong.get((name, steps[0])))]
            return PlaybookOutcome(failures=failures, exit_code=2 if failures else 0,
                                   stats={name: {"failures": 0} for name in hosts})

        monkeypatch.setattr(driving, "HostAtWork", Host)
        monkeypatch.setattr(driving, "play", play)

    def act(self, host: str, what: str) -> None:
        self.acts.append(f"{host} {what}")
        error = self.goes_wrong.get((host, what))
        if error is not None:
            raise error


def failed(name: str, **more: Any) -> Failure:
    return Failure(name, "Change the driver", "Stop and show why.", "it does not build", ("make: no",), **more)


def driven(monkeypatch: pytest.MonkeyPatch, goes_wrong: dict[tuple[str, str], Any], steps: Sequence[Step] = THREE,
           run: Callable[..., Any] = driving.drive) -> tuple[list[str], End, Upgrade]:
    played = PlayedHosts(monkeypatch, goes_wrong)
    monkeypatch.setattr(driving._Conductor, "_serving", lambda _: (serving(steps), ALL_HEARD))
    fleet = Fleet(Path(), Path("inventory.ini"), tuple(host(number) for number in (1, 2, 3)), (CHAT,))
    found = run(driving.Tools(fleet, Path(), Path()), upgrade(list(steps)), Settings("R1", NEW), discard)
    return played.acts, found.end, found.upgrade


def states_of(now: Upgrade) -> list[str]:
    return [move.state.value for move in now.moves]


class TestDrive:
    def test_a_wave_is_one_run_of_ansible(self, monkeypatch: pytest.MonkeyPatch) -> None:
        acts, end, now = driven(monkeypatch, {})
        assert end.exit_code is ExitCode.DONE
        assert states_of(now) == ["changed"] * 3
        assert acts[:4] == ["gpu-1 empty", "change gpu-1", f"gpu-1 accept {NEW}", "gpu-1 serve accepted"]
        assert "change gpu-2 gpu-3" in acts

    @pytest.mark.parametrize("wrong", [{("gpu-2", "change"): failed("gpu-2")},
                                       {("gpu-2", f"accept {NEW}"): FailedError("gate.unhealthy", "says nothing")}])
    def test_one_that_fails_goes_back_alone(self, monkeypatch: pytest.MonkeyPatch, wrong: dict[Any, Any]) -> None:
        acts, end, now = driven(monkeypatch, wrong)
        assert end.exit_code is ExitCode.ROLLED_BACK
        assert states_of(now) == ["changed", "back", "changed"]
        assert acts[acts.index("back gpu-2"):acts.index("back gpu-2") + 3] == [
            "back gpu-2", f"gpu-2 accept {OLD}", "gpu-2 serve back"]
        assert "gpu-3 serve accepted" in acts

    @pytest.mark.parametrize(("wrong", "states", "exit_code"), [
        ({("gpu-1", "empty"): PausedError("drain.deadline", "not empty")}, ["paused", "waiting", "waiting"], 8),
        ({("gpu-1", "empty"): AdriftError("host.timed_out", "gone")}, ["adrift", "waiting", "waiting"], 8),
        ({("gpu-1", "change"): failed("gpu-1", unreachable=True)}, ["adrift", "waiting", "waiting"], 8),
        ({("gpu-1", f"accept {NEW}"): OpsctlError("host.unreachable", "gone")}, ["adrift", "waiting", "waiting"], 8),
        ({("gpu-1", "serve accepted"): AdriftError("rotation.missing", "nobody")}, ["unseen", "waiting", "waiting"], 8),
        ({("gpu-1", "serve accepted"): OpsctlError("host.unreachable", "gone")}, ["adrift", "waiting", "waiting"], 8),
        ({("gpu-1", "change"): failed("gpu-1"), ("gpu-1", "back"): failed("gpu-1")},
         ["broken", "waiting", "waiting"], 7),
        ({("gpu-1", "change"): failed("gpu-1"), ("gpu-1", f"accept {OLD}"): FailedError("instance.died", "no")},
         ["broken", "waiting", "waiting"], 7)])
    def test_and_what_is_not_known_waits(self, monkeypatch: pytest.MonkeyPatch, wrong: dict[Any, Any],
                                         states: list[str], exit_code: int) -> None:
        _, end, now = driven(monkeypatch, wrong)
        assert states_of(now) == states
        assert end.exit_code == exit_code

    def test_this_machine_reboots_where_its_module_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        steps = (step(1, 1), step(2, 2, local=True))
        wrong = {("gpu-2", "change"): failed("gpu-2"), ("gpu-2", "look"): (NEW, OLD)}
        acts, end, now = driven(monkeypatch, wrong, steps)
        assert states_of(now) == ["changed", "rebooting"]
        assert end.exit_code is ExitCode.PAUSED
        assert acts[-1] == "gpu-2 reboot"
        _, end, now = driven(monkeypatch, {("gpu-2", "change"): failed("gpu-2")}, steps)
        assert states_of(now) == ["changed", "back"]

    @pytest.mark.parametrize("lost", ["lock.lost", "run.diverged"])
    def test_nobody_reboots_it_whose_lock_is_gone(self, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
        """Asked after the play, which took its time; neither into the new driver nor back."""
        left = Step("gpu-1", (OLD,), "", "back", (), 1, local=True, phase="restored", before=OLD)
        for one, wrong in ((step(1, 1, local=True), {("gpu-1", "change"): failed("gpu-1"),
                                                     ("gpu-1", "look"): (NEW, OLD)}),
                           (left, {("gpu-1", "look"): (OLD, "")})):
            played = PlayedHosts(monkeypatch, wrong)
            monkeypatch.setattr(driving._Conductor, "_serving", lambda _, one=one: (serving([one]), ALL_HEARD))

            def about_to(played: PlayedHosts = played) -> None:
                if played.acts and played.acts[-1] in ("change gpu-1", "back gpu-1"):
                    raise LockedError(lost, "bob has it")

            fleet = Fleet(Path(), Path("inventory.ini"), (host(1),), (CHAT,))
            with pytest.raises(LockedError):
                driving.drive(driving.Tools(fleet, Path(), Path()), upgrade([one], allow_outage=True),
                              Settings("R1", NEW, about_to=about_to), discard)
            assert "gpu-1 reboot" not in played.acts

    def test_and_on_its_way_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        left = Step("gpu-1", (OLD,), "", "back", (), 1, local=True, phase="restored", before=OLD)
        acts, _, now = driven(monkeypatch, {("gpu-1", "look"): (OLD, "")}, (left,))
        assert (states_of(now), acts) == (["rebooting"], ["back gpu-1", "gpu-1 reboot"])
        _, _, now = driven(monkeypatch, {("gpu-1", "look"): (OLD, OLD)}, (left,))
        assert states_of(now) == ["back"]

    @pytest.mark.parametrize(("action", "phase", "acts", "state"), [  # no host could be spared for a change
        ("finish", "accepted", ["gpu-1 serve accepted"], "changed"), ("finish", "back", ["gpu-1 serve back"], "back"),
        ("back", "restored", ["back gpu-1", f"gpu-1 accept {OLD}", "gpu-1 serve back"], "back")])
    def test_what_did_not_end_is_brought_to_its_end(self, monkeypatch: pytest.MonkeyPatch, action: Any, phase: str,
                                                   acts: list[str], state: str) -> None:
        instances = step(1, 1).instances if action == "finish" else ()
        left = Step("gpu-1", (NEW,), NEW, action, instances, 1, phase=phase, before=OLD)
        done, _, now = driven(monkeypatch, {}, (left,))
        assert done == acts
        assert states_of(now) == [state]

    def test_a_load_balancer_that_is_not_heard_is_not_taken_for_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Silent:
            def rotating(self, _: Any) -> frozenset[str]:
                raise PausedError("balancer.unseen", "the load balancer on ops-1 does not answer")

            def close(self) -> None:
                pass

        played = PlayedHosts(monkeypatch, {})
        monkeypatch.setattr(driving, "balancers", lambda *_: Silent())
        monkeypatch.setattr(driving, "on_each", lambda *_: {})
        fleet = Fleet(Path(), Path("inventory.ini"), tuple(host(number) for number in (1, 2, 3)), (CHAT,))
        found = driving.drive(driving.Tools(fleet, Path(), Path()), upgrade(THREE), Settings("R1", NEW), discard)
        assert (found.end.exit_code, played.acts) == (ExitCode.PAUSED, [])

    def test_ansible_that_does_not_begin_leaves_hosts_adrift(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = ConfigurationError("ansible.no_inventory", "inventory.ini cannot be read")
        _, end, now = driven(monkeypatch, {("play", "change"): broken})
        assert (states_of(now), end.exit_code) == (["adrift", "waiting", "waiting"], 8)
        wrong = {("gpu-1", "change"): failed("gpu-1"), ("play", "back"): broken}
        _, end, now = driven(monkeypatch, wrong)
        assert (states_of(now), end.exit_code) == (["adrift", "waiting", "waiting"], 8)

    def test_a_lost_lock_ends_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(LockedError):
            driven(monkeypatch, {("gpu-1", "empty"): LockedError("lock.lost", "bob has it")})
