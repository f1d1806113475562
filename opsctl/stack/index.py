"""An apt index as text (``Packages``, or what ``apt-cache show`` prints): which packages move together. Pure.

Apt alone does not keep a driver together: ``nvidia-driver-cuda=580.126.09-1`` fails when its exact dependencies are
not named too, because apt takes the newest of each (measured on apt 2.6 and 3.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from opsctl.stack.versions import driver_in, order_of

DEPENDS = ("Pre-Depends", "Depends")
NAME = re.compile(r"\s*([a-z0-9][a-z0-9+.-]+)")


@dataclass(frozen=True)
class Package:
    """One version of one package. ``depends``: for each dependency the names that would do, versions left out."""

    name: str
    version: str
    depends: tuple[tuple[str, ...], ...] = ()


Index = Mapping[str, Mapping[str, Package]]  # by name, then by version


def parse_index(text: str) -> Index:
    """Every package in it; of a version that is listed twice, the first."""
    found: dict[str, dict[str, Package]] = {}
    for stanza in re.split(r"\n\s*\n", text):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[:1] not in " \t")
        name, version = fields.get("Package", "").strip(), fields.get("Version", "").strip()
        if name and version:
            depends = tuple(names for key in DEPENDS for names in _alternatives(fields.get(key, "")))
            found.setdefault(name, {}).setdefault(version, Package(name, version, depends))
    return found


def package_version(index: Index, name: str, driver: str) -> str:
    """The version of a package that brings this driver, ``580.126.09-1``; empty when there is none."""
    fitting = [version for version in index.get(name, ()) if driver_in(version) == driver]
    return max(fitting, key=_revision, default="")


def companion_version(index: Index, name: str, driver: str) -> str:
    """The version of a package that comes with a driver under a version of its own; empty when there is none.

    The newest that is not newer than the driver, else the oldest: Debian 12 has nvidia-modprobe 535.161.07 beside the
    driver 535.261.03, and a bundle may hold another source's nvidia-modprobe 580.
    """
    versions = sorted((version for version in index.get(name, ()) if driver_in(version)),
                      key=lambda version: (order_of(driver_in(version)), _revision(version)))
    fitting = [version for version in versions if order_of(driver_in(version)) <= order_of(driver)]
    return fitting[-1] if fitting else next(iter(versions), "")


def drivers_of(index: Index, name: str) -> tuple[str, ...]:
    """The driver versions in which there is this package."""
    return tuple(dict.fromkeys(driver for version in index.get(name, ()) if (driver := driver_in(version))))


def family(index: Index, roots: Sequence[str], driver: str) -> dict[str, str]:
    """``{name: version}`` of the roots and of all they depend on that has a version of this driver.

    Where one of several packages would do, one that is in already does; else the first that there is.

    Raises:
        KeyError: a root has no version of this driver; the argument is its name.
    """
    members: dict[str, str] = {}
    for name in roots:
        version = package_version(index, name, driver)
        if not version:
            raise KeyError(name)
        members[name] = version
    waiting = list(members)
    while waiting:
        name = waiting.pop(0)
        for names in index[name][members[name]].depends:
            if any(one in members for one in names):
                continue
            there = next((one for one in names if package_version(index, one, driver)), "")
            if there:
                members[there] = package_version(index, there, driver)
                waiting.append(there)
    return dict(sorted(members.items()))


def _alternatives(field: str) -> Iterable[tuple[str, ...]]:
    for group in field.split(","):
        names = tuple(match[1] for one in group.split("|") if (match := NAME.match(one)))
        if names:
            yield names


def _revision(version: str) -> tuple[tuple[int, str], ...]:
    """Numbers by their value, the rest by its letters: good enough among revisions of one driver."""
    return tuple((int(part), "") if part.isdigit() else (0, part) for part in re.findall(r"\d+|\D+", version))
