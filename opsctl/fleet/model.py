"""The fleet as frozen plain data. ``inventory.py`` makes it; every engine and view reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opsctl.errors import UsageError

GROUPS = ("gpu", "lb", "monitor", "gateway")

AGENT_CHECK_PORT = 9777
STATISTICS_PORT = 8404  # HAProxy's statistics page and metrics
BUNDLE_PORT = 8480
EXPORTER_PORT = 9400
NODE_EXPORTER_PORT = 9100  # Debian's default, and everybody's
PROMETHEUS_PORT = 9090
ALERTMANAGER_PORT = 9093
ALERTMANAGER_CLUSTER_PORT = 9094  # several Alertmanagers agree on who has told what
GRAFANA_PORT = 3000


@dataclass(frozen=True)
class Host:
    """One machine of the inventory. ``address`` is for SSH, the other two for services and metrics."""

    name: str
    address: str
    groups: tuple[str, ...]
    connection: Literal["ssh", "local"] = "ssh"
    user: str = ""  # empty: ssh's own default
    port: int = 22
    identity_file: str = ""  # absolute; empty: ssh's own defaults and the agent
    proxy_jump: str = ""  # as ssh writes it: an inventory name or user@host:port, several with commas
    ssh_options: tuple[tuple[str, str], ...] = ()  # from ansible_ssh_common_args: ("Compression", "yes")
    service_address: str = ""  # engines, load balancer, bundle
    management_address: str = ""  # agent and exporters
    os_release: str = "debian12"  # as inventory or stack.lock say, before anybody asks the host (systems.csv)
    gpus: tuple[str, ...] | None = None  # UUIDs in PCI bus order; None: nobody has written them down yet
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the inventory, and ``locked`` where it is silent
    locked: Mapping[str, Any] = field(default_factory=dict)  # what stack.lock says and the inventory does not


@dataclass(frozen=True)
class Service:
    """One entry of services.yml. Ports are TCP; instance n listens on ``port + n``, the load balancer on ``listen``."""

    name: str
    group: str
    port: int
    listen: int
    instances_per_host: int = 1
    gpus_per_instance: int = 0
    tensor_parallel: int = 1
    min_serving: int = 1
    drain_timeout_s: int = 600  # how long a change waits for requests in flight
    min_speed_percent: int = 50  # of the old release's tokens per second, which a new one must reach
    first_release: str = ""


@dataclass(frozen=True)
class Placement:
    """What is true of one instance on one host only."""

    instance: str  # "chat.0"
    service: str
    index: int
    host: str
    address: str
    port: int
    gpus: tuple[str, ...] = ()
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Fleet:
    directory: Path  # where inventory, services.yml, keys/, trust/, known_hosts and .opsctl/ lie
    inventory: Path
    hosts: tuple[Host, ...]
    services: tuple[Service, ...]
    package_source: Literal["gateway", "upstream"] = "gateway"
    load_balancer: Literal["haproxy", "hook", "none"] = "haproxy"

    @property
    def services_file(self) -> Path:
        return self.directory / "services.yml"

    @property
    def gpus_file(self) -> Path:
        return self.directory / "gpus.yml"

    @property
    def lock_file(self) -> Path:
        return self.directory / "stack.lock"

    @property
    def known_hosts(self) -> Path:
        """The pinned host keys: the only ones that any engine believes."""
        return self.directory / "known_hosts"

    @property
    def ssh_config(self) -> Path:
        return self.directory / ".opsctl" / "ssh_config"

    def host(self, name: str) -> Host:
        for host in self.hosts:
            if host.name == name:
                return host
        raise UsageError("fleet.no_such_host", f"{self.inventory}: there is no host {name}.",
                         hint="hosts: " + ", ".join(host.name for host in self.hosts))

    def service(self, name: str) -> Service:
        for service in self.services:
            if service.name == name:
                return service
        raise UsageError("fleet.no_such_service", f"{self.services_file}: there is no service {name}.",
                         hint="services: " + ", ".join(service.name for service in self.services))

    def group(self, name: str) -> tuple[Host, ...]:
        """Hosts of a group, in the inventory's order; empty when nobody is in it."""
        return tuple(host for host in self.hosts if name in host.groups)
