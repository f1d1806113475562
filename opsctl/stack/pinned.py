"""Packages of a vendor that have to have the exact versions of the inventory: which ones, and what a host lacks. Pure.

Not the driver's, which are a family of their own (``driver.py``): the container toolkit's four move together because
each is named with its version; CUDA's carry a part of the version in their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opsctl.errors import RefusedError
from opsctl.fleet.vendor_packages import CUDA, NCCL
from opsctl.stack.index import Index
from opsctl.stack.versions import NEAREST, order_of

NUMBERS = re.compile(r"\d+(?:\.\d+)*")
BUILT_FOR = re.compile(r"\+cuda\d+\.\d+")
BRACES = re.compile(r"\{\w+\}")


@dataclass(frozen=True)
class Wish:
    """One variable of the inventory: packages that are to have one version, built for one CUDA where that is told.

    ``known_by``: what the first package is called in any version, for those that are near.
    """

    variable: str
    version: str
    names: tuple[str, ...]
    build: str = ""
    known_by: str = ""


@dataclass(frozen=True)
class Seen:
    """What a host has: versions and dpkg's other states by name, holds, and what the role brought last time."""

    installed: Mapping[str, str]
    states: Mapping[str, str]
    held: frozenset[str]
    recorded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Course:
    """``install``: ``name=version`` for apt; ``remove``: all that may go; ``hold``: to be put on hold afterwards."""

    install: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    hold: tuple[str, ...] = ()


def wishes(versions: Mapping[str, str], names: Mapping[str, Sequence[str]]) -> tuple[Wish, ...]:
    """``versions`` of the inventory by variable; ``names``: of packages, whose braces versions are filled into."""
    cuda = (*versions.get(CUDA, "").split("."), "", "")
    found = []
    for variable, written in versions.items():
        version, plus, build = written.partition("+")
        own = version.split(".")
        braces = {"major": own[0], "minor": own[1], "cuda_major": cuda[0], "cuda_minor": cuda[1]}
        if variable == NCCL and not plus:
            plus, build = "+", f"cuda{cuda[0]}.{cuda[1]}"
        templates = tuple(names[variable])
        found.append(Wish(variable, version, tuple(name.format(**braces) for name in templates), plus + build,
                          BRACES.sub(r"\\d+", templates[0])))
    return tuple(found)


def upstream_of(package_version: str) -> tuple[str, str]:
    """The vendor's version and what it was built for: ``2.28.9`` and ``+cuda13.0`` of ``2.28.9-1+cuda13.0``."""
    upstream, _, revision = re.sub(r"^\d+:", "", package_version).rpartition("-")
    built = BUILT_FOR.search(revision)
    return (upstream or revision, built[0] if built else "")


def version_for(index: Index, name: str, wish: Wish) -> str:
    """The package's version that brings what is wished for, of several the last revision; empty when there is none."""
    fitting = [version for version in index.get(name, ()) if upstream_of(version) == (wish.version, wish.build)]
    return max(fitting, key=_order, default="")


def lacking(index: Index, wish: Wish) -> tuple[str, ...]:
    """The packages of a wish that a source does not have."""
    return tuple(name for name in wish.names if not version_for(index, name, wish))


def near(index: Index, wish: Wish) -> tuple[str, ...]:
    """The versions that there are of what was wished for, as the inventory would name them; at most three."""
    there = {upstream_of(version) for name in index if re.fullmatch(wish.known_by, name) for version in index[name]}

    def distance(one: tuple[str, str]) -> tuple[object, ...]:
        pairs = zip((*order_of(one[0]), 0, 0), (*order_of(wish.version), 0, 0), strict=False)
        return tuple(abs(left - right) for left, right in pairs), one[1] != wish.build, one

    sortable = [one for one in there if NUMBERS.fullmatch(one[0])]
    return tuple("".join(one) for one in sorted(sortable, key=distance)[:NEAREST])


def packages_of(host: str, index: Index, wanted: Sequence[Wish], hint: str) -> dict[str, str]:
    """``{name: version}`` of all that was wished for.

    Raises:
        RefusedError: ``packages.no_such_version``; the nearest versions stand in the sentence.
    """
    for wish in wanted:
        missing = lacking(index, wish)
        if missing:
            raise RefusedError("packages.no_such_version", f"{host} names {sentence_of(index, wish, missing[0])}",
                               hint=hint)
    return {name: version_for(index, name, wish) for wish in wanted for name in wish.names}


def sentence_of(index: Index, wish: Wish, missing: str, source: str = "the package source") -> str:
    """What is missing, and what is near."""
    there = near(index, wish)
    has = f"the nearest that it has: {', '.join(there)}" if there else "and no other version of it"
    return f"{wish.variable}={wish.version}, and {source} has no {missing} {wish.version}{wish.build}; {has}."


def course(packages: Mapping[str, str], seen: Seen) -> Course:
    """What is to be done on a host; nothing when it has all that it is to have."""
    whole = {name: version for name, version in seen.installed.items() if name not in seen.states}
    gone = tuple(sorted(name for name in seen.recorded if name not in packages and name in seen.installed))
    if gone or any(whole.get(name) != version for name, version in packages.items()):
        # Every one by its name: apt changes no held package that is not named, and takes the holds off as it does.
        return Course(tuple(f"{name}={version}" for name, version in packages.items()), gone, tuple(packages))
    return Course(hold=tuple(name for name in packages if name not in seen.held))


def _order(version: str) -> tuple[tuple[int, str], ...]:
    """Numbers by their value, the rest by its letters: good enough among revisions of one version."""
    return tuple((int(part), "") if part.isdigit() else (0, part) for part in re.findall(r"\d+|\D+", version))
