"""What is in the vendor repository: ``packages.toml``, filled in for each version. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsctl.errors import ConfigurationError

SCHEMA = "opsctl.lab-vendor/v1"
ARCHITECTURE = "amd64"
MAINTAINER = "opsctl lab <opsctl-lab@localhost>"
# The order of a control file; relations may be any of these.
RELATIONS = ("Pre-Depends", "Depends", "Recommends", "Suggests", "Conflicts", "Breaks", "Replaces", "Provides")
BUILT = "built:"


@dataclass(frozen=True)
class File:
    """One file of a package. ``source`` is a name below this folder, or ``built:library`` and ``built:modprobe``."""

    path: str
    source: str
    mode: int = 0o644
    conffile: bool = False


@dataclass(frozen=True)
class Unit:
    """A systemd unit: what installing its package does with it."""

    name: str
    enabled: bool
    started: bool


@dataclass(frozen=True)
class Package:
    """One package in one version; ``words`` are what its texts may name as ``@WORD@``."""

    name: str
    version: str
    source: str
    section: str
    description: str
    relations: Mapping[str, tuple[str, ...]]
    words: Mapping[str, str]
    files: tuple[File, ...] = ()
    links: Mapping[str, str] | None = None
    units: tuple[Unit, ...] = ()
    dropins: tuple[str, ...] = ()  # units that wait for the driver
    triggers: tuple[str, ...] = ()
    module: str = ""  # open, proprietary: a kernel module is built when it is configured

    @property
    def upstream(self) -> str:
        """The version without epoch and revision: ``580.126.09``."""
        return self.words["UPSTREAM"]

    @property
    def file_name(self) -> str:
        """The .deb's name as apt's cache has it: an epoch's colon as ``%3a``."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{ARCHITECTURE}.deb"


def packages(document: Mapping[str, Any]) -> tuple[Package, ...]:
    """Every package in every version, of the parsed ``packages.toml``.

    Raises:
        ConfigurationError: ``lab.vendor_packages``: the file is not what this opsctl reads, or says something twice.
    """
    if document.get("schema") != SCHEMA:
        raise ConfigurationError("lab.vendor_packages", f"packages.toml is not of schema {SCHEMA}.")
    groups = document["groups"]
    found = tuple(package for entry in document["packages"] for package in _versions(entry, groups[entry["group"]]))
    names = [package.file_name for package in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError("lab.vendor_packages", f"packages.toml makes {', '.join(twice)} twice.")
    return found


def drivers(document: Mapping[str, Any]) -> tuple[str, ...]:
    """The driver versions, as they are listed."""
    return tuple(document["groups"]["driver"]["upstream"])


def control(package: Package) -> str:
    """The package's control file."""
    lines = [f"Package: {package.name}", f"Source: {package.source}", f"Version: {package.version}",
             f"Architecture: {ARCHITECTURE}", f"Maintainer: {MAINTAINER}", f"Section: {package.section}",
             "Priority: optional"]
    lines += [f"{field}: {', '.join(package.relations[field])}" for field in RELATIONS if field in package.relations]
    return "\n".join([*lines, f"Description: {package.description}", " A package of opsctl's lab: simulated GPUs only."]
                     ) + "\n"


def fill(text: str, words: Mapping[str, str]) -> str:
    """``text`` with every ``@WORD@`` replaced."""
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    return text


def script_parts(package: Package) -> dict[str, tuple[tuple[str, Mapping[str, str]], ...]]:
    """What each maintainer script is made of, in order: names of files in ``parts`` and the words for them."""
    module = (("module", package.words),) if package.module else ()
    units = tuple(("unit", {**package.words, "UNIT": unit.name, "ENABLED": str(unit.enabled).lower(),
                            "STARTED": str(unit.started).lower()}) for unit in package.units)
    made = {
        "preinst": (("preinst", package.words),),
        "postinst": tuple((f"{part}.postinst", words) for part, words in (*module, *units)),
        "prerm": tuple((f"{part}.prerm", words) for part, words in (*units, *module)),
        "postrm": tuple((f"{part}.postrm", words) for part, words in units),
    }
    return {name: parts for name, parts in made.items() if parts}


def _versions(entry: Mapping[str, Any], group: Mapping[str, Any]) -> Iterator[Package]:
    for upstream in group["upstream"]:
        braces = {"upstream": upstream, "branch": upstream.partition(".")[0]}
        braces["version"] = group["version"].format(**braces)
        braces["pin"] = group.get("pin", "").format(**braces)
        braces["name"] = entry["name"].format(**braces)
        words = {word.upper(): value for word, value in braces.items()} | {"MODULE": entry.get("module", "")}
        yield Package(
            name=braces["name"],
            version=braces["version"],
            source=group["source"].format(**braces),
            section=entry["section"],
            description=entry["description"].format(**braces),
            relations=_relations(entry.get("relations", ()), braces),
            words=words,
            files=tuple(File(file["path"].format(**braces), file["from"], int(file.get("mode", "644"), 8),
                             file.get("conffile", False)) for file in entry.get("files", ())),
            links={path.format(**braces): target.format(**braces) for path, target in entry.get("links", {}).items()},
            units=tuple(Unit(**unit) for unit in entry.get("units", ())),
            dropins=tuple(entry.get("dropins", ())),
            triggers=tuple(entry.get("triggers", ())),
            module=entry.get("module", ""),
        )


def _relations(entries: Sequence[Mapping[str, str]], braces: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        if entry["field"] not in RELATIONS or not entry["source"]:
            raise ConfigurationError("lab.vendor_packages", f"packages.toml: {entry['field']} of {braces['name']} is "
                                                            "no relation, or says no source.")
        found[entry["field"]] = (*found.get(entry["field"], ()), entry["value"].format(**braces))
    return found
