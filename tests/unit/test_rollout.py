"""The rollout's decisions: by table, and by playing every way in which small fleets can fail."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from opsctl.engines.events import discard
from opsctl.errors import ExitCode, MixedError, OpsctlError, PausedError, RefusedError, RolledBackError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.releases import roll
from opsctl.releases.plan import Step, Unheard
from opsctl.releases.roll import AdriftError, Settings, ended
from opsctl.releases.rollout import Begin, End, Move, Rollout, State, Wait, after, decide


def step(number: int, wave: int, *, serving: bool = True, earlier: bool = False, back: str = "v1-a") -> Step:
    action = "nothing" if earlier else "move"
    return Step(f"gpu-{number}", "chat.0", "v1-a", "v2-b", action, serving, wave, back, earlier)


def fleet(*waves: int, min_serving: int = 1, **options: bool | str) -> Rollout:
    moves = tuple(Move(step(number, wave)) for number, wave in enumerate(waves, 1))
    return Rollout(moves, min_serving, **options)  # type: ignore[arg-type]


def names(*numbers: int) -> frozenset[str]:
    return frozenset(f"gpu-{number}.chat.0" for number in numbers)


def begun(decision: object) -> list[str]:
    assert isinstance(decision, Begin), decision
    return [one.host for one in decision.steps]


def test_the_canary_goes_alone() -> None:
    rollout = fleet(1, 2, 2)
    assert begun(decide(rollout, names(1, 2, 3))) == ["gpu-1"]
    rollout = after(rollout, "gpu-1.chat.0", State.MOVING)
    assert decide(rollout, names(1, 2, 3)) == Wait()
    rollout = after(rollout, "gpu-1.chat.0", State.MOVED)
    assert begun(decide(rollout, names(1, 2, 3))) == ["gpu-2", "gpu-3"]


def test_the_budget_counts_who_serves_now() -> None:
    rollout = fleet(1, 1, 1, 1, min_serving=2)
    assert begun(decide(rollout, names(1, 2, 3, 4))) == ["gpu-1", "gpu-2"]
    assert begun(decide(rollout, names(2, 3, 4))) == ["gpu-1", "gpu-2"]  # the first serves nobody: it costs nothing
    assert begun(decide(rollout, names(1, 2, 3))) == ["gpu-1", "gpu-4"]


def test_an_instance_that_fell_over_meanwhile_uses_the_budget_up() -> None:
    rollout = after(fleet(1, 2, 2, min_serving=2), "gpu-1.chat.0", State.MOVED)
    end = decide(rollout, names(1, 2))
    assert begun(end) == ["gpu-3"]  # it is the one that fell over
    rollout = after(rollout, "gpu-3.chat.0", State.MOVED)
    end = decide(rollout, names(1, 2))
    assert isinstance(end, End)
    assert end.exit_code is ExitCode.PAUSED
    assert "min_serving is 2" in end.reason


def test_one_under_way_is_not_counted_twice() -> None:
    rollout = after(fleet(1, 1, 1), "gpu-1.chat.0", State.MOVING)
    assert begun(decide(rollout, names(1, 2, 3))) == ["gpu-2"]  # not drained yet, but on its way out
    assert begun(decide(rollout, names(2, 3))) == ["gpu-2"]


def test_an_allowed_outage_goes_one_at_a_time() -> None:
    rollout = fleet(1, 1, min_serving=2, allow_outage=True)
    assert begun(decide(rollout, names(1, 2))) == ["gpu-1"]
    rollout = after(rollout, "gpu-1.chat.0", State.MOVING)
    assert decide(rollout, names(1, 2)) == Wait()


def test_who_was_not_heard_is_not_free() -> None:
    rollout = fleet(1, 1, 1, 1, min_serving=2)
    assert begun(decide(rollout, names(2, 3, 4), Unheard(names(1)))) == ["gpu-1"]  # it may serve: it is paid for
    assert begun(decide(rollout, names(2, 3, 4))) == ["gpu-1", "gpu-2"]  # it was heard to be down
    idle = Rollout((Move(step(1, 1, serving=False)),), 1)
    assert begun(decide(idle, names(2), Unheard(names(1)))) == ["gpu-1"]  # it served nobody when it was planned


def test_a_load_balancer_that_is_not_heard_begins_nothing() -> None:
    blind = Unheard(why="the load balancer on ops-1 does not answer")
    rollout = fleet(1, 1, 1)
    end = decide(rollout, frozenset(), blind)
    assert isinstance(end, End)
    assert end.exit_code is ExitCode.PAUSED
    assert "ops-1 does not answer" in end.reason
    assert decide(after(rollout, "gpu-1.chat.0", State.MOVING), frozenset(), blind) == Wait()
    gone = after(after(rollout, "gpu-1.chat.0", State.MOVED), "gpu-2.chat.0", State.FAILED)
    end = decide(gone, frozenset(), blind)
    assert isinstance(end, End)
    assert end.exit_code is ExitCode.MIXED
    assert "ops-1 does not answer" in end.reason


@pytest.mark.parametrize(("silent_for", "begins"), [(2, True), (3, False)])
def test_nor_does_the_conductor_take_it_for_nobody(monkeypatch: pytest.MonkeyPatch, silent_for: int, begins: bool
                                                   ) -> None:
    """One that answers again is believed; it is asked a few times before the rollout pauses."""
    questions = []

    class Silent:
        def rotating(self, wanted: Any) -> frozenset[str]:
            questions.append(wanted)
            if len(questions) <= silent_for:
                raise PausedError("balancer.unseen", "the load balancer on ops-1 does not answer")
            return frozenset(wanted)

        def close(self) -> None:
            pass

    hosts = tuple(Host(f"gpu-{number}", f"10.0.0.{number}", ("gpu",)) for number in (1, 2))
    service = Service("chat", "gpu", 8100, 8000)
    served = {"instances": [{"instance": "chat.0", "unit": "active", "weight": 100, "unfinished": False,
                             "health": "healthy"}]}
    monkeypatch.setattr(roll, "AGAIN_S", 0.0)
    monkeypatch.setattr(roll._Conductor, "_begin", lambda conductor, step, back: conductor._ended.put(
        (step, back, PausedError("drain.deadline", "not empty"))))
    monkeypatch.setattr(roll, "balancers", lambda *_: Silent())
    monkeypatch.setattr(roll, "on_each", lambda *_: {host.name: served for host in hosts})
    rolled = roll.roll(Fleet(Path(), Path("inventory.ini"), hosts, (service,)), service, fleet(1, 1),
                       Settings("R1", 60, 0), discard)
    assert rolled.end.exit_code is ExitCode.PAUSED
    assert ({move.state for move in rolled.rollout.moves} != {State.WAITING}) == begins


def test_without_leave_an_outage_pauses() -> None:
    end = decide(fleet(1), names(1))
    assert isinstance(end, End)
    assert end.exit_code is ExitCode.PAUSED


def test_a_failure_takes_back_what_was_moved_last_first() -> None:
    rollout = after(after(fleet(1, 2, 3), "gpu-1.chat.0", State.MOVED), "gpu-2.chat.0", State.MOVED)
    rollout = after(rollout, "gpu-3.chat.0", State.FAILED, RolledBackError("gate.unhealthy", "no"))
    decision = decide(rollout, names(1, 2, 3))
    assert isinstance(decision, Begin)
    assert decision.back
    assert begun(decision) == ["gpu-2"]  # as many at once as a wave held
    moves = (Move(step(1, 1), State.MOVED), Move(step(2, 2), State.MOVED), Move(step(3, 2), State.MOVED),
             Move(step(4, 2), State.FAILED, RolledBackError("gate.unhealthy", "no")))
    assert begun(decide(Rollout(moves, 1), names(1, 2, 3, 4))) == ["gpu-3", "gpu-2", "gpu-1"]


def test_who_served_nobody_and_does_not_start_stops_nobody_else() -> None:
    moves = (Move(step(1, 1, serving=False), State.LEFT, RolledBackError("instance.did_not_start", "no")),
             Move(step(2, 2)))
    assert begun(decide(Rollout(moves, 0), names(2))) == ["gpu-2"]
    assert decide(Rollout((moves[0], Move(step(2, 2), State.MOVED)), 0), names(2)) == End(ExitCode.DONE)
    assert decide(Rollout(moves[:1], 0), names(2)) == End(ExitCode.ROLLED_BACK)


def test_what_an_unfinished_rollout_had_moved_goes_back_too() -> None:
    moves = (Move(step(1, 0, earlier=True), State.MOVED),
             Move(step(2, 1), State.FAILED, RolledBackError("gate.unhealthy", "no")))
    decision = decide(Rollout(moves, 1), names(1, 2))
    assert isinstance(decision, Begin)
    assert decision.back
    gone = (Move(step(1, 0, earlier=True, back=""), State.MOVED), moves[1])
    end = decide(Rollout(gone, 1), names(1, 2))
    assert isinstance(end, End)
    assert end.exit_code is ExitCode.MIXED


@pytest.mark.parametrize(("error", "back", "state"), [
    (None, False, State.MOVED),
    (None, True, State.REVERTED),
    (RolledBackError("instance.did_not_start", ""), False, State.FAILED),
    (MixedError("cutover.not_undone", ""), False, State.BROKEN),
    (PausedError("gate.inconclusive", ""), False, State.PAUSED),
    (RefusedError("cutover.moved", ""), False, State.PAUSED),
    (OpsctlError("host.unreachable", ""), False, State.PAUSED),
    (AdriftError("host.connection_lost", ""), False, State.ADRIFT),
    (AdriftError("rotation.missing", ""), True, State.STUCK),
    (RolledBackError("instance.did_not_start", ""), True, State.STUCK),
    (PausedError("drain.deadline", ""), True, State.STUCK),
])
def test_how_a_move_ended(error: OpsctlError | None, back: bool, state: State) -> None:
    assert ended(error, back=back) is state


def test_how_a_move_ended_where_nobody_was_served_before() -> None:
    assert ended(RolledBackError("instance.did_not_start", ""), back=False, served=False) is State.LEFT


OUTCOMES = (State.MOVED, State.FAILED, State.BROKEN, State.PAUSED, State.ADRIFT)


def play(rollout: Rollout, outcomes: tuple[State, ...], back: State, size: int) -> tuple[Rollout, End, int]:
    """Every move ends at once, in the order in which they began; returns the least that served at any time."""
    outcome = {move.step.name: wanted for move, wanted in zip(rollout.moves, outcomes, strict=True)}
    everybody = names(*range(1, size + 1))
    down: set[str] = set()
    least = size
    for _ in range(100):
        decision = decide(rollout, everybody - down)
        if isinstance(decision, End):
            return rollout, decision, least
        if isinstance(decision, Begin):
            for one in decision.steps:
                rollout = after(rollout, one.name, State.REVERTING if decision.back else State.MOVING)
                down.add(one.name)
            least = min(least, size - len(down))
            continue
        name = next(move.step.name for move in rollout.moves if move.state in (State.MOVING, State.REVERTING))
        reverting = rollout.move(name).state is State.REVERTING
        state = back if reverting else outcome[name]
        if state is not State.BROKEN:
            down.discard(name)
        rollout = after(rollout, name, state)
    raise AssertionError("a rollout that never ends")


@pytest.mark.parametrize("waves", [(1, 2, 3), (1, 2, 2), (1, 1, 1), (1, 2, 2, 2)])
@pytest.mark.parametrize("min_serving", [0, 1, 2])
@pytest.mark.parametrize("on_failure", ["revert", "stop"])
@pytest.mark.parametrize("back", [State.REVERTED, State.STUCK])
def test_however_it_goes_the_exit_code_tells_the_truth(waves: tuple[int, ...], min_serving: int, on_failure: str,
                                                      back: State) -> None:
    for outcomes in itertools.product(OUTCOMES, repeat=len(waves)):
        rollout, end, least = play(fleet(*waves, min_serving=min_serving, on_failure=on_failure), outcomes, back,
                                   len(waves))
        states = [move.state for move in rollout.moves]
        assert least >= min_serving - states.count(State.BROKEN), (outcomes, states)
        new = sum(state in (State.MOVED, State.STUCK, State.ADRIFT) for state in states)
        broken = State.BROKEN in states
        if end.exit_code is ExitCode.DONE:
            assert new == len(states)
        elif end.exit_code is ExitCode.ROLLED_BACK:
            assert new == 0, (outcomes, states)
            assert not broken
        elif end.exit_code is ExitCode.MIXED:
            assert new or broken, (outcomes, states)
            assert State.FAILED in states or broken
        else:
            assert end.exit_code is ExitCode.PAUSED
            assert State.FAILED not in states
            assert not broken
        assert not {State.MOVING, State.REVERTING} & set(states)
