"""The vendor's drivers in the bundle: exactly those that the inventory names, each resolved for itself.

Drivers conflict with each other, and so do the two kernel modules of one, so each pair of version and flavour gets a
run of apt of its own; the union of the files goes into the pool, where several versions of a package lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from opsctl.bundle.closure import Closure
from opsctl.bundle.private_apt import PrivateApt
from opsctl.bundle.vendor_sources import FOLDER, VendorSource, described, read_vendor_sources
from opsctl.engines.events import Emit, Note
from opsctl.errors import RefusedError
from opsctl.fleet.ansible_inventory import read_raw
from opsctl.fleet.gpus import WantedDriver, wanted_drivers
from opsctl.fleet.hosts import check_gpus
from opsctl.fleet.inventory import stacks_in
from opsctl.fleet.versions import check_versions, versions_as_text
from opsctl.stack.driver import PIN, Names
from opsctl.stack.fit import Flavour
from opsctl.stack.index import Index, drivers_of, family, package_version, parse_index
from opsctl.stack.lock import FILE
from opsctl.stack.versions import nearest

ROLE = "nvidia_driver"


def driver_names(roles: Path) -> Names:
    """The driver's packages by the role's variables, which alone know them."""
    known = {key: value for folder in ("defaults", "vars") for key, value in
             yaml.safe_load((roles / ROLE / folder / "main.yml").read_text(encoding="utf-8")).items()}
    return Names(*(tuple(known[f"{ROLE}_{key}"]) for key in
                   ("exact", "open", "proprietary", "fabric", "own", "patterns")))


def drivers_of_inventory(inventory: Path, names: Names) -> tuple[WantedDriver, ...]:
    """What the hosts of an inventory name; empty for a fleet that leaves its drivers alone.

    Raises:
        ConfigurationError: a version is a number, or no driver's.
    """
    hostvars = read_raw(inventory).hostvars
    for host, variables in hostvars.items():
        check_versions(host, variables, inventory)
        check_gpus(host, versions_as_text(variables), inventory)
    lock = inventory.parent / FILE
    stacks = stacks_in(lock.read_text(encoding="utf-8") if lock.exists() else "", lock)
    return wanted_drivers({host: {**stacks.get(host, {}), **versions_as_text(variables)}
                           for host, variables in hostvars.items()}, names.own)


def download_drivers(wanted: Sequence[WantedDriver], names: Names, fleet_directory: Path, emit: Emit
                     ) -> tuple[Closure, ...]:
    """The drivers, one or more, with all they depend on, on disk and with the digests that the signed indexes name.

    Raises:
        ConfigurationError: a source in ``sources.d`` is unsigned or malformed.
        RefusedError: there is none (``bundle.no_vendor_source``), or it does not have a version
            (``bundle.no_such_driver``); and what ``download_closure`` raises.
    """
    vendors = read_vendor_sources(fleet_directory)
    if not vendors:
        raise RefusedError("bundle.no_vendor_source", f"{wanted[0].hosts[0]} names the driver {wanted[0].version}, and "
                           f"{fleet_directory / FOLDER} holds no source to get it from.",
                           hint=f"write {FOLDER}/nvidia.sources there: Types: deb, URIs, Suites and Signed-By of the "
                                "vendor's repository")
    apt = PrivateApt(vendors)
    apt.update(emit)
    index = parse_index(apt.index(names.may_belong))
    closures = []
    for driver in wanted:
        lacking = _lacking(driver, names.fabric, index)
        if lacking:
            emit(Note(f"the sources in {FOLDER} have no {', '.join(lacking)} {driver.version}: no bundled fabric "
                      "manager for boards with NVSwitches", "warning"))
        for flavour in _flavours(driver, names, index, vendors):
            packages = _arguments(driver, flavour, names, index)
            debs = apt.resolve(packages)
            apt.download(packages, debs, emit)
            closures.append(Closure(debs, apt.archives))
    return tuple(closures)


def _flavours(driver: WantedDriver, names: Names, index: Index, vendors: Sequence[VendorSource]) -> tuple[Flavour, ...]:
    """Those of the driver's flavours that the sources have whole; when only one is wanted it has to be there."""
    there: list[Flavour] = []
    missing: list[str] = []
    for flavour in driver.flavours:
        roots = names.roots(flavour, fabric_manager=False)
        lacking = _lacking(driver, roots, index)
        lacking += [name for name in (PIN + driver.version,) if name not in index]
        missing += lacking
        there += [] if lacking else [flavour]
    if there:
        return tuple(there)
    near = nearest(driver.version, drivers_of(index, missing[0])) if not missing[0].startswith(PIN) else ()
    raise RefusedError(
        "bundle.no_such_driver", f"the sources in {FOLDER} ({described(vendors)}) have no {missing[0]} "
        f"{'' if missing[0].startswith(PIN) else driver.version + ' '}for nvidia_driver_version={driver.version} of "
        f"{', '.join(dict.fromkeys(driver.hosts))}; "
        + (f"the nearest that they have: {', '.join(near)}." if near else "and no other version of it."),
        hint=f'nvidia_driver_version="{near[0]}", or another source' if near else "another version, or another source")


def _lacking(driver: WantedDriver, roots: Sequence[str], index: Index) -> list[str]:
    return [name for name in roots if not package_version(index, name, driver.version)]


def _arguments(driver: WantedDriver, flavour: Flavour, names: Names, index: Index) -> tuple[str, ...]:
    """What apt is asked for: every member of the family with its exact version, or it would take the newest of some."""
    fabric = not _lacking(driver, names.fabric, index)
    members = family(index, names.roots(flavour, fabric_manager=fabric), driver.version)
    return (PIN + driver.version, *(f"{name}={version}" for name, version in members.items()), *driver.own)
