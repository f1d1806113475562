"""The drivers of a suite, the vendor's or Debian's: exactly those that its hosts name, each for itself.

Drivers conflict with each other, and so do the two kernel modules of one, so each pair of version and flavour gets a
run of apt of its own; the union of the files goes into the suite's pool, several versions of a package side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from opsctl.bundle.closure import Closure
from opsctl.bundle.private_apt import PrivateApt
from opsctl.bundle.suites import Suite, Wanted
from opsctl.bundle.vendor_sources import FOLDER, VendorSource, described, read_vendor_sources, serving
from opsctl.engines.events import Emit, Note
from opsctl.errors import RefusedError
from opsctl.fleet.gpus import SOURCE, VERSION, WantedDriver, listed, wanted_drivers
from opsctl.stack.driver import PIN, Names, members_of
from opsctl.stack.fit import Flavour, Source
from opsctl.stack.index import Index, drivers_of, package_version, parse_index
from opsctl.stack.knowledge import System
from opsctl.stack.versions import nearest

ROLE = "nvidia_driver"
DEBIAN_COMPONENTS = {"contrib", "non-free", "non-free-firmware"}


def driver_names(roles: Path) -> Mapping[Source, Names]:
    """The driver's packages by where they come from, by the role's variables, which alone know them."""
    known = {key: value for folder in ("defaults", "vars") for key, value in
             yaml.safe_load((roles / ROLE / folder / "main.yml").read_text(encoding="utf-8")).items()}
    vendor = Names(*(tuple(known[f"{ROLE}_{key}"]) for key in
                     ("exact", "open", "proprietary", "fabric", "own", "patterns")))
    debian = {key: tuple(value) for key, value in known[f"{ROLE}_debian"].items()}
    return {"vendor": vendor, "debian": replace(vendor, **debian)}


def drivers_wanted(suite: Suite, wanted: Wanted, own: Sequence[str]) -> tuple[WantedDriver, ...]:
    """What the hosts of a suite name; empty for those that leave their drivers alone.

    ``own``: the role's default of the packages that come with a driver.
    """
    return wanted_drivers(wanted.hosts_of(suite, lambda variables: listed(variables.get(VERSION))), own)


def download_drivers(wanted: Sequence[WantedDriver], system: System, names: Mapping[Source, Names],
                     fleet_directory: Path, emit: Emit) -> tuple[Closure, ...]:
    """The drivers, one or more, with all they depend on, on disk and with the digests that the signed indexes name.

    Raises:
        ConfigurationError: a source in ``sources.d`` is unsigned or malformed.
        RefusedError: there is none (``bundle.no_vendor_source``), or it does not have a version
            (``bundle.no_such_driver``), or two have it (``bundle.two_sources``); and what ``download_closure`` raises.
    """
    _check_one_source_each(wanted)
    sources = serving(read_vendor_sources(fleet_directory), system)
    return tuple(closure for source in dict.fromkeys(driver.source for driver in wanted) for closure in _download(
        [driver for driver in wanted if driver.source == source], names[source],
        system, _sources_for(source, sources, wanted, system, fleet_directory), emit))


def _check_one_source_each(wanted: Sequence[WantedDriver]) -> None:
    """Packages of both may have the same name and version and other content, and a pool has one file of a name."""
    for one in wanted:
        other = next((other for other in wanted if other.version == one.version and other.source != one.source), None)
        if other:
            raise RefusedError("bundle.two_sources", f"{one.hosts[0]} and {other.hosts[0]} name the driver "
                               f"{one.version}, of {one.source} and of {other.source}, and a suite has one of them.",
                               hint=f"write the same {SOURCE} for both, or another version for one")


def _sources_for(source: Source, found: Sequence[VendorSource], wanted: Sequence[WantedDriver], system: System,
                 fleet_directory: Path) -> tuple[VendorSource, ...]:
    """Of Debian's driver only what has Debian's components: NVIDIA's repository has packages of the same names."""
    usable = tuple(one for one in found if source == "vendor" or DEBIAN_COMPONENTS & set(one.components))
    if usable:
        return usable
    driver = next(one for one in wanted if one.source == source)
    name, whose = ("nvidia", "the vendor's repository") if source == "vendor" else (
        "debian", "a Debian mirror, with Components: contrib non-free non-free-firmware")
    raise RefusedError("bundle.no_vendor_source", f"{driver.hosts[0]} names the driver {driver.version}, and "
                       f"{fleet_directory / FOLDER} holds no source to get it from for {system.name}.",
                       hint=f"write {FOLDER}/{name}.sources there: Types: deb, URIs, Suites and Signed-By of {whose}")


def _download(wanted: Sequence[WantedDriver], names: Names, system: System, vendors: Sequence[VendorSource], emit: Emit
              ) -> tuple[Closure, ...]:
    apt = PrivateApt(system, vendors)
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
        lacking += [name for name in (*_pins(driver), *names.companions) if name not in index]
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
    members = members_of(index, names.roots(flavour, fabric_manager=fabric), names.companions, driver.version)
    return (*_pins(driver), *(f"{name}={version}" for name, version in members.items()), *driver.own)


def _pins(driver: WantedDriver) -> tuple[str, ...]:
    """The vendor's pinning package; for Debian's packages hosts get preferences of opsctl's."""
    return (PIN + driver.version,) if driver.source == "vendor" else ()
