"""The rollout as a state machine: who is moved next, when it stops, what it takes back. Pure: no I/O, no clock.

``decide`` looks at a ``Rollout`` and at who serves now, and says the one next thing: begin some moves, wait for those
under way, or end. Whoever drives it (``roll.py``) does that, writes down what came of it with ``after``, and asks
again. A budget counts instances that serve *now*: an instance that fell over by itself in the meantime uses it up.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from opsctl.errors import ExitCode, OpsctlError
from opsctl.releases.plan import ALL_HEARD, Plan, Step, Unheard

OnFailure = Literal["revert", "stop"]


class State(StrEnum):
    """Where one instance is.

    ``failed``: its change was undone on the host. ``broken``: it could not be undone. ``left``: it served nobody before
    and does not start now, which says little of the release. ``adrift``: ordered, and not known what became of it, or
    moved and no load balancer sends to it. ``stuck``: it could not be brought back.
    """

    WAITING = "waiting"
    MOVING = "moving"
    MOVED = "moved"
    FAILED = "failed"
    BROKEN = "broken"
    PAUSED = "paused"
    REVERTING = "reverting"
    REVERTED = "reverted"
    STUCK = "stuck"
    LEFT = "left"
    ADRIFT = "adrift"


WORKING = frozenset({State.MOVING, State.REVERTING})
STOPPING = frozenset({State.FAILED, State.BROKEN, State.PAUSED, State.ADRIFT})


@dataclass(frozen=True)
class Move:
    """One instance on its way. ``error`` is why it failed, broke or paused."""

    step: Step
    state: State = State.WAITING
    error: OpsctlError | None = None


@dataclass(frozen=True)
class Rollout:
    """Everything that ``decide`` looks at. ``min_serving`` and ``allow_outage`` bound who may be away at once."""

    moves: tuple[Move, ...]
    min_serving: int
    allow_outage: bool = False
    on_failure: OnFailure = "revert"

    def move(self, name: str) -> Move:
        return next(move for move in self.moves if move.step.name == name)


@dataclass(frozen=True)
class Begin:
    """Start these; ``back``: bring them back to where they were."""

    steps: tuple[Step, ...]
    back: bool = False


@dataclass(frozen=True)
class Wait:
    """Some are under way; nothing else may begin until one of them ends."""


@dataclass(frozen=True)
class End:
    """``exit_code``: 0 all moved, 6 taken back, 7 mixed, 8 paused. ``reason``: set when no instance's error says it."""

    exit_code: ExitCode
    reason: str = ""


Decision = Begin | Wait | End


def begun(plan: Plan, *, allow_outage: bool = False, on_failure: OnFailure = "revert") -> Rollout:
    """The rollout of a plan. What an unfinished rollout moved before belongs to it: a failure takes that back too."""
    ordered = sorted((step for step in plan.moves), key=lambda step: step.wave)
    earlier = [Move(step, State.MOVED) for step in plan.steps if step.earlier]
    return Rollout((*earlier, *(Move(step) for step in ordered)), plan.service.min_serving, allow_outage, on_failure)


def after(rollout: Rollout, name: str, state: State, error: OpsctlError | None = None) -> Rollout:
    """``rollout`` with one instance in another state."""
    return replace(rollout, moves=tuple(
        replace(move, state=state, error=error) if move.step.name == name else move for move in rollout.moves))


def decide(rollout: Rollout, serving: Set[str], unheard: Unheard = ALL_HEARD) -> Decision:
    """The next thing. ``serving``: names of all instances of the service that get requests now.

    What is ``unheard`` is not free: an instance that served costs what it did, and nothing begins without a word of
    the load balancers.
    """
    moves = rollout.moves
    working = {move.step.name for move in moves if move.state in WORKING}
    if any(move.state in STOPPING for move in moves):
        return _stop(rollout, serving, working, unheard)
    waiting = [move for move in moves if move.state is State.WAITING]
    if not waiting:
        nobody = moves and all(move.state is State.LEFT for move in moves)
        return Wait() if working else End(ExitCode.ROLLED_BACK if nobody else ExitCode.DONE)
    wave = min(move.step.wave for move in waiting)
    if any(move.state is State.MOVING and move.step.wave < wave for move in moves):
        return Wait()  # a wave begins when the one before has passed its gates
    served = {move.step.name for move in waiting if move.step.serving}
    steps = () if unheard.why else _affordable(
        rollout, [move.step for move in waiting if move.step.wave == wave], serving, working, unheard.names & served)
    if steps:
        return Begin(steps)
    if working:
        return Wait()
    why = unheard.why.rstrip(".") or _counts(rollout, serving)
    return End(ExitCode.PAUSED, f"{why}: {waiting[0].step.name} cannot be spared")


def _stop(rollout: Rollout, serving: Set[str], working: Set[str], unheard: Unheard) -> Decision:
    """Something went wrong: nothing new is moved; what is under way ends; then what was moved goes back."""
    moves = rollout.moves
    if any(move.state is State.MOVING for move in moves):
        return Wait()
    if not any(move.state in (State.FAILED, State.BROKEN) for move in moves):
        return End(ExitCode.PAUSED)
    ahead = [move.step for move in moves if move.state is State.MOVED]
    returnable = [step for step in reversed(ahead) if step.back] if rollout.on_failure == "revert" else []
    room = width(rollout) - len(working)  # not all at once, however large the budget: who stays takes all the load
    steps = () if unheard.why else \
        _affordable(rollout, returnable, serving, working, unheard.names)[:max(0, room)]
    if steps:
        return Begin(steps, back=True)
    if working:
        return Wait()
    if returnable:
        why = unheard.why.rstrip(".") or _counts(rollout, serving)
        return End(ExitCode.MIXED, f"{why}: {returnable[0].name} cannot be spared to go back")
    mixed = ahead or any(move.state in (State.BROKEN, State.STUCK, State.ADRIFT) for move in moves)
    return End(ExitCode.MIXED if mixed else ExitCode.ROLLED_BACK)


def width(rollout: Rollout) -> int:
    """The most that one of the waves begun so far held: as many may go back at once."""
    waves = [move.step.wave for move in rollout.moves if move.state is not State.WAITING and move.step.serving]
    return max((waves.count(wave) for wave in waves), default=1)


def _counts(rollout: Rollout, serving: Set[str]) -> str:
    return f"{len(serving)} serve now and min_serving is {rollout.min_serving}"


def _affordable(rollout: Rollout, steps: list[Step], serving: Set[str], working: Set[str], perhaps: Set[str]
                ) -> tuple[Step, ...]:
    """As many of ``steps`` as the budget allows. One that serves nobody costs nothing, unless it ``perhaps`` does."""
    left = len(serving - working) - rollout.min_serving
    found: list[Step] = []
    for step in steps:
        cost = 1 if step.name in serving or step.name in perhaps else 0
        if cost <= left or cost == 0:
            found.append(step)
            left -= cost
        elif rollout.allow_outage and not found and not working:
            return (step,)
    return tuple(found)
