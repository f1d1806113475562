"""What ``opsctl upgrade-driver`` does, in order: look, refuse or go; keep the old packages; waves; say how it ended.

Everything that can be refused is refused before a host is drained: versions, GPUs, capacity, and the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsctl.driver_upgrade import plan as plans
from opsctl.driver_upgrade import upgrade as upgrades
from opsctl.driver_upgrade.drive import Driven, Tools, drive, play, sentence
from opsctl.driver_upgrade.host import Settings, look_with
from opsctl.driver_upgrade.plan import Plan
from opsctl.driver_upgrade.upgrade import State
from opsctl.engines.events import Emit, Note, PhaseStarted
from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError, PausedError, RefusedError, UsageError
from opsctl.fleet.gpus import VERSION
from opsctl.fleet.hosts import place_of
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.placements import clashes, place
from opsctl.fleet.ssh_config import write_ssh_config
from opsctl.releases import plan as release_plans
from opsctl.releases.balancers import balancers
from opsctl.releases.remote import ask, unreachable
from opsctl.releases.settling import settle
from opsctl.releases.watch import OUT_OF_REACH
from opsctl.runs.journal import Run
from opsctl.stack.lock import FILE as LOCK
from opsctl.stack.versions import is_driver_version

Approve = Callable[[Plan], None]


@dataclass(frozen=True)
class Request:
    """What the operator asked for. ``hosts``: those that the limit left and that have a driver of opsctl's."""

    fleet: Fleet
    hosts: tuple[Host, ...]
    to: str
    bundle: Path
    waves: str = release_plans.WAVES
    drain_timeout_s: float | None = None
    allow_outage: bool = False
    via_lb: bool = False
    skip_unreachable: int = 0
    without: frozenset[str] = field(default=frozenset())

    @property
    def services(self) -> tuple[str, ...]:
        """Those that have an instance on one of the hosts: their capacity is at stake."""
        names = {host.name for host in self.hosts}
        return tuple(dict.fromkeys(one.service for one in place(self.fleet) if one.host in names))


def with_driver(hosts: tuple[Host, ...], limit: str) -> tuple[Host, ...]:
    """The hosts whose inventory names a driver; the others are nobody's of ours.

    Raises:
        UsageError: there is none.
    """
    found = tuple(host for host in hosts if host.variables.get(VERSION))
    if not found:
        raise UsageError("driver.no_hosts", f"no host{f' of --limit {limit}' if limit else ''} has {VERSION}.",
                         hint=f"{VERSION} in the inventory hands a host's driver to opsctl; opsctl provision brings "
                              "the first one")
    return found


def check_version(to: str) -> None:
    """Raises:
        UsageError: it is no exact version of a driver.
    """
    if not is_driver_version(to):
        raise UsageError("driver.bad_version", f"--to {to or 'nothing'}: it is no exact version of a driver.",
                         hint="--to 595.71.05: the whole version")


def look(request: Request, log: Path, emit: Emit) -> Plan:
    """The plan; nothing is changed.

    Raises:
        RefusedError: a driver is Debian's; the inventory wants another; hosts are silent; the version is not there or
            does not fit.
    """
    fleet = request.fleet
    emit(PhaseStarted(f"Look at {len(request.hosts)} hosts" if len(request.hosts) > 1 else
                      f"Look at {request.hosts[0].name}"))
    plans.check_source(request.hosts)
    plans.check_inventory(request.hosts, request.to, {
        host.name: str(fleet.directory / LOCK) if VERSION in host.locked else
        place_of(fleet.inventory, host.name, VERSION) for host in request.hosts})
    clashes(fleet)
    write_ssh_config(fleet)
    placements = place(fleet)
    names = {placement.host for placement in placements} | {host.name for host in request.hosts}
    states = on_each(fleet, [host for host in fleet.hosts if host.name in names],
                     lambda session: ask(session, ["state", "--json"], host=session.host.name))
    looks = on_each(fleet, request.hosts, look_with)
    _check_heard(request, {**{host.name: states[host.name] for host in request.hosts}, **{
        name: answer for name, answer in looks.items() if isinstance(answer, OpsctlError)}}, emit)
    lb = balancers(fleet, request.without)
    try:
        rotating = lb.rotating([f"{one.host}.{one.instance}" for one in placements])
    except PausedError as error:
        raise RefusedError(error.code, error.message, hint="mend it, then the same again; nothing was changed",
                           log_tail=error.log_tail) from error
    finally:
        lb.close()
    plan = plans.make_plan(request.to, request.hosts, fleet.services, placements, states, looks, waves=request.waves,
                           rotating=rotating)
    wanted = [step.host for step in plan.moves if step.action == "change"]
    if wanted:
        _must(play(Tools(fleet, request.bundle, log), wanted, ["check"], emit), "driver.preflight",
              "nothing was changed; mend it and run the same again")
    return plan


def upgrade_driver(request: Request, run: Run, emit: Emit, approve: Approve) -> dict[str, Any]:
    """Brings every host to the driver. Nothing to do is ``changed`` 0.

    ``approve`` gets the plan and raises when the operator says no. Returns ``{"run", "to", "changed", "hosts":
    [{"host", "from", "driver", "state", "instances": {name: seconds out of rotation}}], "skipped"}``.

    Raises:
        RefusedError: a check said no; nothing was changed.
        RolledBackError: a host failed, and serves on its old driver; those before it stay on the new one.
        MixedError: it does not serve.
        PausedError: not drained in time, not heard, this machine reboots; ``opsctl resume`` goes on.
    """
    log = run.directory / "ansible.log"
    _settle(request, run, emit)
    plan = look(request, log, emit)
    if not plan.moves:
        return _document(request, run, plan, None)
    plans.check(plan, allow_outage=request.allow_outage)
    approve(plan)
    tools = Tools(request.fleet, request.bundle, log)
    fresh = [step.host for step in plan.moves if step.action == "change"]
    if fresh:
        run.about_to()
        _must(play(tools, fresh, ["keep"], emit), "driver.no_way_back",
              "no host was drained; mend it and run the same again")
    settings = Settings(run.name, request.to, request.drain_timeout_s, request.via_lb, request.without, run.check,
                        run.about_to)
    driven = drive(tools, upgrades.begun(plan, allow_outage=request.allow_outage), settings, emit)
    error = upgrades.failure(driven.upgrade, driven.end, run.name)
    if error is not None:
        raise error
    return _document(request, run, plan, driven)


def _settle(request: Request, run: Run, emit: Emit) -> None:
    """Ends the drains that dead runs left, but those of hosts whose driver is being changed: they are still needed."""
    def changing(session: Session) -> bool:
        return look_with(session)["change"] is not None

    answers = on_each(request.fleet, request.hosts, changing)
    hosts = [host for host in request.hosts if answers[host.name] is False]
    for service in request.services:
        settle(request.fleet, request.fleet.service(service), hosts, run.check, emit)


def _check_heard(request: Request, answers: Mapping[str, Any], emit: Emit) -> None:
    silent = {name: answer for name, answer in answers.items() if isinstance(answer, OpsctlError)}
    for error in silent.values():
        if error.code not in OUT_OF_REACH:
            raise error
    if len(silent) > request.skip_unreachable:
        raise unreachable(silent)
    for name, error in silent.items():
        emit(Note(f"left out, and counted as not serving: {error.message}", "warning", name))


def _must(outcome: Any, code: str, hint: str) -> None:
    """Raises:
        RefusedError: a task failed, on some host.
    """
    if outcome.failures:
        failure = outcome.failures[0]
        others = sorted({one.host for one in outcome.failures} - {failure.host})
        also = f" (also on {', '.join(others)})" if others else ""
        raise RefusedError(code, sentence(failure) + also, hint=hint, log_tail=failure.detail)
    if outcome.exit_code:
        raise RefusedError(code, f"ansible-playbook ended with exit code {outcome.exit_code}.", hint=hint)


def _document(request: Request, run: Run, plan: Plan, driven: Driven | None) -> dict[str, Any]:
    states = {move.step.host: move.state for move in driven.upgrade.moves} if driven else {}
    rows = [{"host": step.host, "from": step.old, "driver": request.to,
             "state": "changed" if states.get(step.host) is State.CHANGED else "there already",
             "instances": driven.timings.get(step.host, {}) if driven else {}} for step in plan.steps]
    return {"run": run.name, "to": request.to, "changed": sum(row["state"] == "changed" for row in rows), "hosts": rows,
            "skipped": list(plan.silent)}
