"""After Ansible: the ledger's release to the gateway and to every host, and onto instances that have never served.

An instance that has served is never moved, whatever it serves. Decisions (``plan_host``, ``outcome``) are pure; the
rest asks and orders ``opsctl-host``.
"""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsctl.agent.ledger import line_of
from opsctl.agent.manifest import split_directory_name
from opsctl.agent.trust import read_signed
from opsctl.engines.events import Emit, Note, TaskResult, one_at_a_time
from opsctl.engines.session import Session, on_each
from opsctl.errors import MixedError, OpsctlError, PausedError, RefusedError, RolledBackError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.fleet.placements import gateway as gateway_of
from opsctl.releases.balancers import ROTATION_S
from opsctl.releases.books import Books, read_books, write_lines
from opsctl.releases.ledger import Line, Wanted, tip, wanted
from opsctl.releases.remote import ask, has_agent
from opsctl.releases.staging import allowed_signers, bring_to_gateway, verified
from opsctl.releases.store import folders_of, releases_of
from opsctl.releases.watch import watch
from opsctl.status import SERVING, instance_state


@dataclass(frozen=True)
class HostPlan:
    """The instances of one host that wait for their first start, and those on another release."""

    start: tuple[str, ...]
    behind: tuple[str, ...]


@dataclass
class HostResult:
    """What was done on one host. ``instances`` are rows: host, instance, release, state."""

    changed: int = 0
    instances: list[dict[str, str]] = field(default_factory=list)
    errors: list[OpsctlError] = field(default_factory=list)


def check_releases(fleet: Fleet, emit: Emit, *, bundle: Path | None = None) -> None:
    """Asks, before anything is touched, whether the releases that would be brought up are there and signed.

    Raises:
        RefusedError: wanted and nowhere, unsigned, foreign, tampered.
    """
    gateway = gateway_of(fleet)
    with Session(fleet, gateway) as session:
        known = has_agent(session)
        for service in fleet.services:
            lines = _shown(session, gateway, service) if known else ()
            want = _wanted(fleet, session if known else None, gateway, service, lines, _bundle(fleet, bundle))
            if want is None:
                continue
            for directory in folders_of(_bundle(fleet, bundle), service.name, want.version):
                if want.on_gateway:  # nothing of it will be sent; what is wrong with it is said all the same
                    read_signed(directory, allowed_signers(fleet))
                else:
                    verified(fleet, directory, emit)


def bring_up(fleet: Fleet, emit: Emit, *, hosts: Sequence[Host] | None = None, bundle: Path | None = None,
             run: str = "") -> dict[str, Any]:
    """Publishes, writes the ledger's first line, stages and first-starts. Nothing to do is ``changed`` 0.

    ``hosts``: only these; the gateway is asked in any case. Returns ``{"changed", "instances": [{"host", "instance",
    "release", "state"}]}``; ``state`` is ``started``, ``behind``, or what ``opsctl status`` says.

    Raises:
        RefusedError: a release is missing or not to be trusted.
        RolledBackError: no instance came up that should have; each is as it was.
        MixedError: some did and some did not.
    """
    gateway = gateway_of(fleet)
    chosen = {host.name for host in (fleet.hosts if hosts is None else hosts)}
    emit = one_at_a_time(emit)
    changed = 0
    rows: list[dict[str, str]] = []
    errors: list[OpsctlError] = []
    for service in fleet.services:
        try:
            with Session(fleet, gateway) as session:
                books = read_books(fleet, service, emit)  # a gateway that was lost gets its ledger from the copies
                want = _wanted(fleet, session, gateway, service, books.lines, _bundle(fleet, bundle))
                if want is None:
                    emit(Note(f"{service.name} has no release yet: opsctl model import, and first_release in "
                              "services.yml"))
                    continue
                changed += _publish(fleet, session, gateway, want, _bundle(fleet, bundle), emit)
                changed += _write_ledger(fleet, books, want, run, emit)
        except OpsctlError as error:  # one service's trouble is not the other's
            errors.append(error)
            emit(TaskResult(gateway.name, f"bring up {service.name}", "failed", error.message, error.log_tail))
            continue
        serving = [host for host in fleet.group(service.group) if host.name in chosen]
        results = on_each(fleet, serving, lambda session, want=want: _host(session, want, emit))  # type: ignore[misc]
        for host in serving:
            result = results[host.name]
            if isinstance(result, OpsctlError):
                errors.append(result)
                emit(TaskResult(host.name, f"bring up {service.name}", "failed", result.message, result.log_tail))
                continue
            changed += result.changed
            rows += result.instances
            errors += result.errors
    _wait_for_rotation(fleet, [row for row in rows if row["state"] == "started"], chosen, emit)
    failure = outcome(errors, started=any(row["state"] == "started" for row in rows), changed=changed > 0)
    if failure is not None:
        raise failure
    return {"changed": changed, "instances": rows}


def plan_host(state: Mapping[str, Any], want: Wanted) -> HostPlan:
    """What is to do on a host, from its ``opsctl-host state``. Pure. A first start that was cut off begins again."""
    mine = [instance for instance in state["instances"] if instance["service"] == want.service]
    start = tuple(instance["instance"] for instance in mine if not instance["release"] or instance.get("unfinished"))
    behind = tuple(instance["instance"] for instance in mine
                   if instance["instance"] not in start and instance["digest"] != want.digest)
    return HostPlan(start, behind)


def outcome(errors: Sequence[OpsctlError], *, started: bool, changed: bool) -> OpsctlError | None:
    """One error for all that failed, or None. Pure.

    All of one kind and nothing changed: that kind, for the fleet is as it was. First starts that were undone leave
    a staged release behind and serving as it was, so they keep their kind too. Otherwise the fleet is mixed.
    """
    if not errors:
        return None
    first = errors[0]
    others = f" ({len(errors)} failures in all)" if len(errors) > 1 else ""
    kinds = {type(error) for error in errors}
    alike = len(kinds) == 1 and type(first) is not OpsctlError
    as_it_was = not changed or (kinds == {RolledBackError} and not started)
    kind = type(first) if alike and as_it_was else MixedError
    return kind(first.code, first.message + others, hint=first.hint or "mend it and run the same command again",
                log_tail=first.log_tail)


def _host(session: Session, want: Wanted, emit: Emit) -> HostResult:
    """Stages and first-starts on one host. Raises what keeps the whole host from going on."""
    host = session.host.name
    state = ask(session, ["state", "--json"], host=host)
    plan = plan_host(state, want)
    result = HostResult()
    where = ["--service", want.service, "--release", want.release]
    done = _watched(session, ["stage", *where], ["stage-status", *where], f"stage {want.release}", emit)
    if done["changed"]:
        result.changed += 1
        emit(TaskResult(host, f"stage {want.service} {want.version}", "changed"))
    for instance in plan.start:
        try:
            where = [instance, "--release", want.release]
            done = _watched(session, ["first-start", *where], ["first-start-status", *where], f"start {instance}", emit)
        except (RolledBackError, PausedError) as error:
            result.errors.append(error)
            emit(TaskResult(host, f"first start of {instance}", "failed", error.message, error.log_tail))
            result.instances.append(_row(host, instance, "", "did not start"))
            continue
        if not done["changed"]:  # a cutover of it had been cut off: it is undone, and serves again what it served
            version, _ = split_directory_name(done["release"])
            result.instances.append(_row(host, instance, version,
                                         SERVING if done["release"] == want.release else "behind"))
            continue
        result.changed += 1
        emit(TaskResult(host, f"first start of {instance} on {want.version}", "changed"))
        result.instances.append(_row(host, instance, want.version, "started"))
    for found in state["instances"]:
        if found["service"] != want.service or found["instance"] in plan.start:
            continue
        behind = found["instance"] in plan.behind
        if behind:
            emit(Note(f"{found['instance']} serves {found['release']}, the ledger says {want.version}; it is not moved",
                      "warning", host))
        result.instances.append(_row(host, found["instance"], found["release"],
                                     "behind" if behind else instance_state(found)))
    return result


def _wait_for_rotation(fleet: Fleet, started: Sequence[Mapping[str, str]], chosen: set[str], emit: Emit) -> None:
    """Until every load balancer sends requests to what was started: only then a client gets an answer.

    An instance that serves and is not in rotation in time is told, not undone: the load balancer may be the ill one.
    """
    if not started or fleet.load_balancer != "haproxy":
        return
    names = [f"{row['host']}.{row['instance']}" for row in started]
    wanted_ones = [word for name in names for word in ("--wanted", name)]

    def look(session: Session) -> list[str]:
        seen = ask(session, ["balancer", *wanted_ones, "--wait-s", str(ROTATION_S)], host=session.host.name)
        return list(seen["missing"])

    balancers = [host for host in fleet.group("lb") if host.name in chosen]
    for name, lacking in on_each(fleet, balancers, look).items():
        if isinstance(lacking, OpsctlError):
            emit(Note(f"was not seen sending requests to {', '.join(names)}: {lacking.message}", "warning", name))
        elif lacking:
            emit(Note(f"sends no requests to {', '.join(lacking)} yet; its statistics page (port 8404) tells why",
                      "warning", name))
        else:
            emit(TaskResult(name, f"sends requests to {', '.join(names)}", "ok"))


def _row(host: str, instance: str, release: str, state: str) -> dict[str, str]:
    return {"host": host, "instance": instance, "release": release, "state": state}


def _watched(session: Session, begin: list[str], look: list[str], subject: str, emit: Emit) -> dict[str, Any]:
    """Starts a job on the host and watches it to its end."""
    first = ask(session, [*begin, "--wait-s", "0"], host=session.host.name)
    return watch(session, look, subject, emit, first=first)


def _wanted(fleet: Fleet, session: Session | None, gateway: Host, service: Service, lines: Sequence[Line], bundle: Path
            ) -> Wanted | None:
    there: list[dict[str, Any]] = []
    if session is not None:
        there = ask(session, ["releases", "--service", service.name], host=gateway.name)["releases"]
    here = [stored.as_document() for stored in releases_of(bundle, service.name)]
    try:
        return wanted(service, lines, there, here)
    except RefusedError:
        last = tip(lines)
        for directory in folders_of(bundle, service.name, last.version if last else service.first_release):
            read_signed(directory, allowed_signers(fleet))  # it is there, and says what is wrong with it
        raise


def _shown(session: Session, gateway: Host, service: Service) -> tuple[Line, ...]:
    """The ledger as the gateway has it."""
    shown = ask(session, ["ledger-show", "--service", service.name], host=gateway.name)["lines"]
    return tuple(map(line_of, shown))


def _publish(fleet: Fleet, session: Session, gateway: Host, want: Wanted, bundle: Path, emit: Emit) -> int:
    if want.on_gateway:
        return 0
    return int(bring_to_gateway(fleet, session, gateway, want.service, want.release, bundle, emit))


def _write_ledger(fleet: Fleet, books: Books, want: Wanted, run: str, emit: Emit) -> int:
    """The ledger's first line. A ledger that says something is left alone."""
    if want.lines:
        return 0
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    by = f"{getpass.getuser()}@{socket.gethostname()}"
    line = Line(1, want.version, want.digest, at, by, run, "first release")
    return len(write_lines(fleet, want.service, books, [line], emit).lines) - len(books.lines)


def _bundle(fleet: Fleet, bundle: Path | None) -> Path:
    return bundle or fleet.directory / "bundle"
