"""What a provision would do, as plain data: decided here, asked for in ``looking_ahead.py``. Pure.

A host that has a role is told by Ansible's own check mode. A role that a host never had is told from the role's tasks:
in check mode its packages, users and folders would be missing, and the run would end there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from opsctl.engines.events import TaskResult
from opsctl.errors import ExitCode
from opsctl.fleet.model import Fleet, Host, Placement
from opsctl.fleet.placements import gateway, place
from opsctl.fleet.vendor_packages import VARIABLES, versions_of
from opsctl.releases.first_start import plan_host
from opsctl.releases.ledger import Wanted
from opsctl.role_tasks import deeds, defaults_of, kind_of
from opsctl.stack.pinned import wishes

State = Literal["fresh", "provisioned", "unreachable"]
# What is there when a role was done: without one of them check mode would end in the middle of that role.
MARKS = {
    "base": ("/etc/opsctl", "/var/lib/opsctl"),
    "gateway": ("/usr/sbin/nginx", "/srv/opsctl-gateway/bundle/SHA256SUMS"),
    "nvidia_driver": ("/etc/opsctl/driver.json", "/usr/local/lib/opsctl/driver-transaction"),
    "container_toolkit": ("/etc/opsctl/container_toolkit.json", "/usr/local/lib/opsctl/cdi-specification"),
    "cuda": ("/etc/opsctl/cuda.json",),
    "agent": ("/etc/systemd/system/opsctl-agent.service", "/etc/opsctl/agent.toml"),
    "node_exporter": ("/usr/bin/prometheus-node-exporter",
                      "/etc/systemd/system/prometheus-node-exporter.service.d/opsctl.conf"),
    "load_balancer": ("/usr/sbin/haproxy", "/usr/local/lib/opsctl/haproxy-state"),
    "inference": ("/etc/systemd/system/inference@.service",),
    "monitoring": ("/usr/bin/promtool", "/usr/bin/amtool", "/etc/prometheus/opsctl/mail.tmpl",
                   "/etc/systemd/system/prometheus-alertmanager.service.d/opsctl.conf"),
}
APT = ("/etc/opsctl/apt.conf", "/etc/apt/sources.list.d/opsctl.sources")  # base's, with package_source=gateway
ON_ALL = ("base", "agent")


@dataclass(frozen=True)
class Change:
    """One task that would change a host. ``what`` names packages, files or units where that is known."""

    role: str
    task: str
    kind: str
    what: tuple[str, ...] = ()
    diff: tuple[str, ...] = ()


@dataclass(frozen=True)
class HostPlan:
    """``first``: the roles that the host never had; ``why``: what keeps it from answering."""

    host: str
    state: State
    first: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Step:
    """What comes after Ansible: ``publish``, ``stage``, ``first start``. ``fetch_bytes``: None when nobody knows."""

    act: Literal["publish", "stage", "first start"]
    host: str
    service: str
    version: str
    instance: str = ""
    fetch_bytes: int | None = 0


@dataclass(frozen=True)
class Plan:
    hosts: tuple[HostPlan, ...]
    steps: tuple[Step, ...]

    @property
    def pending(self) -> int:
        """How many changes a provision would make now."""
        return sum(len(host.changes) for host in self.hosts) + len(self.steps)

    @property
    def silent(self) -> tuple[str, ...]:
        return tuple(host.host for host in self.hosts if host.state == "unreachable")

    def as_document(self) -> dict[str, Any]:
        return {
            "hosts": [{"host": host.host, "state": host.state, "first_roles": list(host.first), "why": host.why,
                       "changes": [{**dataclasses.asdict(change), "what": list(change.what), "diff": list(change.diff)}
                                   for change in host.changes]} for host in self.hosts],
            "instances": [dataclasses.asdict(step) for step in self.steps],
            "changed": self.pending,
        }


def roles_for(fleet: Fleet, host: Host) -> tuple[str, ...]:
    """The roles of a host, in the order in which a provision comes to them."""
    serves = "gpu" in host.groups or any(placement.host == host.name for placement in place(fleet))
    balances = fleet.load_balancer == "haproxy" and "lb" in host.groups
    has = {"base": True, "gateway": gateway(fleet).name == host.name,
           "nvidia_driver": bool(host.variables.get("nvidia_driver_version")),
           **{role: bool(versions_of(role, host.variables)) for role in VARIABLES}, "agent": True,
           "node_exporter": bool(fleet.group("monitor")), "load_balancer": balances, "inference": serves,
           "monitoring": "monitor" in host.groups}
    return tuple(role for role, wanted in has.items() if wanted)


def marks(fleet: Fleet, host: Host) -> dict[str, tuple[str, ...]]:
    """By role: the paths of which none may lack on a host that had it."""
    apt = APT if fleet.package_source == "gateway" else ()
    return {role: MARKS[role] + (apt if role == "base" else ()) for role in roles_for(fleet, host)}


def first_roles(fleet: Fleet, host: Host, lacking: Sequence[str]) -> tuple[str, ...]:
    """Roles that the host never had. ``lacking``: those of its ``marks`` that are not there.

    Without base or agent nothing of the rest counts: what is there is of somebody else, or half a provision.
    """
    first = tuple(role for role, paths in marks(fleet, host).items() if set(paths) & set(lacking))
    return roles_for(fleet, host) if set(first) & set(ON_ALL) else first


def first_changes(fleet: Fleet, host: Host, roles: Sequence[str], login: str) -> tuple[Change, ...]:
    """What roles do to a host that never had them. ``login``: the user that opsctl logs in as."""
    given = {
        "base_package_source": fleet.package_source,
        "base_login_user": login,
        "monitoring_receivers": {"user": host.variables.get("alert_smtp_user", "")},
        "inference_placements": [dataclasses.asdict(placement) for placement in place(fleet)
                                 if placement.host == host.name],
        **{f"{role}_pinned": [f"{name}={wish.version}" for wish in
                              wishes(versions_of(role, host.variables), defaults_of(role)[f"{role}_names"])
                              for name in wish.names] for role in VARIABLES},
    }
    entries = [(role, "main") for role in roles]
    if "gateway" in roles:
        entries.insert(0, ("gateway", "bundle"))
    return tuple(Change(deed.role, deed.task, deed.kind, deed.what)
                 for role, entry in entries for deed in deeds(role, given, entry))


def checked_changes(results: Sequence[TaskResult], modules: Mapping[str, str]) -> dict[str, tuple[Change, ...]]:
    """By host, what check mode found. A loop speaks once for each item. ``modules``: by task, what it calls."""
    found: dict[str, tuple[Change, ...]] = {}
    for result in results:
        if result.status != "changed":
            continue
        role, _, task = result.task.rpartition(" : ")
        change = Change(role, task.rstrip("."), kind_of(modules.get(result.task, "")),
                        (result.item,) if result.item else (), result.detail)
        found[result.host] = (*found.get(result.host, ()), change)
    return found


def steps_of(placements: Sequence[Placement], want: Wanted, states: Mapping[str, Mapping[str, Any]],
             fetches: Mapping[str, int], size: int | None) -> tuple[Step, ...]:
    """What comes after Ansible for one service on its hosts.

    ``placements``: its instances on the hosts that are looked at. ``states``: documents of ``opsctl-host state`` of
    hosts that have an agent; ``fetches``: bytes that each of them said it would fetch; ``size``: of the release.
    """
    found: list[Step] = []
    for host in dict.fromkeys(placement.host for placement in placements):
        mine = tuple(placement.instance for placement in placements if placement.host == host)
        state = states.get(host)
        start = mine
        if state is not None:
            known = {instance["instance"] for instance in state["instances"]}
            waiting = set(plan_host(state, want).start) | (set(mine) - known)
            start = tuple(instance for instance in mine if instance in waiting)
        fetch = fetches.get(host, size)
        if start:
            found += [Step("first start", host, want.service, want.version, instance, 0 if at else fetch)
                      for at, instance in enumerate(start)]
        elif state is not None and not is_staged(state, want.digest):
            found.append(Step("stage", host, want.service, want.version, "", fetch))
    return tuple(found)


def is_staged(state: Mapping[str, Any], digest: str) -> bool:
    """Whether a host has a release whole, and its engine."""
    return any(release["digest"] == digest and release["complete"] and release.get("engine_built", True)
               for release in state["releases"])


def verdict(plan: Plan, skip_unreachable: int) -> ExitCode:
    """Refused when more hosts are silent than may be left out; pending when there is something to do."""
    if len(plan.silent) > skip_unreachable:
        return ExitCode.REFUSED
    return ExitCode.PENDING if plan.pending else ExitCode.DONE
