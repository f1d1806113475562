"""Hashed locks: pip requirement lines, each with an exact version and hashes, as uv and pip-tools write them. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from opsctl.errors import ConfigurationError, RefusedError
from opsctl.serving.adapter import Adapter, Lock

DEFAULT_PYTHON = "3.11"  # Debian 12's
PYTHON = re.compile(r"3\.\d{1,2}")
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^]]*\])?==(?P<version>[^\s;]+)"
                         r"(?:\s*;\s*(?P<marker>.*?))?(?=\s+--hash=)")
HASH = re.compile(r"--hash=sha256:(?P<digest>[0-9a-f]{64})")
OPTIONS = ("--", "-i ", "-f ")  # where packages come from is the bundle's and the gateway's affair


@dataclass(frozen=True)
class Requirement:
    """One line. ``name`` is normalised as PEP 503 says, ``marker`` is empty when it counts everywhere."""

    name: str
    version: str
    marker: str
    digests: tuple[str, ...]

    def line(self) -> str:
        marker = f" ; {self.marker}" if self.marker else ""
        return f"{self.name}=={self.version}{marker}" + "".join(f" \\\n    --hash=sha256:{one}" for one in self.digests)


def parse_lock(text: str, where: str) -> tuple[Requirement, ...]:
    """The requirements of a lock; ``where`` is named in errors. Comments and options are left out.

    Raises:
        ConfigurationError: a requirement has no exact version or no sha256 hash.
    """
    requirements = []
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()  # noqa: PLW2901 - the line without its comment
        if not line or line.startswith(OPTIONS):
            continue
        match = REQUIREMENT.match(line)
        digests = tuple(HASH.findall(line))
        if match is None or not digests:
            raise ConfigurationError("engine.lock_without_hash",
                                     f"{where}: {line.split(' ')[0]} has no exact version with a sha256 hash.",
                                     hint="write the lock with uv pip compile --generate-hashes")
        requirements.append(Requirement(normalised(match["name"]), match["version"], match["marker"] or "", digests))
    return tuple(requirements)


def normalised(name: str) -> str:
    """``Foo_Bar.baz`` -> ``foo-bar-baz`` (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def render_lock(requirements: Sequence[Requirement]) -> str:
    """A lock's text: the requirements alone, sorted, so that who wrote it and from where does not change a release."""
    return "".join(requirement.line() + "\n" for requirement in sorted(requirements, key=lambda one: one.name))


def engine_lock(text: str, engine: Adapter, python: str, where: str) -> Lock:
    """A lock that an operator brought, as it stands in a release.

    Raises:
        ConfigurationError: it is not hashed, or ``python`` is no version such as 3.12.
        RefusedError: it does not pin the engine, pins it twice, or a version that is not known here.
    """
    if not PYTHON.fullmatch(python):
        raise ConfigurationError("engine.python", f"--python {python} is no version of Python.",
                                 hint=f"such as {DEFAULT_PYTHON}: the hosts' own (Debian 12 has 3.11, Debian 13 3.13)")
    requirements = parse_lock(text, where)
    pinned = [one for one in requirements if one.name in engine.packages]
    names = " or ".join(engine.packages)
    if not pinned:
        raise RefusedError("engine.not_in_lock", f"{where} does not pin {names}, which the engine {engine.name} is.",
                           hint=f"echo {engine.packages[0]} | uv pip compile --generate-hashes -")
    if len(pinned) > 1:
        raise RefusedError("engine.twice_in_lock", f"{where} pins " + " and ".join(one.name for one in pinned) + ".",
                           hint=f"lock {names} alone: both bring the module {engine.module}")
    version = pinned[0].version
    engine.check_version(version, python)
    return Lock(engine.name, version, python, render_lock(requirements))
