"""What a comparison of a host is made of: what is wanted, what was seen, what differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from opsctl.checking.model import Captured, Wanted, provision
from opsctl.drifting.booting import Kernel, Next
from opsctl.drifting.history import Culprit, History
from opsctl.stack.driver import Desired
from opsctl.stack.lock import Entry

NOT_THERE = "not installed"


@dataclass(frozen=True)
class Difference:
    """``wanted`` and ``found`` are for people; ``culprit``: None where nothing tells who it was."""

    layer: str
    what: str
    wanted: str
    found: str
    culprit: Culprit | None
    fix: str


@dataclass(frozen=True)
class Expected:
    """What is wanted of a host, beside what stands on it.

    ``source``: who names the driver, for sentences; ``entry``: the host's in stack.lock; ``patterns``: names that may
    be a driver's; ``blacklist``: the text of ``BLACKLIST``; ``packages``, ``holds``: those of its roles; ``bundle``:
    versions by package, None where hosts do not take their packages from there.
    """

    wanted: Wanted
    source: str = "the inventory"
    entry: Entry | None = None
    patterns: tuple[str, ...] = ()
    blacklist: str = ""
    packages: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    bundle: Mapping[str, set[str]] | None = None


@dataclass(frozen=True)
class Package:
    """A package as dpkg knows it. ``want``: ``install``, ``hold``; ``state``: ``installed``, ``half-configured``."""

    version: str
    want: str
    state: str


@dataclass(frozen=True)
class Seen:
    """A host's capture, read."""

    captured: Captured
    expected: Expected
    packages: Mapping[str, Package]
    history: History
    record: Desired | None
    changed: Mapping[str, str] = field(default_factory=dict)

    @property
    def mend(self) -> str:
        return provision(self.expected.wanted)

    def found(self, name: str) -> str:
        """A package in words."""
        there = self.packages.get(name)
        if there is None:
            return NOT_THERE
        return there.version if there.state == "installed" else f"{there.version}, {there.state}"

    def is_held(self, name: str) -> bool:
        return self.packages[name].want == "hold"


@dataclass(frozen=True)
class Drift:
    """All that is to be said of a host. ``skipped``: why nothing is; ``unknown``: what did not answer in time."""

    differences: tuple[Difference, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    boot: Next | None = None
    driver: str = ""
    skipped: str = ""
    unknown: tuple[str, ...] = ()

    def as_document(self) -> dict[str, Any]:
        return {"differences": [{**asdict(one), "culprit": asdict(one.culprit) | {"words": one.culprit.words}
                                 if one.culprit else None} for one in self.differences],
                "driver": self.driver, "skipped": self.skipped, "unknown": list(self.unknown),
                "next_boot": asdict(self.boot) if self.boot else None,
                "kernels": [asdict(one) for one in self.kernels]}
