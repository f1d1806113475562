"""What goes into a suite's pool: packages with all they depend on, for the hosts' release."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opsctl.bundle.debs import Deb
from opsctl.bundle.private_apt import ARCHITECTURE, PrivateApt
from opsctl.engines.events import Emit
from opsctl.stack.knowledge import System

__all__ = ["ARCHITECTURE", "Closure", "Deb", "download_closure", "union"]


@dataclass(frozen=True)
class Closure:
    debs: tuple[Deb, ...]
    archives: Path  # the folder that holds them all

    @property
    def size(self) -> int:
        return sum(deb.size for deb in self.debs)


def download_closure(packages: Sequence[str], system: System, emit: Emit) -> Closure:
    """The packages and all they depend on, on disk and with the digests that the signed index names.

    Raises:
        RefusedError: no apt here (``bundle.no_program``), no source serves the hosts' release
            (``bundle.no_sources``), the sources do not answer (``bundle.sources_unreachable``), a package is
            unknown (``bundle.unknown_package``) or cannot be installed (``bundle.unmet_dependencies``).
        OpsctlError: the download broke off (``bundle.download_broke_off``); the same command goes on.
    """
    apt = PrivateApt(system)
    apt.update(emit)
    debs = apt.resolve(packages)
    apt.download(packages, debs, emit)
    return Closure(debs, apt.archives)


def union(closures: Sequence[Closure]) -> Closure:
    """One closure of all their files; several versions of a package lie side by side."""
    debs = {deb.name: deb for closure in closures for deb in closure.debs}
    return Closure(tuple(debs[name] for name in sorted(debs)), closures[0].archives)
