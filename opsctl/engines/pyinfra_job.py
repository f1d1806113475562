"""What the controller gives its pyinfra worker: one job, as one line of JSON. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opsctl.fleet.model import Fleet, Host

EVENTS_FD = "OPSCTL_EVENTS_FD"  # the environment variable that names the descriptor for events

Operation = Literal["stage", "cutover", "gc"]


@dataclass(frozen=True)
class Order:
    """One operation on one host. ``arguments``: those of the operation in ``pyinfra_parts``.

    stage: service, release, rate_limit; cutover: instance, release, from_release, owner, min_speed_percent;
    gc: service, keep.
    """

    host: str
    operation: Operation
    arguments: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        """Host, operation, and what it is about: an instance, a release, or a service."""
        about = next(self.arguments[name] for name in ("instance", "release", "service") if name in self.arguments)
        return self.host, self.operation, str(about)


@dataclass(frozen=True)
class Job:
    """``chosen`` are names of hosts. Without orders it only looks: at the state, and at ``plans`` (service, release).

    Of the fleet only what a connection needs is carried: no service, no variable of a host, which might be a secret.
    """

    fleet: Fleet
    chosen: tuple[str, ...]
    plans: tuple[tuple[str, str], ...] = ()
    orders: tuple[Order, ...] = ()


def write_job(job: Job) -> str:
    """One line."""
    return json.dumps({
        "directory": str(job.fleet.directory), "inventory": str(job.fleet.inventory),
        "hosts": [dataclasses.asdict(dataclasses.replace(host, variables={})) for host in job.fleet.hosts],
        "chosen": job.chosen, "plans": job.plans,
        "orders": [{"host": order.host, "operation": order.operation, "arguments": dict(order.arguments)}
                   for order in job.orders],
    }) + "\n"


def read_job(line: str) -> Job:
    """The job again."""
    raw = json.loads(line)
    hosts = tuple(Host(**{**host, "groups": tuple(host["groups"]),
                          "ssh_options": tuple((name, value) for name, value in host["ssh_options"])})
                  for host in raw["hosts"])
    fleet = Fleet(directory=Path(raw["directory"]), inventory=Path(raw["inventory"]), hosts=hosts, services=())
    return Job(fleet, tuple(raw["chosen"]), tuple((service, release) for service, release in raw["plans"]),
               tuple(Order(**order) for order in raw["orders"]))
