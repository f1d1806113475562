"""Inventory and services.yml to ``Fleet``. ``read_fleet`` orders; every check lies in a file of its own and is pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from opsctl.errors import ConfigurationError
from opsctl.fleet import gpu_lock
from opsctl.fleet.ansible_inventory import read_raw
from opsctl.fleet.groups import ANSIBLES_OWN, check_groups
from opsctl.fleet.hosts import READ, check_addresses, make_host
from opsctl.fleet.model import Fleet
from opsctl.fleet.placements import clashes
from opsctl.fleet.services import read_services
from opsctl.fleet.versions import check_versions, holds_version, versions_as_text
from opsctl.stack.lock import FILE as LOCK
from opsctl.stack.lock import read

# Variables of the whole fleet, in [all:vars], and what they may be: the first is the default.
CHOICES: Mapping[str, tuple[str, ...]] = {
    name: get_args(get_type_hints(Fleet)[name]) for name in ("package_source", "load_balancer")
}


def read_fleet(path: Path) -> Fleet:
    """Reads an inventory and the services.yml beside it; takes about half a second.

    Raises:
        ConfigurationError: something in them is wrong; the message names file, key and value, and the line if known.
    """
    inventory = path.absolute()
    if not inventory.exists():
        raise ConfigurationError("inventory.missing", f"there is no inventory at {inventory}.",
                                 hint="opsctl init makes one")
    services = inventory.parent / "services.yml"
    try:
        services_text = services.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError("services.missing", f"there is no services.yml beside {inventory}.",
                                 hint=f"opsctl init {inventory.parent} writes one and leaves what is there") from None
    except UnicodeDecodeError:
        raise ConfigurationError("services.not_yaml", f"{services} is not UTF-8.", hint="save it as UTF-8") from None
    raw = read_raw(inventory)
    return fleet_from_ansible(raw.hostvars, raw.groups, services_text, inventory.parent, inventory,
                              _text(inventory.parent / gpu_lock.NAME, "gpus"),
                              _text(inventory.parent / LOCK, "stack_lock"))


def fleet_from_ansible(hostvars: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]],
                       services_text: str, directory: Path, inventory: Path, gpus_text: str = "",
                       lock_text: str = "") -> Fleet:
    """The fleet from Ansible's variables of each host, its groups (each with all its hosts), and a services.yml's text.

    ``gpus_text`` and ``lock_text``: those of gpus.yml and stack.lock, empty where there is none.

    Raises:
        ConfigurationError: as ``read_fleet``.
    """
    members = {name: tuple(hosts) for name, hosts in groups.items()}
    for name, variables in hostvars.items():
        check_versions(name, variables, inventory)
    choices = {key: _choice(key, hostvars, inventory) for key in CHOICES}
    services = read_services(services_text, directory / "services.yml")
    check_groups(tuple(hostvars), members, services, choices["load_balancer"], inventory, directory / "services.yml")
    gpus = gpu_lock.read(gpus_text, directory / gpu_lock.NAME)
    stacks = stacks_in(lock_text, directory / LOCK)
    locked = systems_in(lock_text, directory / LOCK)
    users = {group: inside for group, inside in members.items() if group not in ANSIBLES_OWN}
    hosts = tuple(
        make_host(name, versions_as_text(variables), [group for group in users if name in users[group]], inventory,
                  gpus.get(name), stacks.get(name), locked.get(name, ""))
        for name, variables in hostvars.items())
    check_addresses(hosts, inventory)
    fleet = Fleet(directory=directory, inventory=inventory, hosts=hosts, services=services,
                  package_source=choices["package_source"],  # type: ignore[arg-type]
                  load_balancer=choices["load_balancer"])  # type: ignore[arg-type]
    clashes(fleet)
    return fleet


def stacks_in(text: str, path: Path) -> dict[str, Mapping[str, Any]]:
    """By host, the variables that a stack.lock comes to.

    Raises:
        ConfigurationError: ``stack_lock.*``.
    """
    return {name: entry.variables() for name, entry in read(text, path).hosts.items()} if text else {}


def systems_in(text: str, path: Path) -> dict[str, str]:
    """By host, the release that a stack.lock was made with, ``debian12``.

    Raises:
        ConfigurationError: ``stack_lock.*``.
    """
    return {name: entry.os for name, entry in read(text, path).hosts.items()} if text else {}


def _text(path: Path, code: str) -> str:
    """A file's text, empty when there is none.

    Raises:
        ConfigurationError: ``<code>.not_yaml``.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise ConfigurationError(f"{code}.not_yaml", f"{path} is not UTF-8.", hint="save it as UTF-8") from None


def is_read(variable: str) -> bool:
    """Whether ``fleet_from_ansible`` looks at a variable of a host."""
    return variable in READ or variable in CHOICES or holds_version(variable)


def _choice(key: str, hostvars: Mapping[str, Mapping[str, Any]], inventory: Path) -> str:
    allowed = CHOICES[key]
    found = {str(variables.get(key, allowed[0])): host for host, variables in hostvars.items()}
    for value, host in found.items():
        if value not in allowed:
            raise ConfigurationError("inventory.bad_value", f"{inventory}: {key}={value} of {host} is not known.",
                                     hint=f"{key} is one of {', '.join(allowed)}; write it in [all:vars]")
    if len(found) > 1:
        raise ConfigurationError("inventory.not_one_value", f"{inventory}: {key} is "
                                 + " and ".join(f"{value} on {host}" for value, host in found.items())
                                 + "; it is one setting of the whole fleet.", hint=f"write {key}= in [all:vars] only")
    return next(iter(found), allowed[0])
