"""What an inventory says of a host's GPUs and their driver, checked before anybody asks the host. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsctl.stack.catalogue import called, catalogue
from opsctl.stack.fit import FLAVOURS, SOURCES, Flavour, Source
from opsctl.stack.versions import is_driver_version, order_of

VERSION, FLAVOUR, MODEL = "nvidia_driver_version", "nvidia_driver_flavour", "gpu_model"
FABRIC_MANAGER, OWN = "nvidia_driver_fabric_manager", "nvidia_driver_own"
BUNDLE_VERSIONS, SOURCE = "nvidia_driver_bundle_versions", "nvidia_driver_source"
# Everything that is read here, so that a caller with lazy variables can fetch these only.
READ = (VERSION, FLAVOUR, MODEL, FABRIC_MANAGER, BUNDLE_VERSIONS, OWN, SOURCE)
CHOICES: Mapping[str, tuple[str, ...]] = {FLAVOUR: FLAVOURS, FABRIC_MANAGER: ("auto", "present", "absent"),
                                              SOURCE: SOURCES}


@dataclass(frozen=True)
class Wrong:
    """A variable that cannot be right: ``problem`` follows ``key=value of HOST`` in a sentence."""

    key: str
    value: str
    problem: str
    hint: str


@dataclass(frozen=True)
class WantedDriver:
    """A driver that the bundle has to hold. ``hosts``: who names it, for a sentence; ``own``: what comes with it.

    ``flavours``: those that are certain; with both, a source that has one of them will do.
    """

    version: str
    flavours: tuple[Flavour, ...]
    hosts: tuple[str, ...]
    own: tuple[str, ...]
    source: Source = "vendor"


def first_wrong(variables: Mapping[str, Any]) -> Wrong | None:
    """The first of a host's GPU variables that cannot be right."""
    for key, allowed in CHOICES.items():
        if key in variables and str(variables[key]) not in allowed:
            return Wrong(key, str(variables[key]), "is not known", f"{key} is one of {', '.join(allowed)}")
    for key in (VERSION, BUNDLE_VERSIONS):
        for version in listed(variables.get(key)):
            if not is_driver_version(version):
                return Wrong(key, version, "is no exact version of a driver",
                             f'{key}="580.126.09": the whole version, as text')
    if len(listed(variables.get(VERSION))) > 1:
        return Wrong(VERSION, str(variables[VERSION]), "is more than one version", f"others go into {BUNDLE_VERSIONS}")
    model = str(variables.get(MODEL, ""))
    if model and not called(model):
        names = {gpu.name.removeprefix("NVIDIA ") for gpu in catalogue().values()}
        near = difflib.get_close_matches(model, sorted(names), 3, 0.4)
        return Wrong(MODEL, model, "is no GPU of the catalogue",
                     f"one of them: {', '.join(near)}" if near else "H200, L40S, RTX 4090 and the like")
    return None


def wanted_drivers(hostvars: Mapping[str, Mapping[str, Any]], own: Sequence[str]) -> tuple[WantedDriver, ...]:
    """Every driver that an inventory's hosts name, and those that are to be kept for the way back, oldest first.

    ``own``: the role's default of the packages that come with a driver.
    """
    with_driver = {host: variables for host, variables in hostvars.items() if listed(variables.get(VERSION))}
    found = []
    # In [all:vars] the list for the way back reaches hosts without a GPU too: those say nothing of flavours.
    for version in sorted({version for variables in hostvars.values() for version in _named(variables)}, key=order_of):
        hosts = {host: variables for host, variables in (with_driver or hostvars).items()
                 if version in _named(variables)} or hostvars
        for source in SOURCES:
            mine = {host: variables for host, variables in hosts.items() if source_of(variables) == source}
            flavours = {flavour for variables in mine.values() for flavour in flavours_of(variables)}
            others = [name for variables in mine.values()
                      for name in (listed(variables[OWN]) if OWN in variables else own)]
            if mine:
                found.append(WantedDriver(version, tuple(flavour for flavour in FLAVOURS if flavour in flavours),
                                          tuple(mine), tuple(dict.fromkeys(others)), source))
    return tuple(found)


def source_of(variables: Mapping[str, Any]) -> Source:
    """Whose packages a host's driver comes in; the vendor's where its inventory says nothing."""
    return next((source for source in SOURCES if source == variables.get(SOURCE)), "vendor")


def _named(variables: Mapping[str, Any]) -> tuple[str, ...]:
    return (*listed(variables.get(VERSION)), *listed(variables.get(BUNDLE_VERSIONS)))


def flavours_of(variables: Mapping[str, Any]) -> tuple[Flavour, ...]:
    """The kernel modules that a host may need, as far as its inventory tells; its PCI ids tell it later."""
    written = [flavour for flavour in FLAVOURS if flavour == variables.get(FLAVOUR)]
    models = called(str(variables.get(MODEL, "")))
    proprietary = [gpu.architecture.modules == "proprietary" for gpu in models]
    if written:
        return tuple(written)
    if proprietary and all(proprietary):
        return ("proprietary",)
    return ("open",) if proprietary and not any(proprietary) else FLAVOURS


def listed(value: Any) -> tuple[str, ...]:
    """A list, or text with commas, as its parts; nothing is no part."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else \
        [] if value is None else [value]
    return tuple(text for part in parts if (text := str(part).strip()))
