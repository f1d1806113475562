"""The change of driver as a state machine: which hosts are next, when it stops, how it ended. Pure: no I/O, no clock.

``decide`` says the one next thing: begin some hosts, or end. Whoever drives it (``drive.py``) brings all of them to
an end, writes down what came of each with ``after``, and asks again. What works stays: a driver that serves on some
hosts is no harm to the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from opsctl.driver_upgrade.plan import Plan, Step, room
from opsctl.errors import ExitCode, MixedError, OpsctlError, PausedError, RolledBackError
from opsctl.fleet.model import Service
from opsctl.releases.plan import ALL_HEARD, Unheard


class State(StrEnum):
    """``back``: it failed, and the old driver serves. ``broken``: it could not be brought back. ``paused``: it was not
    touched. ``unseen``: it was brought to its end, and a load balancer sends it nothing. ``adrift``: under way, and not
    heard of. ``rebooting``: this machine."""

    WAITING = "waiting"
    CHANGED = "changed"
    BACK = "back"
    BROKEN = "broken"
    PAUSED = "paused"
    UNSEEN = "unseen"
    ADRIFT = "adrift"
    REBOOTING = "rebooting"


STOPPING = frozenset({State.BACK, State.BROKEN, State.PAUSED, State.UNSEEN, State.ADRIFT, State.REBOOTING})


@dataclass(frozen=True)
class Move:
    step: Step
    state: State = State.WAITING
    error: OpsctlError | None = None


@dataclass(frozen=True)
class Upgrade:
    to: str
    moves: tuple[Move, ...]
    services: tuple[Service, ...]
    allow_outage: bool = False


@dataclass(frozen=True)
class Begin:
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class End:
    """``reason``: set when no host's error says it."""

    exit_code: ExitCode
    reason: str = ""


def begun(plan: Plan, *, allow_outage: bool = False) -> Upgrade:
    moves = tuple(Move(step) for step in sorted(plan.moves, key=lambda step: step.wave))
    return Upgrade(plan.to, moves, plan.services, allow_outage)


def after(upgrade: Upgrade, host: str, state: State, error: OpsctlError | None = None) -> Upgrade:
    """``upgrade`` with one host in another state."""
    return replace(upgrade, moves=tuple(
        replace(move, state=state, error=error) if move.step.host == host else move for move in upgrade.moves))


def decide(upgrade: Upgrade, serving: Mapping[str, Collection[str]], unheard: Unheard = ALL_HEARD) -> Begin | End:
    """The next thing. ``serving``: by service the names of all its instances that get requests now.

    What is ``unheard`` is not free, and nothing begins without a word of the load balancers.
    """
    states = {move.state for move in upgrade.moves}
    if states & STOPPING:
        if State.BROKEN in states or (State.BACK in states and states & {State.ADRIFT, State.UNSEEN}):
            return End(ExitCode.MIXED)
        return End(ExitCode.ROLLED_BACK if State.BACK in states else ExitCode.PAUSED)
    waiting = [move.step for move in upgrade.moves if move.state is State.WAITING]
    if not waiting:
        return End(ExitCode.DONE)
    wave = min(step.wave for step in waiting)
    steps = [step for step in waiting if step.wave == wave]
    free = [] if unheard.why else room(steps, upgrade.services, serving, unheard)
    if free:
        return Begin(tuple(free))
    if upgrade.allow_outage and not unheard.why:
        return Begin(tuple(steps[:1]))
    counts = ", ".join(f"{len(serving.get(service.name, ()))} of {service.name} serve now and min_serving is "
                       f"{service.min_serving}" for service in upgrade.services)
    return End(ExitCode.PAUSED, f"{unheard.why.rstrip('.') or counts}: {steps[0].host} cannot be spared")


def failure(upgrade: Upgrade, end: End, run: str) -> OpsctlError | None:
    """One error for how it ended, or None: which hosts are where, and what to type next."""
    code = end.exit_code
    if code is ExitCode.DONE:
        return None
    by = {state: [move for move in upgrade.moves if move.state is state] for state in State}
    first = next((move.error for state in (State.BROKEN, State.BACK, State.ADRIFT, State.UNSEEN, State.PAUSED,
                                                State.REBOOTING)
                  for move in by[state] if move.error), None)
    why = (first.message if first else end.reason).rstrip(".")
    words = {State.CHANGED: f"on {upgrade.to}", State.BACK: "back on the old driver and serving",
             State.BROKEN: "does not serve, and stays drained", State.ADRIFT: "not known, and stays drained",
             State.UNSEEN: "well, but no load balancer is seen to send to it",
             State.REBOOTING: "reboots", State.WAITING: "not touched", State.PAUSED: "not changed"}
    where = "; ".join(f"{words[state]}: {', '.join(move.step.host for move in by[state])}"
                      for state in words if by[state])
    hints = [first.hint if first else ""]
    if code is ExitCode.ROLLED_BACK:
        failed = by[State.BACK][0].step
        hints.append(f"mend it and the same command again; or nvidia_driver_version=\"{failed.old}\" for {failed.host} "
                     "in the inventory, else the next provision tries the same there")
    else:
        hints.append(f"opsctl resume {run} goes on")
    kinds: dict[ExitCode, type[OpsctlError]] = {
        ExitCode.ROLLED_BACK: RolledBackError, ExitCode.MIXED: MixedError, ExitCode.PAUSED: PausedError}
    return kinds[code](first.code if first else f"driver.{code.name.lower()}", f"{why}; {where}.",
                       hint="; ".join(dict.fromkeys(hint for hint in hints if hint)),
                       log_tail=first.log_tail if first else ())
