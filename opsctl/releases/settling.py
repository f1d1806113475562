"""Takes back the drains of runs that died: who holds a host's lock knows that no other run is at work there.

Without it an instance that a dead run drained counts as gone until the drain's lease ends, and the budget of who goes
on would be spent on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opsctl.agent.locks import OWNED_BY_RUN
from opsctl.engines.events import Emit, Note, one_at_a_time
from opsctl.engines.session import Session, on_each
from opsctl.errors import LockedError, OpsctlError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.releases.balancers import ROTATION_S, balancers
from opsctl.releases.remote import ask


def left_behind(states: Mapping[str, Any], service: str) -> list[tuple[str, str, str]]:
    """(host, instance, owner) of each drain of a run on an instance of ``service``. Pure."""
    return [(host, drain["instance"], drain["owner"])
            for host, state in states.items() if not isinstance(state, OpsctlError)
            for drain in state["drains"]
            if drain["owner"].startswith(OWNED_BY_RUN) and drain["instance"].rpartition(".")[0] == service]


def settle(fleet: Fleet, service: Service, hosts: Sequence[Host], check: Callable[[], None], emit: Emit) -> None:
    """Ends the drains that runs left on ``hosts``, whose locks are ours, and waits until requests come again.

    ``check`` raises when a lock is ours no more; it is asked before each undrain, which no host fences. Best effort:
    what a host or a load balancer does not do is met again by what comes next.

    Raises:
        LockedError: a lock was lost.
    """
    serving = [host for host in hosts if service.group in host.groups]
    states = on_each(fleet, serving, lambda session: ask(session, ["state", "--json"], host=session.host.name))
    left = left_behind(states, service.name)
    if not left:
        return
    by_host = {name: [one for one in left if one[0] == name] for name, _, _ in left}
    emit = one_at_a_time(emit)

    def undrain(session: Session) -> dict[str, int]:
        name = session.host.name
        weights = {}
        for _, instance, owner in by_host[name]:
            check()
            weights[instance] = int(ask(session, ["undrain", instance, "--owner", owner], host=name)["weight"])
            emit(Note(f"{instance}: took back the drain of {owner.removeprefix(OWNED_BY_RUN)}, which is not at work "
                      "any more", host=name))
        return weights

    back: list[str] = []
    for name, answer in on_each(fleet, [host for host in serving if host.name in by_host], undrain).items():
        if isinstance(answer, LockedError):
            raise answer
        if isinstance(answer, OpsctlError):
            emit(Note(f"the drain of an earlier run stays until it ends by itself: {answer.message}", "warning", name))
            continue
        ready = healthy(states[name])
        # what its operator or the guard keeps drained stays out, however long we wait
        back += [f"{name}.{instance}" for instance, weight in answer.items() if weight > 0 and instance in ready]
    _wait(fleet, back)


def healthy(state: Any) -> list[str]:
    """The instances of a host that a load balancer should send to as soon as nothing drains them. Pure."""
    return [one["instance"] for one in state["instances"] if one["health"] == "healthy" and not one["unfinished"]]


def _wait(fleet: Fleet, servers: Sequence[str]) -> None:
    lb = balancers(fleet)
    try:
        for server in servers:
            lb.lacking(server, ROTATION_S)
    except OpsctlError:
        return  # the look that follows says what it is
    finally:
        lb.close()
