"""The container toolkit and CUDA of a suite: exactly the versions that its hosts name.

Each set of versions gets a run of apt of its own, because two of them conflict; the union of the files goes into the
suite's pool. A set that pulls a driver in is refused here already: no host could take it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opsctl.bundle.closure import Closure
from opsctl.bundle.debs import Deb
from opsctl.bundle.private_apt import PrivateApt
from opsctl.bundle.suites import Suite, Variables, Wanted
from opsctl.bundle.vendor_sources import FOLDER, VendorSource, described, read_vendor_sources, serving
from opsctl.engines.events import Emit, Note
from opsctl.errors import RefusedError
from opsctl.fleet.vendor_packages import VARIABLES, is_way_back, versions_of, wanted_versions
from opsctl.role_tasks import defaults_of
from opsctl.stack.index import Index, parse_index
from opsctl.stack.knowledge import System
from opsctl.stack.pinned import Wish, lacking, sentence_of, version_for, wishes

# roles/base/files/pinned_transaction.py has the same for a host; they are compared by a test.
DRIVERS = re.compile(
    r"cuda(-\d+(-\d+)?)?$|cuda-(drivers|runtime|demo-suite|compat)|libcuda1$|libcudadebugger|libnvcuvid|libnvoptix|"
    r"nvidia-(?!container-)|libnvidia-(?!container)|libnvsdm|nvlsm$|xserver-xorg-video-nvidia|libxnvctrl|firmware-nvidia")


@dataclass(frozen=True)
class WantedSet:
    """Packages that go into one transaction, and whose they are. ``spare``: kept for the way back, by nobody now."""

    role: str
    hosts: tuple[str, ...]
    wishes: tuple[Wish, ...]
    spare: bool


def sets_wanted(suite: Suite, wanted: Wanted) -> tuple[WantedSet, ...]:
    """What the hosts of a suite name; empty for those that name none of it."""
    found = []
    for role in VARIABLES:
        def named(variables: Variables, role: str = role) -> object:
            return versions_of(role, variables)

        hosts = wanted.hosts_of(suite, named)
        found += [WantedSet(role, whose, wishes(versions, defaults_of(role)[f"{role}_names"]),
                            is_way_back(versions, hosts, role, whose))
                  for versions, whose in wanted_versions(role, hosts)]
    return tuple(found)


def download_sets(wanted: Sequence[WantedSet], system: System, fleet_directory: Path, emit: Emit
                  ) -> tuple[Closure, ...]:
    """The packages with all they depend on, on disk and with the digests that the signed indexes name.

    Raises:
        ConfigurationError: a source in ``sources.d`` is unsigned or malformed.
        RefusedError: there is none (``bundle.no_vendor_source``), it does not have a version
            (``bundle.no_such_version``), or a driver would come along (``bundle.pulls_driver``); and what
            ``download_closure`` raises.
    """
    vendors = serving(read_vendor_sources(fleet_directory), system)
    if not vendors:
        first = wanted[0].wishes[0]
        raise RefusedError("bundle.no_vendor_source", f"{wanted[0].hosts[0]} names {first.variable}={first.version}, "
                           f"and {fleet_directory / FOLDER} holds no source to get it from for {system.name}.",
                           hint=f"write {FOLDER}/nvidia.sources there: Types: deb, URIs, Suites and Signed-By of the "
                                "vendor's repository")
    apt = PrivateApt(system, vendors)
    apt.update(emit)
    known = re.compile("|".join(f"(?:{wish.known_by})|{'|'.join(map(re.escape, wish.names))}"
                                for one in wanted for wish in one.wishes))
    index = parse_index(apt.index(lambda name: known.fullmatch(name) is not None))
    closures = []
    for one in wanted:
        packages = _arguments(one, index, vendors, emit)
        debs = apt.resolve(packages)
        _refuse_drivers(one, debs)
        apt.download(packages, debs, emit)
        closures.append(Closure(debs, apt.archives))
    return tuple(closures)


def _arguments(one: WantedSet, index: Index, vendors: Sequence[VendorSource], emit: Emit) -> tuple[str, ...]:
    """What apt is asked for: ``name=version``. Beside a version for the way back, what the source lacks is told."""
    found: list[str] = []
    for number, wish in enumerate(one.wishes):
        missing = lacking(index, wish)
        said = sentence_of(index, wish, missing[0], f"{FOLDER} ({described(vendors)})") if missing else ""
        if missing and one.spare and number:
            emit(Note(f"for the way back to {one.wishes[0].variable}={one.wishes[0].version}: {said}", "warning"))
        elif missing:
            raise RefusedError("bundle.no_such_version", f"{', '.join(one.hosts)}: {said}",
                               hint="one of those versions, or another source")
        else:
            found += [f"{name}={version_for(index, name, wish)}" for name in wish.names]
    return tuple(found)


def _refuse_drivers(one: WantedSet, debs: Sequence[Deb]) -> None:
    drivers = sorted({name for deb in debs if DRIVERS.match(name := deb.name.partition("_")[0])})
    if drivers:
        wish = one.wishes[0]
        raise RefusedError("bundle.pulls_driver", f"{wish.variable}={wish.version} of {', '.join(one.hosts)} would "
                           f"bring {', '.join(drivers)}: a driver comes with nvidia_driver_version only.",
                           hint="a version of which the packages do not depend on a driver")
