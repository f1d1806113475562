"""``opsctl gc``: takes releases away that no host needs any more. ``keep`` decides and is pure.

Kept on each host: what its instances serve, what the ledger says, where a rollback would go, and as many more of the
newest that are not bad as were asked for. Of a service that left services.yml nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsctl.agent.ledger import Line, bad_digests, tip
from opsctl.agent.manifest import directory_name
from opsctl.engines.events import Emit, TaskResult
from opsctl.engines.pyinfra import Order, carry_out
from opsctl.engines.session import Session, on_each
from opsctl.errors import MixedError, OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host
from opsctl.releases.books import keepers, read_books
from opsctl.releases.remote import ask
from opsctl.releases.targets import rollback_target
from opsctl.status import gather

State = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One host: release folders that stay, each with why, and those that go, each with its bytes on that disk."""

    host: str
    keep: Mapping[str, str]
    remove: Mapping[str, int]
    engines: tuple[str, ...]
    size: int  # bytes that come free: what a hard link shares with what stays does not


@dataclass(frozen=True)
class Everything:
    """What a collection would do, by service, and releases of services that left services.yml, by where they lie."""

    parts: Mapping[str, tuple[Part, ...]]
    behind: Mapping[str, list[str]]

    @property
    def found(self) -> int:
        """How many hosts have something to remove, once for each service."""
        return sum(bool(part.remove or part.engines) for several in self.parts.values() for part in several)

    @property
    def size(self) -> int:
        """Bytes that come free."""
        return sum(part.size for several in self.parts.values() for part in several)


def keep(service: str, lines: Sequence[Line], state: State, target: str, more: int) -> dict[str, str]:
    """The releases of ``service`` that stay on a host, by folder name, and why. Pure.

    ``target`` is the release that a rollback would go to, empty when there is none.
    """
    mine = [one for one in state["releases"] if one["service"] == service]
    names = {directory_name(one["version"], one["digest"]): one for one in mine}
    why: dict[str, str] = {}
    for instance in state["instances"]:
        if instance["service"] == service and instance["digest"]:
            why.setdefault(directory_name(instance["release"], instance["digest"]), f"{instance['instance']} serves it")
    now = tip(lines)
    if now is not None:
        why.setdefault(now.release, "the ledger says it")
    if target:
        why.setdefault(target, "a rollback goes there")
    bad = bad_digests(lines)
    rest = sorted((name for name, one in names.items() if name not in why and one["digest"] not in bad),
                  key=lambda name: (names[name]["created"], name), reverse=True)
    for name in rest[:more]:
        why[name] = "one more" if more == 1 else "among the newest"
    return {name: reason for name, reason in why.items() if name in names}


def look_at_all(fleet: Fleet, hosts: Sequence[Host], service: str, more: int, emit: Emit) -> Everything:
    """What a collection would do on ``hosts``, of ``service`` or, when it is empty, of all; nothing is changed.

    Raises:
        UsageError: there is no such service, in services.yml or on hosts.
        RefusedError: a host does not answer, or the ledger cannot be read.
    """
    states = survey(fleet, hosts)
    behind = left_behind(fleet, states)
    if service and service not in behind:
        fleet.service(service)
    names = [service] if service else [one.name for one in fleet.services]
    parts = {name: look(fleet, name, states, more, emit) for name in names}
    return Everything(parts, {name: where for name, where in behind.items() if name not in names})


def survey(fleet: Fleet, hosts: Sequence[Host]) -> dict[str, State]:
    """What every host has that may have had an instance of any service, of ``hosts`` only.

    Raises:
        RefusedError: one of them does not answer: where a rollback goes depends on each.
    """
    chosen = {host.name for host in hosts}
    states: dict[str, State] = {}
    for name, state in gather(fleet, [host for host in keepers(fleet, "") if host.name in chosen]).items():
        if isinstance(state, OpsctlError):
            raise RefusedError(state.code, state.message, hint=f"where a rollback goes depends on every host; --limit "
                               f"'!{name}' goes on without it", log_tail=state.log_tail)
        if state:  # else it is not provisioned
            states[name] = state
    return states


def look(fleet: Fleet, service: str, states: Mapping[str, State], more: int, emit: Emit) -> tuple[Part, ...]:
    """What a collection would do on each host of ``states``; nothing is changed. Hosts without any are left out.

    Raises:
        RefusedError: the ledger cannot be read.
        OpsctlError: what a host said.
    """
    having = {name: state for name, state in states.items()
              if any(one["service"] == service for one in state["releases"])}
    serving = {name: state for name, state in states.items()
               if any(one["service"] == service for one in state["instances"])}
    lives = any(one.name == service for one in fleet.services)
    lines = read_books(fleet, service, emit, looking=True).lines if lives and having else ()
    target = _target(lines, serving)
    kept = {name: keep(service, lines, state, target, more if lives else 0) for name, state in having.items()}

    def would(session: Session) -> Mapping[str, Any]:
        name = session.host.name
        verb = ["gc", "--service", service, *(word for release in kept[name] for word in ("--keep", release))]
        return ask(session, [*verb, "--dry-run"], host=name)

    found = []
    for name, answer in on_each(fleet, [fleet.host(name) for name in having], would).items():
        if isinstance(answer, OpsctlError):
            raise answer
        found.append(_part(name, kept[name], answer))
    return tuple(found)


def collect(fleet: Fleet, service: str, parts: Sequence[Part], emit: Emit) -> tuple[Part, ...]:
    """Takes away what ``look`` showed; gives what was taken.

    Raises:
        MixedError: some hosts did it and some did not; what they said, when none did.
    """
    orders = [Order(part.host, "gc", {"service": service, "keep": tuple(part.keep)}) for part in parts
              if part.remove or part.engines]
    answers = carry_out(fleet, orders, emit)
    done, errors = [], []
    for order in orders:
        part = next(one for one in parts if one.host == order.host)
        answer = answers[order.key]
        if isinstance(answer, OpsctlError):
            errors.append(answer)
            emit(TaskResult(order.host, f"gc of {service}", "failed", answer.message, answer.log_tail))
            continue
        done.append(_part(order.host, part.keep, answer))
        emit(TaskResult(order.host, f"gc of {service}", "changed" if answer["changed"] else "ok"))
    if errors:
        kind = MixedError if done else type(errors[0])
        raise kind(errors[0].code, errors[0].message, hint=errors[0].hint or "the same command again goes on",
                   log_tail=errors[0].log_tail)
    return tuple(done)


def left_behind(fleet: Fleet, states: Mapping[str, State]) -> dict[str, list[str]]:
    """Services that left services.yml and have releases on hosts still: ``{"talk": ["gpu-1"]}``. Pure."""
    known = {one.name for one in fleet.services}
    found: dict[str, list[str]] = {}
    for name, state in states.items():
        for service in sorted({one["service"] for one in state["releases"]} - known):
            found.setdefault(service, []).append(name)
    return found


def _part(host: str, kept: Mapping[str, str], answer: Mapping[str, Any]) -> Part:
    return Part(host, kept, {one["release"]: int(one["bytes"]) for one in answer["removed"]}, tuple(answer["engines"]),
                int(answer["bytes"]))


def _target(lines: Sequence[Line], states: Mapping[str, State]) -> str:
    try:
        return rollback_target(lines, states).release
    except RefusedError:  # there is none: nothing to keep for it
        return ""
