"""``opsctl drain`` and ``undrain``: an operator's own word on how many requests instances get.

``choose``, ``effect`` and ``check`` decide and are pure; ``drain``, ``wait_until_empty`` and ``undrain`` ask and order.
A drain of an operator's has no end of its own: it stays until that operator, or somebody who names the owner, takes
it away. Rollouts and the guard have drains of their own, which nobody else touches.
"""

from __future__ import annotations

import fnmatch
import getpass
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from opsctl.engines.events import Emit, Progress, TaskResult
from opsctl.engines.session import Session, on_each
from opsctl.errors import MixedError, OpsctlError, PausedError, RefusedError, UsageError
from opsctl.fleet.model import Fleet, Placement, Service
from opsctl.fleet.placements import place
from opsctl.fleet.select import select_hosts
from opsctl.releases.balancers import balancers
from opsctl.releases.plan import serves
from opsctl.releases.remote import ask

INSTANCE = re.compile(r"[a-z0-9*?.-]+")  # a glob; what follows the last colon of gpu[0:1] is none
OWNER_LETTERS = re.compile(r"[^A-Za-z0-9._@-]")
LOOK_S = 2.0  # one question waits this long for the answer it would like
HEARD_S = 30.0  # by then every load balancer has asked the agent and stopped sending
State = Mapping[str, Any] | OpsctlError


@dataclass(frozen=True)
class Effect:
    """What a drain does to one service: how many instances serve now, and how many when it is done."""

    service: Service
    serving: int
    remaining: int
    silent: tuple[str, ...] = ()  # hosts that did not say; their instances count as not serving


@dataclass(frozen=True)
class Emptied:
    """How long it took until nothing was in flight, in seconds."""

    server: str
    seconds: float


def operator_owner() -> str:
    """Whom drains belong to that are made here: ``operator:ann``."""
    return "operator:" + (OWNER_LETTERS.sub("-", getpass.getuser()).lstrip("._@-") or "unknown")


def server_name(placement: Placement) -> str:
    """As load balancers call it: ``gpu-1.chat.0``."""
    return f"{placement.host}.{placement.instance}"


def choose(fleet: Fleet, targets: Sequence[str]) -> tuple[Placement, ...]:
    """The instances that words name: ``gpu-1``, ``gpu-1:chat.0``, ``gpu-*:chat.*``, ``chat``, ``chat.0``. Pure.

    Raises:
        UsageError: a word names no instance, or could be a host and a service.
    """
    placed = place(fleet)
    names = {one for target in targets for one in _named(fleet, placed, target)}
    return tuple(placement for placement in placed if server_name(placement) in names)


def _named(fleet: Fleet, placed: Sequence[Placement], target: str) -> set[str]:
    hosts, colon, pattern = target.rpartition(":")
    if not (colon and INSTANCE.fullmatch(pattern)):
        hosts, pattern = target, "*"
        instances = {word for placement in placed for word in (placement.service, placement.instance)}
        is_host = any(target in (host.name, *host.groups) for host in fleet.hosts)
        if target in instances and is_host:
            raise UsageError("drain.ambiguous", f"{target} is a host or group, and a service or instance.",
                             hint=f"'{target}:*' for what runs on it, '*:{target}*' for the instances")
        if target in instances:
            hosts, pattern = "", target
    chosen = {host.name for host in select_hosts(fleet, hosts)}
    found = {server_name(placement) for placement in placed if placement.host in chosen
             and (fnmatch.fnmatchcase(placement.instance, pattern) or placement.service == pattern)}
    if not found:
        raise UsageError("drain.no_instance", f"{target} names no instance.",
                         hint="instances: " + ", ".join(f"{one.host}:{one.instance}" for one in placed))
    return found


def weight_then(drains: Sequence[Mapping[str, Any]], owner: str, weight: int) -> int:
    """Per cent that an instance keeps once ``owner`` has drained it to ``weight``: his drain of before goes. Pure."""
    return min([weight, *(int(one["weight"]) for one in drains if one["owner"] != owner)])


def effect(fleet: Fleet, states: Mapping[str, State], chosen: Sequence[Placement], weight: int) -> tuple[Effect, ...]:
    """What a drain of ``chosen`` to ``weight`` per cent does to each service that has some. Pure."""
    found = []
    leaving = {server_name(placement) for placement in chosen} if weight == 0 else set()
    for service in fleet.services:
        if all(placement.service != service.name for placement in chosen):
            continue
        serving: list[str] = []
        silent: list[str] = []
        for placement in place(fleet):
            state = states.get(placement.host)
            if placement.service != service.name:
                continue
            if state is None or isinstance(state, OpsctlError):
                silent.append(placement.host)
            elif any(serves(one) for one in state["instances"] if one["instance"] == placement.instance):
                serving.append(server_name(placement))
        remaining = [name for name in serving if name not in leaving]
        found.append(Effect(service, len(serving), len(remaining), tuple(dict.fromkeys(silent))))
    return tuple(found)


def check(effects: Sequence[Effect], *, allow_outage: bool) -> None:
    """Refuses a drain that takes instances away from a service that needs them. Pure.

    Raises:
        RefusedError: ``drain.outage``: fewer than min_serving would go on serving.
    """
    for one in effects:
        if one.remaining < one.serving and one.remaining < one.service.min_serving and not allow_outage:
            unheard = f" ({', '.join(one.silent)} did not answer and counts as not serving)" if one.silent else ""
            raise RefusedError(
                "drain.outage", f"{one.service.name} has {one.serving} serving{unheard}; {one.remaining} would go on, "
                f"and min_serving is {one.service.min_serving}.",
                hint="--allow-outage goes ahead; --weight 1 leaves an instance a trickle instead")


def check_heard(states: Mapping[str, State], chosen: Sequence[Placement]) -> None:
    """Refuses a drain that nobody would hear: load balancers learn of it from the host's agent. Pure.

    Raises:
        RefusedError: ``agent.silent``; or the error of a host that did not say anything.
    """
    for placement in chosen:
        state = states[placement.host]
        if isinstance(state, OpsctlError):
            raise state
        for one in state.get("instances", ()):
            if one["instance"] == placement.instance and one["unit"] == "active" and not one.get("voice", "unknown"):
                raise RefusedError("agent.silent", f"{placement.host}: opsctl-agent does not answer, so nobody would "
                                   f"hear of a drain of {placement.instance}; nothing was changed.",
                                   hint=f"systemctl status opsctl-agent on {placement.host}; systemctl stop "
                                        f"inference@{placement.instance} drains by the engine itself")


def drain(fleet: Fleet, chosen: Sequence[Placement], owner: str, weight: int, reason: str, emit: Emit
          ) -> list[dict[str, Any]]:
    """Drains instances for ``owner``; ``[{"host", "instance", "changed", "weight", "drains"}]``.

    Raises:
        MixedError: some hosts took it, some did not; what they said, when none did.
    """
    verb = ["--owner", owner, "--weight", str(weight), "--reason", reason]
    rows = _order(fleet, chosen, lambda instance: ["drain", instance, *verb], f"{weight} % for {owner}", emit)
    if fleet.load_balancer == "hook" and weight == 0:  # it hears of a drain from the hook, not from the agent
        lb = balancers(fleet)
        for row in rows:
            lb.drain(f"{row['host']}.{row['instance']}")
    return rows


def undrain(fleet: Fleet, chosen: Sequence[Placement], owner: str, emit: Emit) -> list[dict[str, Any]]:
    """Takes ``owner``'s drains away and no other; rows as of ``drain``.

    Raises:
        MixedError: some hosts took it, some did not; what they said, when none did.
    """
    rows = _order(fleet, chosen, lambda instance: ["undrain", instance, "--owner", owner], f"no drain of {owner}", emit)
    if fleet.load_balancer == "hook":
        lb = balancers(fleet)
        for row in rows:
            if row["weight"] > 0:
                lb.undrain(f"{row['host']}.{row['instance']}")
    return rows


def wait_until_empty(fleet: Fleet, chosen: Sequence[Placement], emit: Emit,
                     clock: Callable[[], float] = time.monotonic) -> list[Emptied]:
    """Until every load balancer's own socket and the engine show nothing in flight, instance by instance.

    Raises:
        PausedError: past the service's drain_timeout_s, a load balancer goes on sending, or one does not answer. The
            drains stay.
    """
    began = clock()
    done = []
    with ExitStack() as stack:
        lb = balancers(fleet)
        stack.callback(lb.close)
        sessions: dict[str, Session] = {}
        for placement in chosen:
            name = server_name(placement)
            if placement.host not in sessions:
                sessions[placement.host] = stack.enter_context(Session(fleet, placement.host))
            deadline_s = fleet.service(placement.service).drain_timeout_s
            while True:
                count, sending = lb.open_sessions(name, LOOK_S)
                engine = ask(sessions[placement.host], ["idle", placement.instance, "--wait-s",
                                                        f"{0 if count else LOOK_S:g}"], host=placement.host)
                waited_s = clock() - began
                if not count and not sending and engine["idle"]:
                    done.append(Emptied(name, round(waited_s, 1)))
                    emit(TaskResult(placement.host, f"{placement.instance}: nothing in flight", "ok"))
                    break
                in_flight = max(count, (engine["running"] or 0) + (engine["waiting"] or 0))
                emit(Progress(f"{placement.instance}: draining, requests in flight", in_flight, 0, "items",
                              host=placement.host))
                if sending and waited_s > HEARD_S:
                    raise PausedError("drain.not_heard", f"{', '.join(sending)} still sends requests to {name} "
                                      f"{waited_s:.0f} s after it was drained; it stays drained.",
                                      hint=f"can the load balancer reach the agent of {placement.host} (TCP 9777)?")
                if waited_s > deadline_s:
                    said = f"still has {in_flight} requests in flight" if engine["running"] is not None or count else \
                        "does not say what it has in flight"
                    raise PausedError("drain.deadline", f"{name} {said} after {deadline_s} s; it stays drained.",
                                      hint="the same command again goes on waiting; opsctl undrain brings it back")
    return done


def _order(fleet: Fleet, chosen: Sequence[Placement], verb: Callable[[str], list[str]], what: str, emit: Emit
           ) -> list[dict[str, Any]]:
    def act(session: Session) -> list[dict[str, Any]]:
        mine = [placement for placement in chosen if placement.host == session.host.name]
        return [ask(session, verb(placement.instance), host=session.host.name) for placement in mine]

    rows: list[dict[str, Any]] = []
    errors: list[OpsctlError] = []
    hosts = [fleet.host(name) for name in dict.fromkeys(placement.host for placement in chosen)]
    for name, answer in on_each(fleet, hosts, act).items():
        if isinstance(answer, OpsctlError):
            errors.append(answer)
            emit(TaskResult(name, what, "failed", answer.message, answer.log_tail))
            continue
        for row in answer:
            rows.append({"host": name, **row})
            emit(TaskResult(name, f"{row['instance']}: {what}", "changed" if row["changed"] else "ok"))
    if errors and rows:
        raise MixedError(errors[0].code, errors[0].message, hint=errors[0].hint or "the same command again goes on",
                         log_tail=errors[0].log_tail)
    if errors:
        raise errors[0]
    return rows
