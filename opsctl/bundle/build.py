"""``opsctl bundle build``: packages, wheels, index and signature, made beside the bundle and then switched in.

The order: gather what the roles and the engines want, make everything in ``.new``, verify that as a host's operator
would, and only then rename. Until the renames the old bundle is untouched; a build that dies between two renames
leaves ``.switching``, which verify reports and the next build finishes.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opsctl.agent.durable import sync_directory, write_atomically
from opsctl.bundle import sums
from opsctl.bundle.agent_wheel import agent_lock, build_agent_wheel, requirements
from opsctl.bundle.cache import one_build_at_a_time
from opsctl.bundle.closure import Closure, download_closure, union
from opsctl.bundle.drivers import download_drivers, driver_names, drivers_wanted
from opsctl.bundle.engine_wheels import WantedLock, fetch_engine_wheels, release_locks, shipped_locks, targets_of
from opsctl.bundle.keys import checking, signing
from opsctl.bundle.packages import role_packages
from opsctl.bundle.process import require_program
from opsctl.bundle.repository import write_repository
from opsctl.bundle.suites import Suite, Wanted, wanted_by_inventory
from opsctl.bundle.vendor_packages import download_sets, sets_wanted
from opsctl.bundle.verify import AGENT_REQUIREMENT, FOLDERS, SIGNATURE, SUMS, SWITCHING, verify_bundle
from opsctl.engines.events import Emit, PhaseStarted, discard
from opsctl.errors import RefusedError
from opsctl.resources import PACKAGE, resource
from opsctl.stack.knowledge import System

NEW, OLD = ".new", ".old"
NAMES = (*FOLDERS, SUMS, SIGNATURE)


@dataclass(frozen=True)
class Built:
    """What a build made or found; ``packages`` of all ``suites`` together."""

    bundle: Path
    changed: bool
    suites: tuple[str, ...]
    packages: int
    package_bytes: int
    wheels: tuple[str, ...]
    signed_by: str
    seconds: float


def build_bundle(fleet_directory: Path, bundle: Path, emit: Emit = discard, *, inventory: Path | None = None,
                 packages: Sequence[str] | None = None, locks: Sequence[WantedLock] | None = None) -> Built:
    """Makes or renews the bundle; a bundle that holds the same already is left as it is, byte for byte.

    ``inventory``: names releases, drivers and the like; None: a Debian 12 without any. ``packages`` and ``locks`` stand
    in for what the roles install and the locks of engines and releases.

    Raises:
        ConfigurationError: a role's package list or an engine's lock is malformed, or a host's variable is wrong.
        RefusedError: a host takes packages from the bundle and runs no Debian (``bundle.no_suite``); or something that
            a build needs is not here. The bundle is as it was.
        OpsctlError: a download broke off or a tool failed; the bundle is as it was.
    """
    began = time.monotonic()
    home, trusted_key = fleet_directory / "keys" / "bundle", fleet_directory / "trust" / "bundle.asc"
    roots = tuple(packages) if packages is not None else role_packages(resource("roles"))
    wanted = wanted_by_inventory(inventory)
    wanted_locks = locks if locks is not None else locks_for(bundle, wanted.systems)
    with one_build_at_a_time(emit):
        _able_to_sign(home, trusted_key)
        finish_switch(bundle)
        try:
            closures = {suite.system.codename: _closure(suite, wanted, roots, fleet_directory, emit)
                        for suite in wanted.suites}
            emit(PhaseStarted("Wheels"))
            wheels = _wheels(bundle / NEW / "wheels", wanted_locks, emit)
            emit(PhaseStarted("Index, sign, verify"))
            changed = _sign(bundle, closures, home, trusted_key, emit)
            if changed:
                verify_bundle(bundle / NEW, trusted_key, emit)
                switch(bundle)
        finally:
            if not (bundle / SWITCHING).exists() and (bundle / NEW).exists():
                shutil.rmtree(bundle / NEW)
        verified = verify_bundle(bundle, trusted_key, emit)
    return Built(bundle, changed, tuple(closures), sum(len(closure.debs) for closure in closures.values()),
                 sum(closure.size for closure in closures.values()), wheels, verified.signed_by,
                 time.monotonic() - began)


def locks_for(bundle: Path, systems: Sequence[System]) -> list[WantedLock]:
    """The agent's, the engines' and the releases' locks, for each Python of the hosts."""
    targets = targets_of(systems)
    return [*(agent_lock(target=target) for target in targets), *shipped_locks(PACKAGE / "serving", targets),
            *release_locks(bundle, targets)]


def switch(bundle: Path) -> None:
    """Puts what lies in ``.new`` in place of the old files."""
    sync_directory(bundle / NEW)
    write_atomically(bundle / SWITCHING, b"")
    finish_switch(bundle)


def finish_switch(bundle: Path) -> None:
    """Does what is left of a switch that was begun, if one was; the marker goes last."""
    if (bundle / SWITCHING).exists():
        (bundle / OLD).mkdir(exist_ok=True)
        for name in NAMES:
            if (bundle / NEW / name).exists():
                if (bundle / name).exists():
                    (bundle / name).rename(bundle / OLD / name)
                (bundle / NEW / name).rename(bundle / name)
        sync_directory(bundle)
        (bundle / SWITCHING).unlink()
        sync_directory(bundle)
    for leftover in (NEW, OLD):
        if (bundle / leftover).exists():
            shutil.rmtree(bundle / leftover)


def _closure(suite: Suite, wanted: Wanted, roots: Sequence[str], fleet_directory: Path, emit: Emit) -> Closure:
    """All packages of a suite."""
    names = driver_names(resource("roles"))
    drivers, sets = drivers_wanted(suite, wanted, names["vendor"].own), sets_wanted(suite, wanted)
    release = f" for {suite.system.name}"
    emit(PhaseStarted("Debian packages" + release))
    closure = download_closure(roots, suite.system, emit)
    if drivers:
        emit(PhaseStarted("Drivers" + release))
        closure = union([closure, *download_drivers(drivers, suite.system, names, fleet_directory, emit)])
    if sets:
        emit(PhaseStarted("Container toolkit and CUDA" + release))
        closure = union([closure, *download_sets(sets, suite.system, fleet_directory, emit)])
    return closure


def _wheels(out: Path, locks: Sequence[WantedLock], emit: Emit) -> tuple[str, ...]:
    out.mkdir(parents=True)
    engines = fetch_engine_wheels(locks, out, emit)
    agent = build_agent_wheel(out)
    (out / AGENT_REQUIREMENT).write_text(requirements(agent), encoding="utf-8")
    return (agent.name, *engines)


def _sign(bundle: Path, closures: Mapping[str, Closure], home: Path, trusted_key: Path, emit: Emit) -> bool:
    """Indexes, sums up and signs what lies in ``.new``; False when the bundle in place is the same already."""
    new = bundle / NEW
    with signing(home) as signer, checking(trusted_key) as checker:
        for codename, closure in closures.items():
            write_repository(new / "apt", codename, closure, signer, previous=bundle / "apt", checker=checker)
        text = sums.render(sums.digests(new, [path for path, _ in sums.regular_files(new, FOLDERS)], emit))
        if _is_already(bundle, text, trusted_key):
            return False
        write_atomically(new / SUMS, text.encode())
        write_atomically(new / SIGNATURE, signer.detached(text.encode()))
    return True


def _able_to_sign(home: Path, trusted_key: Path) -> None:
    """Finds out before the downloads whether the result could be signed with a key that the fleet trusts."""
    for program, package in (("apt-get", "apt"), ("apt-ftparchive", "apt-utils")):
        require_program(program, package, "a bundle cannot be built without it")
    with signing(home) as signer, checking(trusted_key) as checker, tempfile.TemporaryDirectory() as temporary:
        probe = Path(temporary) / "probe"
        probe.write_bytes(signer.clear(b"probe\n"))
        try:
            checker.check(f"what {home} signs", probe)
        except RefusedError as error:
            if error.code != "bundle.foreign_key":
                raise
            raise RefusedError("bundle.key_mismatch", f"the key in {home} is not one of those in {trusted_key}.",
                               hint=f"bring the pair back from your backup, or: gpg --homedir {home} --armor --export "
                                    f">> {trusted_key}, then opsctl provision") from None


def _is_already(bundle: Path, text: str, trusted_key: Path) -> bool:
    """Whether the bundle in place is what was made again just now, signed and unharmed."""
    try:
        if (bundle / SUMS).read_text(encoding="utf-8") != text:
            return False
        verify_bundle(bundle, trusted_key)
    except (FileNotFoundError, UnicodeDecodeError, RefusedError):
        return False
    return True
