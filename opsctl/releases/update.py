"""What ``opsctl update-model`` and ``opsctl rollback`` do, in order: look, plan, ask, stage, roll out, write down.

The ledger gets its line when the last instance has passed its gate, not before: until then the fleet should serve what
it served. A rollout that stopped is continued by the same command, taken back by ``opsctl rollback``.
"""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsctl.agent.ledger import Line, bad_digests, tip
from opsctl.engines.events import Emit, Note, PhaseStarted
from opsctl.engines.pyinfra import gather
from opsctl.engines.session import Session, on_each
from opsctl.errors import ExitCode, MixedError, OpsctlError, PausedError, RefusedError, RolledBackError, UsageError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.fleet.placements import clashes, place
from opsctl.fleet.ssh_config import write_ssh_config
from opsctl.releases import plan as plans
from opsctl.releases import rollout as rollouts
from opsctl.releases.balancers import balancers
from opsctl.releases.books import Books, read_books, write_lines
from opsctl.releases.plan import Plan, Target
from opsctl.releases.remote import unreachable
from opsctl.releases.roll import Rolled, Settings, roll
from opsctl.releases.rollout import OnFailure, State
from opsctl.releases.settling import settle
from opsctl.releases.staging import find_release, stage_release
from opsctl.releases.targets import check_not_bad, rollback_target
from opsctl.releases.watch import OUT_OF_REACH
from opsctl.runs.journal import Run

REACH_TIMEOUT_S = 20.0

Approve = Callable[[Plan], None]
States = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """What the operator asked for. ``version``: empty lets a rollback choose.

    ``hosts``: those that the limit left, without those on hold, which are ``held``.
    """

    fleet: Fleet
    service: Service
    hosts: tuple[Host, ...]
    version: str = ""
    bundle: Path | None = None
    waves: str = plans.WAVES
    drain_timeout_s: float | None = None
    min_speed_percent: int | None = None
    rate_limit: int = 0
    on_failure: OnFailure = "revert"
    allow_outage: bool = False
    allow_bad: bool = False
    via_lb: bool = False
    skip_unreachable: int = 0
    held: frozenset[str] = frozenset()

    @property
    def whole(self) -> bool:
        """Whether all hosts of the service are meant; only then the ledger can say that the fleet serves it.

        A host on hold was meant, and is behind until its next update.
        """
        return {host.name for host in _serving_hosts(self)} <= {host.name for host in self.hosts} | self.held


@dataclass(frozen=True)
class Looked:
    """What a change would do, and what it leaves: digest -> version of releases that it marks as bad."""

    plan: Plan
    books: Books
    leaves: Mapping[str, str] = field(default_factory=dict)
    without: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Seen:
    """Hosts' states (or errors), who gets requests by all load balancers, and load balancers that are left out."""

    states: States
    rotating: frozenset[str]
    without: frozenset[str]


def look_forward(request: Request, emit: Emit) -> Looked:
    """The plan of ``update_model``; nothing is changed.

    Raises:
        UsageError: there is no such version.
        RefusedError: it is marked as bad, hosts are silent, or a release is not to be trusted.
    """
    looked = _look(request, emit)
    books = read_books(request.fleet, request.service, emit)
    target, on_gateway = _target(request, looked.states, emit)
    check_not_bad(books.lines, target.digest, request.allow_bad)
    stage_plans = _stage_plans(request, target) if on_gateway else {}
    return Looked(_plan(request, target, looked, books, stage_plans), books, without=looked.without)


def look_back(request: Request, emit: Emit) -> Looked:
    """The plan of ``roll_back``; nothing is changed. An unfinished rollout goes back to what the ledger says.

    Raises:
        RefusedError: there is nothing to go back to; the candidates come with their reasons.
    """
    looked = _look(request, emit)
    books = read_books(request.fleet, request.service, emit)
    now = tip(books.lines)
    if now is None:
        raise RefusedError("rollback.no_ledger", f"the ledger of {request.service.name} is empty: it never served.",
                           hint="opsctl provision brings first_release up")
    ahead = plans.unfinished(looked.states, request.service.name, books.lines)
    if ahead and not request.version and now.digest not in bad_digests(books.lines):
        emit(Note(f"a rollout to {', '.join(sorted(set(ahead.values())))} did not end: back to {now.version}"))
        target = Target(request.service.name, now.version, now.digest)
        leaves = dict(ahead)
    else:
        meant = {host.name for host in request.hosts}
        answered = {name: state for name, state in looked.states.items()
                    if name in meant and not isinstance(state, OpsctlError)}
        chosen = rollback_target(books.lines, answered, request.version)
        target = Target(request.service.name, chosen.version, chosen.digest)
        leaves = {**ahead, now.digest: now.version}
    leaves.pop(target.digest, None)
    return Looked(_plan(request, target, looked, books, {}), books, leaves, looked.without)


def update_model(request: Request, run: Run, emit: Emit, approve: Approve) -> dict[str, Any]:
    """Brings every instance of a service to a version. Nothing to do is ``changed`` 0.

    ``approve`` gets the plan and raises when the operator says no. Returns ``{"run", "service", "from", "to",
    "changed", "instances": [{"host", "instance", "release", "state", "out_of_rotation_s", ...}], "ledger"}``.

    Raises:
        RefusedError: a check said no; nothing was changed.
        RolledBackError: an instance failed; it and what had been moved are back.
        MixedError: and not all could be brought back.
        PausedError: inconclusive, not drained in time, agent not heard; the same command again continues.
    """
    settle(request.fleet, request.service, request.hosts, run.check, emit)
    looked = look_forward(request, emit)
    plan, target = looked.plan, looked.plan.target
    if plan.moves:
        plans.check(plan, allow_outage=request.allow_outage)
        approve(plan)
        lacking = [request.fleet.host(part.host) for part in plan.hosts if not part.staged]
        if lacking:
            stage_release(request.fleet, lacking, request.service, target.release, emit,
                          rate_limit=request.rate_limit, bundle=request.bundle)
    rolled = _roll(request, looked, run, emit, speed=None)
    lines = [] if _tip_is(looked.books, target) else [("serve", target.version, target.digest, "")]
    return _finish(request, run, emit, looked, rolled, lines)


def roll_back(request: Request, run: Run, emit: Emit, approve: Approve) -> dict[str, Any]:
    """Brings a service back to an earlier release, which lies on every host already; marks what it leaves as bad.

    Works without the gateway. Returns as ``update_model``, and ``"bad"``: the versions that were marked.

    Raises: as ``update_model``.
    """
    settle(request.fleet, request.service, request.hosts, run.check, emit)
    looked = look_back(request, emit)
    plan, target = looked.plan, looked.plan.target
    if plan.moves:
        plans.check(plan, allow_outage=request.allow_outage)
        approve(plan)
    rolled = _roll(request, looked, run, emit, speed=0)
    lines = [("bad", version, digest, "rolled back") for digest, version in looked.leaves.items()]
    if not _tip_is(looked.books, target):
        lines.append(("serve", target.version, target.digest, "rollback"))
    document = _finish(request, run, emit, looked, rolled, lines)
    return {**document, "bad": sorted(looked.leaves.values()) if request.whole else []}


def _look(request: Request, emit: Emit) -> _Seen:
    emit(PhaseStarted(f"Look at {request.service.name}"))
    clashes(request.fleet)
    write_ssh_config(request.fleet)
    states, silent = _states(request)
    off = _silent_balancers(request, set(states))
    if len({*silent, *off} - request.held) > request.skip_unreachable:
        gone = {name: error for name, error in {**silent, **off}.items() if error.code in OUT_OF_REACH}
        raise unreachable(gone) if gone else next(iter({**silent, **off}.values()))
    for name, error in states.items():
        if isinstance(error, OpsctlError):
            emit(Note(f"left out, and counted as not serving: {error.message}", "warning", name))
    for name, error in off.items():
        emit(Note(f"left out: what this load balancer does is not seen: {error.message}", "warning", name))
    names = [f"{placement.host}.{placement.instance}" for placement in place(request.fleet)
             if placement.service == request.service.name]
    lb = balancers(request.fleet, off)
    try:
        return _Seen(states, lb.rotating(names), frozenset(off))
    except PausedError as error:
        raise RefusedError(error.code, error.message, hint="mend it, then the same again; nothing was changed",
                           log_tail=error.log_tail) from error
    finally:
        lb.close()


def _silent_balancers(request: Request, known: set[str]) -> dict[str, OpsctlError]:
    """Load balancers that do not answer over SSH, of those that were not asked already."""
    if request.fleet.load_balancer != "haproxy":
        return {}
    hosts = [host for host in request.fleet.group("lb") if host.name not in known]
    answers = on_each(request.fleet, hosts, lambda session: session.run(["true"], timeout_s=REACH_TIMEOUT_S))
    return {name: answer for name, answer in answers.items() if isinstance(answer, OpsctlError)}


def _serving_hosts(request: Request) -> list[Host]:
    return [host for host in request.fleet.hosts if request.service.group in host.groups]


def _states(request: Request) -> tuple[dict[str, Any], dict[str, OpsctlError]]:
    """What every host of the service says, those outside the limit too: they count for the budget.

    The second is what hosts said that are meant and cannot be asked.
    """
    hosts = _serving_hosts(request)
    facts = gather(request.fleet, hosts)
    states = {name: fact if isinstance(fact, OpsctlError) else fact.state for name, fact in facts.items()}
    meant = {host.name for host in request.hosts}
    return states, {name: fact for name, fact in facts.items() if isinstance(fact, OpsctlError) and name in meant}


def _target(request: Request, states: States, emit: Emit) -> tuple[Target, bool]:
    """The wanted release, and whether the gateway has it. Without a gateway: if every host has it already.

    Raises:
        UsageError: no such version.
        RefusedError: the gateway is silent and not every host has the release.
    """
    name = request.service.name
    try:
        with Session(request.fleet, request.fleet.group("gateway")[0]) as session:
            found = find_release(request.fleet, session, request.service, request.version, bundle=request.bundle)
    except OpsctlError as error:
        if error.code not in OUT_OF_REACH:
            raise
        digests = _everywhere(states, name, request.version)
        if len(digests) != 1:
            raise RefusedError(error.code, f"{error.message.rstrip('.')}, and not every host has {request.version} "
                               "staged.", hint=error.hint, log_tail=error.log_tail) from error
        emit(Note(f"the gateway does not answer; every host has {request.version} already", "warning"))
        return Target(name, request.version, digests.pop()), False
    return Target(name, found.version, found.digest, found.size), found.on_gateway


def _everywhere(states: States, service: str, version: str) -> set[str]:
    """Digests of ``version`` that are complete on every host that answered."""
    each = [{release["digest"] for release in state["releases"]
             if release["service"] == service and release["version"] == version and release["complete"]
             and release.get("engine_built", True)}
            for state in states.values() if not isinstance(state, OpsctlError)]
    return set.intersection(*each) if each else set()


def _stage_plans(request: Request, target: Target) -> dict[str, Mapping[str, Any]]:
    key = (target.service, target.release)
    hosts = [host for host in request.hosts if request.service.group in host.groups]
    facts = gather(request.fleet, hosts, plans=[key])
    return {name: fact.stage_plans[key] for name, fact in facts.items()
            if not isinstance(fact, OpsctlError) and key in fact.stage_plans}


def _plan(request: Request, target: Target, seen: _Seen, books: Books,
          stage_plans: Mapping[str, Mapping[str, Any]]) -> Plan:
    states = seen.states
    placements = [placement for placement in place(request.fleet) if placement.service == request.service.name]
    chosen = frozenset(host.name for host in request.hosts
                       if not isinstance(states.get(host.name), OpsctlError))
    if not any(placement.host in chosen for placement in placements):
        raise UsageError("update.no_instances", f"no host that was meant has an instance of {request.service.name}.",
                         hint=f"hosts of {request.service.group}: "
                         + ", ".join(host.name for host in _serving_hosts(request)))
    last = tip(books.lines)
    return plans.make_plan(
        request.service, target, placements, states, stage_plans=stage_plans, waves=request.waves, chosen=chosen,
        rotating=seen.rotating,
        tip=Target(request.service.name, last.version, last.digest) if last else None)


def _roll(request: Request, looked: Looked, run: Run, emit: Emit, *, speed: int | None) -> Rolled:
    service, plan = request.service, looked.plan
    rollout = rollouts.begun(plan, allow_outage=request.allow_outage, on_failure=request.on_failure)
    wanted_speed = request.min_speed_percent if request.min_speed_percent is not None else service.min_speed_percent
    settings = Settings(run.name, request.drain_timeout_s or service.drain_timeout_s,
                        wanted_speed if speed is None else speed, request.via_lb, looked.without, run.check,
                        run.about_to)
    rolled = roll(request.fleet, service, rollout, settings, emit)
    error = failure(rolled, plan)
    if error is not None:
        raise error
    return rolled


def failure(rolled: Rolled, plan: Plan) -> OpsctlError | None:
    """One error for how a rollout ended, or None. Pure; says which instances are where and what to type next."""
    code = rolled.end.exit_code
    if code is ExitCode.DONE:
        return None
    moves = rolled.rollout.moves
    worst = (State.BROKEN, State.STUCK, State.FAILED, State.ADRIFT, State.PAUSED, State.LEFT)
    first = next((move.error for wanted in worst
                  for move in moves if move.state is wanted and move.error), None)
    kinds: dict[ExitCode, type[OpsctlError]] = {
        ExitCode.ROLLED_BACK: RolledBackError, ExitCode.MIXED: MixedError, ExitCode.PAUSED: PausedError}
    target = plan.target.version
    ahead = [move.step.name for move in moves if move.state in (State.MOVED, State.STUCK)]
    perhaps = [move.step.name for move in moves if move.state is State.ADRIFT]
    why = (first.message if first else rolled.end.reason).rstrip(".")
    where = f"on {target}: {', '.join(ahead) or 'none'}" + (f"; perhaps: {', '.join(perhaps)}" if perhaps else "")
    back = f"opsctl rollback takes {target} back" if ahead or perhaps else ""
    hints = [first.hint if first else ""]
    if code is ExitCode.ROLLED_BACK:
        went = [move.step.name for move in moves if move.state is State.REVERTED]
        where = "every instance serves what it served before" + (f" ({', '.join(went)} went back)" if went else "")
        hints = ["the log above is the failing unit's; mend the release and import it under a new version"]
    elif code is ExitCode.MIXED:
        where += "; the others are not"
        hints += [back, f"opsctl update-model --version {target} goes on" if ahead else "opsctl status"]
    else:
        hints += ["the same command again continues", back]
    hint = "; ".join(dict.fromkeys(one for one in hints if one))
    return kinds[code](first.code if first else f"rollout.{code.name.lower()}", f"{why}; {where}.", hint=hint,
                       log_tail=first.log_tail if first else ())


def _finish(request: Request, run: Run, emit: Emit, looked: Looked, rolled: Rolled,
            wanted: Sequence[tuple[str, str, str, str]]) -> dict[str, Any]:
    """Writes the ledger and describes what was done. ``wanted``: action, version, digest, note of each new line."""
    plan, books = looked.plan, looked.books
    moved = [move.step for move in rolled.rollout.moves if move.state is State.MOVED and not move.step.earlier]
    written = wanted if request.whole else ()
    if len(written) < len(wanted):
        emit(Note("the ledger stays as it is: only a part of the hosts was meant", "warning"))
    if written:
        run.about_to()
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        by = f"{getpass.getuser()}@{socket.gethostname()}"
        lines = [Line(number, version, digest, at, by, run.name, note, action)
                 for number, (action, version, digest, note) in enumerate(written, len(books.lines) + 1)]
        try:
            write_lines(request.fleet, request.service, books, lines, emit)
        except OpsctlError as error:
            raise MixedError(error.code, f"{request.service.name} is on {plan.target.version}, and the ledger could "
                             f"not be written: {error.message}", hint=f"{error.hint}; the same command again writes it",
                             log_tail=error.log_tail) from error
    _check_served(request, looked, rolled)
    last = tip(books.lines)
    return {
        "run": run.name, "service": request.service.name, "from": last.version if last else "",
        "to": plan.target.version, "digest": plan.target.digest, "changed": len(moved) + len(written),
        "instances": [_row(step, rolled) for step in plan.steps], "skipped": list(plan.silent),
        "ledger": len(books.lines) + len(written),
    }


def _check_served(request: Request, looked: Looked, rolled: Rolled) -> None:
    """All that was meant serves now, but what somebody keeps drained: the last look of a change.

    Raises:
        PausedError: some instance does not; the ledger is written, the others serve.
    """
    states, _ = _states(request)
    names: dict[str, Mapping[str, Any]] = {}
    for step in looked.plan.steps:
        state = states[step.host]
        for instance in () if isinstance(state, OpsctlError) else state["instances"]:
            if instance["instance"] == step.instance and int(instance.get("weight", 100)) > 0:
                names[step.name] = instance
    lb = balancers(request.fleet, looked.without)
    try:
        rotating = lb.rotating(list(names))
        lacking = [name for name, instance in names.items()
                   if (name not in rotating and not lb.claimed(name)) or not plans.serves(instance)]
    finally:
        lb.close()
    lacking += [step.name for step in looked.plan.steps if isinstance(states[step.host], OpsctlError)]
    if not lacking:
        return
    errors = {move.step.name: move.error for move in rolled.rollout.moves if move.state is State.LEFT and move.error}
    first = next((errors[name] for name in lacking if name in errors), None)
    raise PausedError(
        first.code if first else "update.not_serving",
        f"{request.service.name} is on {looked.plan.target.version}, but {', '.join(lacking)} "
        f"{'does' if len(lacking) == 1 else 'do'} not serve" + (f": {first.message}" if first else "."),
        hint="opsctl status and the unit's log there; the same command again tries them",
        log_tail=first.log_tail if first else ())


def _row(step: plans.Step, rolled: Rolled) -> dict[str, Any]:
    timing = rolled.timings.get(step.name)
    return {"host": step.host, "instance": step.instance, "from": step.now, "release": step.next,
            "state": "moved" if step.action == "move" else "there already",
            **(timing.as_document() if timing else {})}


def _tip_is(books: Books, target: Target) -> bool:
    last = tip(books.lines)
    return last is not None and last.digest == target.digest

