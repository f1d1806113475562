"""Which suites a bundle has, and for which Pythons it has wheels: those of the fleet's hosts. ``wanted`` is pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsctl.errors import ConfigurationError, RefusedError
from opsctl.fleet.ansible_inventory import read_raw
from opsctl.fleet.hosts import check_host
from opsctl.fleet.inventory import CHOICES, stacks_in, systems_in
from opsctl.fleet.systems import OS_RELEASE, default_system, os_release_of, system_of
from opsctl.fleet.versions import check_versions, versions_as_text
from opsctl.stack.knowledge import System, knowledge
from opsctl.stack.lock import FILE, REMAKE

Variables = Mapping[str, Any]
DEBIAN = "debian"


@dataclass(frozen=True)
class Suite:
    """One suite, and the hosts that run it: their variables by name, stack.lock's where the inventory is silent."""

    system: System
    hosts: Mapping[str, Variables]


@dataclass(frozen=True)
class Wanted:
    """What a fleet's bundle serves. ``systems``: of all hosts, also of those that take no packages from it."""

    suites: tuple[Suite, ...]
    systems: tuple[System, ...]

    def hosts_of(self, suite: Suite, names: Callable[[Variables], object]) -> Mapping[str, Variables]:
        """The hosts of a suite; none of them where only hosts of other suites name such packages.

        A list for the way back in [all:vars] reaches hosts, and with them suites, that never have what it is of.
        """
        def any_of(hosts: Mapping[str, Variables]) -> bool:
            return any(names(variables) for variables in hosts.values())

        elsewhere = any(any_of(other.hosts) for other in self.suites if other is not suite)
        return {} if elsewhere and not any_of(suite.hosts) else suite.hosts


def wanted_by_inventory(inventory: Path | None) -> Wanted:
    """What the hosts of an inventory and its stack.lock want; without an inventory what Debian 12 wants.

    Raises:
        ConfigurationError: a variable cannot be right; the message names file, key and value.
        RefusedError: ``bundle.no_suite``.
    """
    if inventory is None:
        return wanted({}, {}, "")
    hostvars: dict[str, Variables] = {}
    for host, variables in read_raw(inventory).hostvars.items():
        check_versions(host, variables, inventory)
        hostvars[host] = versions_as_text(variables)
        check_host(host, hostvars[host], inventory)
    lock = inventory.parent / FILE
    text = lock.read_text(encoding="utf-8") if lock.exists() else ""
    stacks = stacks_in(text, lock)
    return wanted({host: {**stacks.get(host, {}), **variables} for host, variables in hostvars.items()},
                  systems_in(text, lock), lock)


def wanted(hostvars: Mapping[str, Variables], locked: Mapping[str, str], lock: object) -> Wanted:
    """The suites in the order of ``systems.csv``. ``locked``: releases by stack.lock, which errors call ``lock``.

    Raises:
        ConfigurationError: ``stack_lock.bad_value``.
        RefusedError: ``bundle.no_suite``: a host takes its packages from the bundle, and runs no Debian.
    """
    systems = {host: _system(host, variables, locked.get(host, ""), lock) for host, variables in hostvars.items()}
    for host, system in systems.items():
        source = str(hostvars[host].get("package_source", CHOICES["package_source"][0]))
        if system.id != DEBIAN and source == "gateway":
            raise RefusedError("bundle.no_suite", f"{host} runs {system.name}, and a bundle has packages of Debian "
                               "only.", hint="package_source=upstream in [all:vars]: hosts then take packages from "
                               f"their own sources; or {OS_RELEASE}=debian12, where that is what it runs")
    found = [system for system in knowledge().systems if system in systems.values()]
    debians = [system for system in found if system.id == DEBIAN] or [default_system()]
    return Wanted(tuple(Suite(system, {host: hostvars[host] for host in hostvars if systems[host] == system})
                        for system in debians), tuple(found or debians))


def _system(host: str, variables: Variables, locked: str, lock: object) -> System:
    key = os_release_of(variables, locked)
    system = system_of(key)
    if system is None:
        raise ConfigurationError("stack_lock.bad_value", f"{lock}: os {key} of {host} is no distribution's release "
                                 "that hosts may run.", hint=REMAKE)
    return system
