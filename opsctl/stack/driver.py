"""From what a host has to the driver that its inventory names: which packages, in which order. Pure.

The pinning package goes first and alone, because apt reads preferences when it starts: pin and driver in one
transaction install the newest driver under the older one's pin (measured). Then every member of the driver's family
with its exact version, because apt takes the newest of each dependency otherwise, and every held package by its name,
because apt changes no held package that is not named; it takes the holds off as it does. Holds come last.

Debian's own packages have no pinning package: preferences that opsctl writes take its place (``preferences``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from opsctl.errors import RefusedError
from opsctl.stack.fit import Flavour, Wish, check_fit, flavour_of, known_gpus, needs_fabric_manager
from opsctl.stack.index import Index, companion_version, drivers_of, family, package_version
from opsctl.stack.versions import driver_in, nearest, order_of

PIN = "nvidia-driver-pinning-"
HEADERS = "linux-headers-"
PRIORITY = 1001  # from 1000 on apt prefers a version that is older than the installed one
Change = Literal["install", "up", "down", "flavour", "mend", "none"]


@dataclass(frozen=True)
class Names:
    """The role's package names: of the driver's exact version, the two kernel modules, the fabric manager, others.

    ``companions``: what the driver needs and what is released apart from it, pinned and held along with it; ``apart``:
    what only looks like the driver's, by its version, and is left alone. ``patterns``: what else belongs to a driver,
    as ``dpkg-query`` and ``fnmatch`` read it.
    """

    exact: tuple[str, ...]
    open: tuple[str, ...]
    proprietary: tuple[str, ...]
    fabric: tuple[str, ...]
    own: tuple[str, ...] = ()  # with versions of their own
    patterns: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

    def roots(self, flavour: Flavour, *, fabric_manager: bool) -> tuple[str, ...]:
        module = self.open if flavour == "open" else self.proprietary
        return (*self.exact, *module, *(self.fabric if fabric_manager else ()))

    def may_belong(self, name: str) -> bool:
        """Whether a package of this name may be a driver's; its version tells."""
        known = (*self.exact, *self.open, *self.proprietary, *self.fabric, *self.companions, *self.patterns)
        return any(fnmatchcase(name, pattern) for pattern in known)


@dataclass(frozen=True)
class Seen:
    """What a host has. ``gpus``: PCI device ids; ``installed``: driver packages and their versions; ``held``: names.

    ``states``: of those that are not installed whole, dpkg's word for it: a module that did not build leaves
    ``half-configured``. ``loaded``: the kernel module's version, empty when none is; ``serving``: active instances;
    ``dpkg``: who holds its lock; ``kernel``: the one that runs; ``headers``: whether those of it are there.
    """

    gpus: tuple[str, ...]
    switches: int = 0
    installed: Mapping[str, str] | None = None
    states: Mapping[str, str] | None = None
    held: frozenset[str] = frozenset()
    loaded: str = ""
    serving: tuple[str, ...] = ()
    dpkg: str = ""
    kernel: str = ""
    headers: bool = True


@dataclass(frozen=True)
class Desired:
    """What a host is to have; the same however often it is asked. ``packages``: the family, with exact versions.

    ``pin``: the vendor's pinning package; empty where opsctl's preferences pin. ``apart``: what looks like the
    driver's by name and version, and has a version of its own.
    """

    version: str
    flavour: Flavour
    fabric_manager: bool
    pin: str
    packages: Mapping[str, str]
    own: tuple[str, ...]
    apart: tuple[str, ...] = ()

    @property
    def holds(self) -> tuple[str, ...]:
        return (*((self.pin,) if self.pin else ()), *self.packages)

    @property
    def preferences(self) -> str:
        """What apt is to prefer, in the place of a pinning package: exactly these versions, older ones too."""
        if self.pin:
            return ""
        named: dict[str, list[str]] = {}
        for name, version in self.packages.items():
            named.setdefault(version, []).append(name)
        return "\n".join(f"Package: {' '.join(names)}\nPin: version {version}\nPin-Priority: {PRIORITY}\n"
                         for version, names in named.items())


@dataclass(frozen=True)
class Transaction:
    """One run of apt. ``install``: names, with ``=version`` where it is exact; ``remove``: all that may go."""

    what: str
    install: tuple[str, ...]
    remove: tuple[str, ...] = ()


@dataclass(frozen=True)
class Course:
    """``hold``: names to be put on hold afterwards; ``load``: the module in the kernel is not the wanted one."""

    change: Change
    transactions: tuple[Transaction, ...]
    hold: tuple[str, ...]
    load: bool


def desired(wish: Wish, seen: Seen, names: Names, index: Index) -> Desired:
    """What the inventory, the GPUs and the packages' source come to.

    Raises:
        ConfigurationError: the version or its flavour does not fit the GPUs.
        RefusedError: the source does not have it (``driver.no_such_version``), or no headers for the kernel.
    """
    gpus = known_gpus(wish, seen.gpus)
    check_fit(wish, gpus)
    flavour = flavour_of(wish, gpus)
    fabric = needs_fabric_manager(wish, gpus, seen.switches)
    packages = exact_packages(wish, index, names, flavour, fabric_manager=fabric)
    pin = PIN + wish.version if wish.source == "vendor" else ""
    if pin and pin not in index:
        raise RefusedError("driver.no_pin", f"{wish.host}: its package source has no {pin}, and nothing else keeps "
                           f"other tools from moving the driver.", hint=_build_hint())
    own = names.own
    if any(name.startswith(HEADERS) for name in own) and not seen.headers:
        headers = HEADERS + seen.kernel
        if headers not in index:
            raise RefusedError("driver.no_headers", f"{wish.host} runs kernel {seen.kernel}, and its package source "
                               f"has no {headers}: the module would be built for another kernel.",
                               hint="update and reboot the host's kernel, or opsctl bundle build with that package in "
                                    "nvidia_driver_own")
        own = (*own, headers)
    return Desired(wish.version, flavour, fabric, pin, packages, own, (*names.companions, *names.apart))


def exact_packages(wish: Wish, index: Index, names: Names, flavour: Flavour, *, fabric_manager: bool
                   ) -> dict[str, str]:
    """The family of a driver version and its companions, or a refusal that names the nearest versions that there are.

    Raises:
        RefusedError: ``driver.no_such_version``.
    """
    try:
        return members_of(index, names.roots(flavour, fabric_manager=fabric_manager), names.companions, wish.version)
    except KeyError as error:
        name = str(error.args[0])
        there = nearest(wish.version, drivers_of(index, name))
        has = f"the nearest that it has: {', '.join(there)}" if there else "and no other version of it"
        hint = f'nvidia_driver_version="{there[0]}", or {_build_hint()}' if there else _build_hint()
        # Debian does not bring every security update of the driver with the open module.
        if name in names.open and all(package_version(index, other, wish.version) for other in names.proprietary):
            hint += "; or nvidia_driver_flavour=proprietary, where the GPUs take it, which it has in that version"
        raise RefusedError("driver.no_such_version", f"{wish.host}: the package source has no {name} {wish.version}; "
                           f"{has}.", hint=hint) from None


def members_of(index: Index, roots: Sequence[str], companions: Sequence[str], driver: str) -> dict[str, str]:
    """Names and exact versions of all that is pinned together.

    Raises:
        KeyError: there is none of a package; the argument is its name.
    """
    found = family(index, roots, driver)
    for name in companions:
        found[name] = companion_version(index, name, driver)
        if not found[name]:
            raise KeyError(name)
    return dict(sorted(found.items()))


def course(want: Desired, seen: Seen, index: Index) -> Course:
    """What is to be done on a host, in order; nothing when it has all that it is to have."""
    installed = dict(seen.installed or {})
    whole = {name: version for name, version in installed.items() if name not in (seen.states or {})}
    pins = sorted(name for name in installed if name.startswith(PIN))
    transactions = []
    wanted_pins = [want.pin] if want.pin else []
    if pins != wanted_pins or any(name not in whole for name in wanted_pins):
        transactions.append(Transaction("pin", tuple(wanted_pins), tuple(name for name in pins if name != want.pin)))
    packages = {**want.packages, **followers(want, installed, index)}
    gone = leavers(want, installed, packages)
    own = tuple(name for name in want.own if name not in whole)
    if gone or own or any(whole.get(name) != version for name, version in packages.items()):
        exact = tuple(f"{name}={version}" for name, version in packages.items())
        transactions.append(Transaction("driver", (*exact, *own), gone))
    # apt takes the hold off each held package that it is told to change (seen on apt 2.6), so all are held anew.
    hold = tuple(name for name in (*wanted_pins, *packages) if transactions or name not in seen.held)
    return Course(change_of(want, installed, bool(transactions or hold)), tuple(transactions), hold,
                  seen.loaded != want.version)


def members(want: Desired, installed: Mapping[str, str]) -> tuple[str, ...]:
    """The driver's packages among the installed ones, by their versions, whole or not.

    Pins are none of them, and what has a version of its own is none: ``nvlsm`` 2025.03.1 only looks like one.
    """
    return tuple(name for name, version in installed.items()
                 if driver_in(version) and not name.startswith(PIN) and name not in (*want.own, *want.apart))


def unwanted(want: Desired, name: str) -> bool:
    """Whether it must not be beside what is wanted: the other kernel module, a fabric manager without a fabric."""
    fabric = name.startswith("nvidia-fabricmanager") and not want.fabric_manager
    return name not in want.packages and ("-dkms" in name or fabric)


def followers(want: Desired, installed: Mapping[str, str], index: Index) -> dict[str, str]:
    """Installed packages of the driver that nobody asked for, and that the wanted version has too: they move along."""
    return {name: version for name in members(want, installed) if name not in want.packages
            and not unwanted(want, name) and (version := package_version(index, name, want.version))}


def leavers(want: Desired, installed: Mapping[str, str], packages: Mapping[str, str]) -> tuple[str, ...]:
    """What goes: the unwanted, and what only another version of the driver has.

    What has the wanted version already stays, though the index does not know it: its source may be switched off.
    """
    return tuple(name for name in members(want, installed) if name not in packages
                 and (unwanted(want, name) or driver_in(installed[name]) != want.version))


def change_of(want: Desired, installed: Mapping[str, str], pending: bool) -> Change:
    """What it is to a person: the first driver, a newer or older one, the other module, something mended, nothing."""
    there = [driver_in(installed[name]) for name in members(want, installed)]
    if not there:
        return "install"
    oldest, newest = min(there, key=order_of), max(there, key=order_of)
    if order_of(oldest) < order_of(want.version):
        return "up"
    if order_of(newest) > order_of(want.version):
        return "down"
    module = [name for name in want.packages if name.endswith("-dkms")]
    if module and not any(name in installed for name in module):
        return "flavour"
    return "mend" if pending else "none"


def check_idle(host: str, what: Course, seen: Seen) -> None:
    """No change of a driver while it is worked with, and none while somebody else is at dpkg.

    Raises:
        RefusedError: ``driver.dpkg_busy`` or ``driver.serving``.
    """
    if what.transactions and seen.dpkg:
        raise RefusedError("driver.dpkg_busy", f"{host}: {seen.dpkg} holds dpkg's lock.", hint="wait until it is done")
    # Without a package there may be the driver of another installer, whose libraries the instances have open.
    first = what.change == "install" and not seen.loaded
    if seen.serving and not first and (what.change not in ("mend", "none") or what.load):
        units = " ".join(seen.serving)
        raise RefusedError("driver.serving", f"{host} serves ({', '.join(seen.serving)}), and a driver is not changed "
                           "under running instances.",
                           hint=f"opsctl drain {host}, then opsctl exec --limit {host} -- systemctl stop {units}, "
                                f"then opsctl provision, then opsctl undrain {host}")


def _build_hint() -> str:
    return "opsctl bundle build, which brings what nvidia_driver_version and nvidia_driver_bundle_versions name"
