"""Which instance stands where, on which port; what the load balancer sends to; what would clash. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opsctl.errors import ConfigurationError
from opsctl.fleet.model import (
    AGENT_CHECK_PORT,
    ALERTMANAGER_CLUSTER_PORT,
    ALERTMANAGER_PORT,
    BUNDLE_PORT,
    EXPORTER_PORT,
    GRAFANA_PORT,
    NODE_EXPORTER_PORT,
    PROMETHEUS_PORT,
    STATISTICS_PORT,
    Fleet,
    Host,
    Placement,
    Service,
)


def place(fleet: Fleet) -> tuple[Placement, ...]:
    """Every instance of every service, by service, host and index, each in the operator's order.

    Instances of ``undealt`` hosts have no GPUs yet.

    Raises:
        ConfigurationError: an instance wants GPUs, and its host has none left.
    """
    left = {host.name: host.gpus for host in fleet.hosts}
    placements = []
    for service in fleet.services:
        for host in fleet.group(service.group):
            for index in range(service.instances_per_host):
                dealt, left[host.name] = _deal(fleet, service, host, index, left[host.name])
                placements.append(Placement(
                    instance=f"{service.name}.{index}", service=service.name, index=index, host=host.name,
                    address=host.service_address, port=service.port + index, gpus=dealt,
                    tensor_parallel=service.tensor_parallel))
    return tuple(placements)


def with_gpus(fleet: Fleet) -> tuple[Host, ...]:
    """The hosts whose instances want GPUs."""
    groups = {service.group for service in fleet.services if service.gpus_per_instance}
    return tuple(host for host in fleet.hosts if groups & set(host.groups))


def undealt(fleet: Fleet) -> tuple[Host, ...]:
    """Hosts whose instances want GPUs that nobody has written down: the next provision finds them."""
    return tuple(host for host in with_gpus(fleet) if host.gpus is None)


def _deal(fleet: Fleet, service: Service, host: Host, index: int, left: tuple[str, ...] | None
          ) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    wanted = service.gpus_per_instance
    if left is None:
        return (), None
    if wanted <= len(left):
        return left[:wanted], left[wanted:]
    raise ConfigurationError(
        "services.too_few_gpus", f"{fleet.services_file}: {service.name}.{index} wants gpus_per_instance: {wanted} on "
        f"{host.name}, which has {len(host.gpus or ())} GPUs, {len(left)} of them not dealt.",
        hint=f"fewer instances, or fewer GPUs each; a new card in {host.name}: opsctl gpus accept {host.name}")


def backends(fleet: Fleet) -> list[dict[str, Any]]:
    """For each service what HAProxy needs, as plain data: its port, and every instance with its agent's address."""
    addresses = {host.name: host.management_address for host in fleet.hosts}
    placements = place(fleet)
    return [
        {
            "name": service.name,
            "listen": service.listen,
            "min_serving": service.min_serving,
            "servers": [
                {
                    "name": f"{placement.host}.{placement.instance}",
                    "address": placement.address,
                    "port": placement.port,
                    "agent_address": addresses[placement.host],
                    "agent_port": AGENT_CHECK_PORT,
                    "instance": placement.instance,
                }
                for placement in placements if placement.service == service.name
            ],
        }
        for service in fleet.services
    ]


def gateway(fleet: Fleet) -> Host:
    """The one host of the gateway group (``read_fleet`` has seen to it that there is one)."""
    return fleet.group("gateway")[0]


def gateway_url(fleet: Fleet) -> str:
    """``http://192.0.2.10:8480``: where hosts fetch packages and releases."""
    address = gateway(fleet).service_address
    return f"http://{f'[{address}]' if ':' in address else address}:{BUNDLE_PORT}"


def statistics_pages(fleet: Fleet) -> list[str]:
    """``http://192.0.2.10:8404/;csv`` of each load balancer that opsctl set up: what they say of their servers."""
    hosts = fleet.group("lb") if fleet.load_balancer == "haproxy" else ()
    addresses = (f"[{host.management_address}]" if ":" in host.management_address else host.management_address
                 for host in hosts)
    return [f"http://{address}:{STATISTICS_PORT}/;csv" for address in addresses]


@dataclass(frozen=True)
class _Listener:
    port: int
    what: str  # "chat.1" or "the bundle's web server"
    key: str = ""  # the key of services.yml that chose the port; empty: the port is fixed


def clashes(fleet: Fleet) -> None:
    """Refuses a port that two things on one host would listen on.

    Raises:
        ConfigurationError: ``services.port_clash``; the message names the host, the port and both.
    """
    for host in fleet.hosts:
        taken: defaultdict[int, list[_Listener]] = defaultdict(list)
        for listener in _listeners(fleet, host):
            if listener.port > 65535:
                raise ConfigurationError("services.out_of_range", f"{fleet.services_file}: {listener.key} puts "
                                         f"{listener.what} on port {listener.port}, and 65535 is the highest.",
                                         hint="a lower port, or fewer instances_per_host")
            taken[listener.port].append(listener)
        for port, listeners in taken.items():
            if len(listeners) > 1:
                first, second = listeners[:2]
                keys = [listener.key for listener in (first, second) if listener.key]
                raise ConfigurationError(
                    "services.port_clash", f"{fleet.services_file}: {first.what} and {second.what} would both listen "
                    f"on port {port} of {host.name} ({' and '.join(dict.fromkeys(keys))}).",
                    hint="opsctl itself uses 8404, 8480, 9090, 9093, 9094, 9100, 9400, 9777 and 3000; a free range a "
                         "service, such as 8100, 8200 for port and 8000, 8001 for listen, keeps clear of all")


def _listeners(fleet: Fleet, host: Host) -> Iterator[_Listener]:
    groups = set(host.groups)
    serves = [service for service in fleet.services if service.group in groups]
    if host.connection == "ssh" and host.port == 22:  # another port may be a router's, not the machine's own
        yield _Listener(host.port, "sshd")
    if fleet.group("monitor"):
        yield _Listener(NODE_EXPORTER_PORT, "the machine's exporter")
    if serves:
        yield _Listener(AGENT_CHECK_PORT, "opsctl's agent")
        yield _Listener(EXPORTER_PORT, "opsctl's exporter")
    if "gateway" in groups:
        yield _Listener(BUNDLE_PORT, "the gateway's web server")
    if "monitor" in groups:
        yield _Listener(PROMETHEUS_PORT, "Prometheus")
        yield _Listener(ALERTMANAGER_PORT, "Alertmanager")
        yield _Listener(GRAFANA_PORT, "Grafana")
        yield _Listener(ALERTMANAGER_CLUSTER_PORT, "Alertmanager's cluster")
    for service in serves:
        for index in range(service.instances_per_host):
            yield _Listener(service.port + index, f"{service.name}.{index}", f"{service.name}: port: {service.port}")
    if "lb" in groups and fleet.load_balancer == "haproxy":
        yield _Listener(STATISTICS_PORT, "the load balancer's statistics")
        for service in fleet.services:
            yield _Listener(service.listen, f"the load balancer for {service.name}",
                            f"{service.name}: listen: {service.listen}")
