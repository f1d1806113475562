"""What playbooks need to know, from where opsctl computes it: the filters of a fleet, its receivers and its GPUs.

    groups | opsctl_fleet(hostvars, lookup('file', inventory_dir ~ '/services.yml'), inventory_dir, gpus_text)
    hostvars[inventory_hostname] | opsctl_receivers

Nothing is decided here, and nothing of Ansible is imported: its lazy, tagged values become plain ones on the way in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opsctl.fleet import gpu_lock, gpus, guard, monitoring
from opsctl.fleet.inventory import fleet_from_ansible, is_read
from opsctl.fleet.model import (
    AGENT_CHECK_PORT,
    ALERTMANAGER_CLUSTER_PORT,
    ALERTMANAGER_PORT,
    BUNDLE_PORT,
    NODE_EXPORTER_PORT,
    PROMETHEUS_PORT,
)
from opsctl.fleet.placements import backends, gateway, gateway_url, place, statistics_pages, undealt, with_gpus
from opsctl.role_tasks import defaults_of

DOCUMENTATION = r"""
name: opsctl_fleet
author: opsctl
short_description: Placements, server lists and addresses of an opsctl fleet
description:
  - Computes from the inventory's groups and variables and the text of services.yml what each host has to serve.
positional: _input, hostvars, services_text, inventory_dir
options:
  _input:
    description: The variable C(groups).
    type: dict
    required: true
  hostvars:
    description: The variable C(hostvars).
    type: dict
    required: true
  services_text:
    description: The text of services.yml.
    type: str
    required: true
  inventory_dir:
    description: Where inventory and services.yml lie.
    type: path
    required: true
  gpus_text:
    description: The text of gpus.yml; empty where there is none.
    type: str
    default: ""
  lock_text:
    description: The text of stack.lock; empty where there is none.
    type: str
    default: ""
"""

RETURN = r"""
_value:
  description: >-
    placements (a list for each host), backends (one for each service), gateway_url, gateway_host, bundle_port,
    gpus (UUIDs of each host), drivers (variables of nvidia_driver for each host), guard_policies (numbers of each
    host's guard), with_gpus and undealt (names),
    agent_check_port, package_source, load_balancer, host_addresses, monitoring (jobs, alertmanagers, cluster_peers,
    node_exporter_port, ports).
  type: dict
"""


def opsctl_fleet(groups: Mapping[str, Any], hostvars: Mapping[str, Any], services_text: str, inventory_dir: str,
                 gpus_text: str = "", lock_text: str = "") -> dict[str, Any]:
    """Plain data for roles and templates; an error of the fleet's is the task's error, in one sentence."""
    directory = Path(plain(inventory_dir))
    variables = {plain(host): {plain(key): plain(hostvars[host][key]) for key in hostvars[host] if is_read(key)}
                 for host in groups["all"]}
    fleet = fleet_from_ansible(variables, plain(groups), plain(services_text), directory, directory / "inventory.ini",
                               plain(gpus_text), plain(lock_text))
    placements = place(fleet)
    defaults = defaults_of("nvidia_driver")
    drivers = {key: defaults[key] for key in (gpus.VERSION, gpus.SOURCE, gpus.FLAVOUR, gpus.FABRIC_MANAGER, gpus.OWN)}
    return {
        "placements": {host.name: [dataclasses.asdict(placement) | {
            "gpus": list(placement.gpus), "statistics": statistics_pages(fleet),
            "min_serving": fleet.service(placement.service).min_serving,
        } for placement in placements if placement.host == host.name] for host in fleet.hosts},
        "backends": backends(fleet),
        "gpus": {host.name: list(host.gpus or ()) for host in fleet.hosts},
        "drivers": {host.name: {key: host.variables.get(key, default) for key, default in drivers.items()}
                    for host in fleet.hosts},
        "guard_policies": {host.name: guard.numbers(host.variables) for host in fleet.hosts},
        "with_gpus": [host.name for host in with_gpus(fleet)],
        "undealt": [host.name for host in undealt(fleet)],
        "gateway_url": gateway_url(fleet),
        "gateway_host": gateway(fleet).name,
        "bundle_port": BUNDLE_PORT,
        "agent_check_port": AGENT_CHECK_PORT,
        "package_source": fleet.package_source,
        "load_balancer": fleet.load_balancer,
        "host_addresses": {host.name: {"service_address": host.service_address,
                                       "management_address": host.management_address} for host in fleet.hosts},
        "monitoring": {
            "jobs": monitoring.scrape_jobs(fleet),
            "alertmanagers": monitoring.alertmanagers(fleet),
            "cluster_peers": monitoring.cluster_peers(fleet),
            "node_exporter_port": NODE_EXPORTER_PORT,
            "ports": {"prometheus": PROMETHEUS_PORT, "alertmanager": ALERTMANAGER_PORT,
                      "cluster": ALERTMANAGER_CLUSTER_PORT},
        },
    }


def opsctl_receivers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Whom alerts reach, from a host's variables.

    Not a part of ``opsctl_fleet``: a URL may hold a token, and facts are shown.
    """
    return monitoring.receivers({key: plain(variables[key]) for key in monitoring.RECEIVERS if key in variables})


def opsctl_gpus(host: str, fleet: Mapping[str, Any], said: str, agent: str) -> list[dict[str, str]]:
    """A host's GPUs, from nvidia-smi's answer and its agent's settings; another than before is the task's error."""
    name, document = plain(host), plain(fleet)
    known = None if name in document["undealt"] else document["gpus"][name]
    found = gpu_lock.settle(name, known, gpu_lock.recorded_in(plain(agent)), plain(said))
    return [dataclasses.asdict(gpu) for gpu in found]


def opsctl_gpu_lock(gpus_text: str, hostvars: Mapping[str, Any], hosts: Sequence[str]) -> str:
    """gpus.yml with what ``opsctl_gpus`` told of these hosts added; a host that was not asked is left out."""
    text = plain(gpus_text)
    more = {host: tuple(gpu_lock.Gpu(**gpu) for gpu in plain(hostvars[host]["opsctl_gpus"]))
            for host in plain(hosts) if "opsctl_gpus" in hostvars[host]}
    return gpu_lock.render(gpu_lock.read(text, Path(gpu_lock.NAME)) | more) if more else text


def plain(value: Any) -> Any:
    """Ansible's tagged text, numbers and lazy containers as Python's own types."""
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return "".join(value) if kind is str else kind(value)
    return str(value)


class FilterModule:
    """What Ansible looks for in this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"opsctl_fleet": opsctl_fleet, "opsctl_receivers": opsctl_receivers, "opsctl_gpus": opsctl_gpus,
                "opsctl_gpu_lock": opsctl_gpu_lock}
