"""The vendor repository on disk, built once and named by the hash of what decides it.

``/var/cache/opsctl-lab/vendor/<hash>/apt`` is what machines see, ``<hash>/key.asc`` what they trust. The key itself
lies beside, in ``keys``, so that a machine of yesterday's lab accepts today's repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib

import opsctl.bundle.keys
import opsctl.bundle.repository
from opsctl.bundle.keys import checking, export_public_key, make_bundle_key, signing
from opsctl.bundle.repository import COMPONENT, write_repository
from opsctl.engines.events import Emit, Note, PhaseStarted
from opsctl.lab.base import SUITES
from opsctl.lab.gpu import library
from opsctl.lab.state import CACHE_ROOT, locked
from opsctl.lab.vendor.catalogue import ARCHITECTURE, drivers, packages
from opsctl.lab.vendor.debs import check_glibc, make_debs

HERE = Path(__file__).resolve().parent
SIMULATOR = HERE.parent / "gpu"  # the library, the silicon, nvidia-modprobe
PACKAGES = HERE / "packages.toml"
COMPILED = {"__pycache__"}


@dataclass(frozen=True)
class Repository:
    """``path`` is what a source's URI names (``file:`` or a web server's root); ``key`` an armored public key."""

    path: Path
    key: Path


@dataclass(frozen=True)
class Makers:
    """What compiles the simulator's two programs and returns the file made."""

    library: Callable[[str, Path], Path]  # driver version, target
    modprobe: Callable[[Path], Path]  # target; the same for every driver version


def ensure_repository(emit: Emit, *, root: Path = CACHE_ROOT / "vendor", makers: Makers | None = None) -> Repository:
    """The repository, built now (seconds) if it is not there. Two that build at once build once.

    ``root`` and ``makers`` stand in for the cache and for the simulator's own.

    Raises:
        OpsctlError: ``lab.vendor_failed``, ``lab.vendor_glibc``, ``lab.command_failed``: dpkg-deb or the compiler
            said no.
        RefusedError: ``bundle.no_program``, ``lab.missing``: dpkg-deb, apt-ftparchive, gpg or gcc is not here; the hint
            names the package.
    """
    wanted = root / recipe()
    repository = Repository(wanted / "apt", wanted / "key.asc")
    if wanted.is_dir():
        return repository
    with locked(root, lambda: emit(Note("another opsctl lab builds the vendor repository; waiting for it"))):
        if wanted.is_dir():
            return repository
        for leftover in root.glob(".building-*"):
            shutil.rmtree(leftover)
        emit(PhaseStarted("Vendor repository: driver packages, built once (seconds)"))
        with tempfile.TemporaryDirectory(dir=root, prefix=".building-") as scratch:
            _build(Path(scratch), root / "keys", makers or _simulator(), emit)
            (Path(scratch) / "done").rename(wanted)
    return repository


def recipe() -> str:
    """Hash of everything that decides what is in the repository: this folder, the simulator, the way to an index."""
    sources = [*_sources(HERE), *_sources(SIMULATOR), Path(opsctl.bundle.repository.__file__),
               Path(opsctl.bundle.keys.__file__)]
    parts = {"machine": os.uname().machine,
             "files": [[str(path.relative_to(HERE.parents[1])), hashlib.sha256(path.read_bytes()).hexdigest()]
                       for path in sources]}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def sources_file(uri: str, signed_by: str, suites: Sequence[str] = tuple(SUITES)) -> str:
    """The text of the ``.sources`` file (deb822) of a machine that uses the repository, or of a fleet's folder.

    Args:
        uri: ``file:/srv/vendor`` or ``http://ops-1/vendor``, the folder with ``dists`` in it.
        signed_by: where the machine has the public key; an armored one's name must end in ``.asc``.
        suites: a machine's own; a fleet's bundle takes those that its hosts run.
    """
    return (f"Types: deb\nURIs: {uri}\nSuites: {' '.join(suites)}\nComponents: {COMPONENT}\n"
            f"Architectures: {ARCHITECTURE}\nSigned-By: {signed_by}\n")


def _build(scratch: Path, keys: Path, makers: Makers, emit: Emit) -> None:
    """Makes all of it in ``scratch``; what is to stay lies in ``scratch/done``."""
    document = tomllib.loads(PACKAGES.read_text(encoding="utf-8"))
    programs = scratch / "programs"
    programs.mkdir()
    modprobe = makers.modprobe(programs / "nvidia-modprobe")
    check_glibc(modprobe)
    built: dict[str, dict[str, Path]] = {}
    for version in drivers(document):
        (programs / version).mkdir()
        built[version] = {"library": makers.library(version, programs / version / f"libnvidia-ml.so.{version}"),
                          "modprobe": modprobe}
        check_glibc(built[version]["library"])
    closures = {suite: make_debs(packages(document), suite, built, scratch / "trees", scratch / f"debs-{suite}", emit)
                for suite in SUITES}
    done = scratch / "done"
    done.mkdir(mode=0o755)
    make_bundle_key(keys / "vendor", keys / "vendor.asc")
    (done / "key.asc").write_bytes(export_public_key(keys / "vendor"))
    with signing(keys / "vendor") as signer, checking(done / "key.asc") as checker:
        for suite, closure in closures.items():
            write_repository(done / "apt", suite, closure, signer, previous=scratch / "none", checker=checker)
    for directory, _, files in os.walk(done):
        for path in (Path(directory), *(Path(directory) / name for name in files)):
            path.chmod(0o755 if path.is_dir() else 0o644)  # apt's own user reads it, whatever the umask


def _simulator() -> Makers:
    return Makers(library.build, library.build_modprobe)


def _sources(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not COMPILED & set(path.parts))
