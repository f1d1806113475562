"""The state of a fleet as plain rows: what ``opsctl status`` shows. ``rows`` is pure; ``gather`` asks the hosts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet, Host, Placement
from opsctl.fleet.placements import place

HOST_PROGRAM = "/opt/opsctl/agent/bin/opsctl-host"
SERVING = "serving"


@dataclass(frozen=True)
class Row:
    """One instance, or one host without any. ``running`` and ``waiting`` count requests; None: not known."""

    host: str
    groups: tuple[str, ...]
    instance: str = ""
    release: str = ""
    state: str = ""
    running: int | None = None
    waiting: int | None = None
    note: str = ""

    def as_document(self) -> dict[str, Any]:
        return asdict(self)


def gather(fleet: Fleet, hosts: Sequence[Host], timeout_s: float = 15.0) -> dict[str, Mapping[str, Any] | OpsctlError]:
    """Asks every host for ``opsctl-host state --json``; a host without the agent answers an empty mapping."""

    def ask(session: Session) -> Mapping[str, Any]:
        answer = session.run([HOST_PROGRAM, "state", "--json"], timeout_s=timeout_s)
        if answer.returncode in (1, 126, 127) and "not found" in answer.stderr:
            return {}
        if answer.returncode:
            raise OpsctlError("status.agent", f"opsctl-host state failed with exit code {answer.returncode}.",
                              log_tail=answer.stderr.splitlines()[-5:])
        state: Mapping[str, Any] = json.loads(answer.stdout)
        return state

    return on_each(fleet, hosts, ask)


def rows(fleet: Fleet, hosts: Sequence[Host], states: Mapping[str, Mapping[str, Any] | OpsctlError]) -> list[Row]:
    """One row an instance that is placed, and one for each host that serves nothing."""
    placed = place(fleet)
    found: list[Row] = []
    for host in hosts:
        mine = [placement for placement in placed if placement.host == host.name]
        state = states[host.name]
        if isinstance(state, OpsctlError):
            what = "unreachable" if state.code == "host.unreachable" else "error"
            found += [Row(host.name, host.groups, placement.instance, state=what, note=state.message)
                      for placement in mine] or [Row(host.name, host.groups, state=what, note=state.message)]
        elif not state:
            found += [Row(host.name, host.groups, placement.instance, state="not provisioned") for placement in mine] \
                or [Row(host.name, host.groups, state="not provisioned")]
        else:
            found += [_instance_row(host, placement, state) for placement in mine] or [
                Row(host.name, host.groups, state="up")]
    return found


def _instance_row(host: Host, placement: Placement, state: Mapping[str, Any]) -> Row:
    for instance in state["instances"]:
        if instance["instance"] == placement.instance:
            return Row(host.name, host.groups, placement.instance, instance["release"] or "", instance_state(instance),
                       instance["running"], instance["waiting"])
    return Row(host.name, host.groups, placement.instance, state="not provisioned",
               note="the host does not know this instance yet: opsctl provision")


def instance_state(instance: Mapping[str, Any]) -> str:
    """``serving``, ``no release``, ``starting``, ``failed``, ``stopped`` ... from the unit and its health."""
    unit = instance["unit"]
    if not instance["release"]:
        return "no release"
    if unit == "active":
        return SERVING if instance["health"] == "healthy" else "starting"
    if unit == "deactivating":
        return "draining"
    return {"inactive": "stopped", "activating": "starting"}.get(unit, str(unit))


def endpoints(fleet: Fleet) -> dict[str, list[str]]:
    """Where clients send requests, by service: ``{"chat": ["http://10.0.0.2:8000/v1"]}``."""
    return {service.name: [f"http://{host.service_address}:{service.listen}/v1" for host in fleet.group("lb")]
            for service in fleet.services}
