"""Are the groups right? A misspelt one would leave machines out without a word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from opsctl.errors import ConfigurationError
from opsctl.fleet.model import GROUPS, Service
from opsctl.fleet.source import at, find_line

ANSIBLES_OWN = ("all", "ungrouped")
# Names that people write for the known groups; spelling alone would not find them.
OTHER_NAMES = {
    "gpus": "gpu", "gpu_hosts": "gpu", "lbs": "lb", "load_balancer": "lb", "load_balancers": "lb", "loadbalancer": "lb",
    "loadbalancers": "lb", "haproxy": "lb", "monitors": "monitor", "monitoring": "monitor", "gateways": "gateway",
    "gw": "gateway",
}


def check_groups(hosts: Sequence[str], groups: Mapping[str, tuple[str, ...]], services: Sequence[Service],
                 load_balancer: str, inventory: Path, services_file: Path) -> None:
    """Refuses misspelt groups, services on groups that are not there, hosts that belong to nothing, missing roles.

    Raises:
        ConfigurationError: ``inventory.*`` or ``services.unknown_group``; the message names file, line and group.
    """
    if not hosts:
        raise ConfigurationError("inventory.empty", f"{inventory}: there is no host in it.",
                                 hint="put one below [gpu]; inventory.example shows how")
    known = tuple(dict.fromkeys((*GROUPS, *(service.group for service in services))))
    _check_misspelt(groups, known, inventory)
    _check_services(services, groups, inventory, services_file)
    _check_belonging(hosts, groups, known, inventory)
    _check_roles(groups, load_balancer, inventory)


def _check_services(services: Sequence[Service], groups: Mapping[str, tuple[str, ...]], inventory: Path,
                    services_file: Path) -> None:
    for service in services:
        if service.group not in groups and service.group not in GROUPS:
            users = [group for group in groups if group not in ANSIBLES_OWN]
            near = difflib.get_close_matches(service.group, (*GROUPS, *users), n=1, cutoff=0.6)
            line = find_line(services_file, rf"^\s*group:\s*[\"']?{re.escape(service.group)}\b")
            raise ConfigurationError(
                "services.unknown_group", f"{at(services_file, line)}: group: {service.group} of {service.name} is an "
                f"unknown group; {inventory.name} has none of that name.",
                hint=f"did you mean {near[0]}?" if near else f"groups of {inventory.name}: {', '.join(users)}")
        members = groups.get(service.group, ())
        if not members:
            raise ConfigurationError("inventory.empty_group", f"{inventory}: the group {service.group} has no host, "
                                     f"and {service.name} is to be served there.",
                                     hint=f"put hosts below [{service.group}]")
        instances = len(members) * service.instances_per_host
        if service.min_serving > instances:
            line = find_line(services_file, rf"^\s*min_serving:\s*{service.min_serving}\b")
            raise ConfigurationError(
                "services.min_serving", f"{at(services_file, line)}: min_serving: {service.min_serving} of "
                f"{service.name} is more than the {instances} instance{'s' * (instances != 1)} on {service.group}.",
                hint=f"at most {instances}; {instances - 1} lets one instance at a time be changed" if instances > 1
                else "at most 1")


def _check_misspelt(groups: Mapping[str, tuple[str, ...]], known: Sequence[str], inventory: Path) -> None:
    for group, members in groups.items():
        if group in known or group in ANSIBLES_OWN:
            continue
        plain = group.lower().replace("-", "_")
        near = difflib.get_close_matches(plain, [name for name in known if len(name) > 3], n=1, cutoff=0.8)
        meant = OTHER_NAMES.get(plain) or (plain if plain in known else near[0] if near else "")
        if meant and not set(members) <= set(groups.get(meant, ())):
            raise _unknown_group(group, meant, known, inventory)


def _check_belonging(hosts: Sequence[str], groups: Mapping[str, tuple[str, ...]], known: Sequence[str], inventory: Path
                     ) -> None:
    for host in hosts:
        of_host = [group for group, members in groups.items() if host in members and group not in ANSIBLES_OWN]
        if set(of_host).isdisjoint(known):
            for group in of_host:
                near = difflib.get_close_matches(group.lower(), known, n=1, cutoff=0.5)
                if near:
                    raise _unknown_group(group, near[0], known, inventory)
            line = find_line(inventory, rf"^\s*{re.escape(host)}(\s|$)")
            where = f"only in {', '.join(of_host)}, unknown to opsctl" if of_host else "in no group"
            raise ConfigurationError(
                "inventory.unknown_group", f"{at(inventory, line)}: {host} is {where}.",
                hint=f"put it below one of {', '.join(f'[{name}]' for name in known)}, or keep machines that opsctl "
                     "shall not touch in an inventory of their own")


def _check_roles(groups: Mapping[str, tuple[str, ...]], load_balancer: str, inventory: Path) -> None:
    gateways = groups.get("gateway", ())
    if not gateways:
        raise ConfigurationError("inventory.no_gateway", f"{inventory}: no host is in the group gateway, which keeps "
                                 "packages, signed releases and the ledger.",
                                 hint="add [gateway] with one host; it may be in other groups too")
    if len(gateways) > 1:
        raise ConfigurationError("inventory.two_gateways", f"{inventory}: {', '.join(gateways)} are in the group "
                                 "gateway; there can be one only, as it keeps the ledger.", hint="leave one there")
    if load_balancer == "haproxy" and not groups.get("lb"):
        raise ConfigurationError("inventory.no_load_balancer", f"{inventory}: no host is in the group lb, and "
                                 "load_balancer is haproxy.",
                                 hint="add [lb] with a host, or write load_balancer=none in [all:vars]")


def _unknown_group(group: str, meant: str, known: Sequence[str], inventory: Path) -> ConfigurationError:
    line = find_line(inventory, rf"^\s*\[{re.escape(group)}(:children)?\]|^\s*{re.escape(group)}:")
    return ConfigurationError("inventory.unknown_group", f"{at(inventory, line)}: {group} is an unknown group.",
                              hint=f"did you mean {meant}? opsctl knows {', '.join(known)}")
