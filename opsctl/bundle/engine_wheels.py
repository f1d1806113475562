"""Downloads the wheels that the engines' hashed locks name, through this machine's own pip configuration.

The locks are those that ship with opsctl and those of the releases in the bundle, each for every Python of the hosts
that it is for. What pip fetched for a lock is kept
under the lock's own digest, so a build with the same locks asks nobody.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.markers import InvalidMarker, Marker, UndefinedEnvironmentName

from opsctl.agent import manifest as manifests
from opsctl.agent.environment import python_fits
from opsctl.bundle.cache import cache_directory, link_or_copy
from opsctl.bundle.process import last_lines, run, started
from opsctl.bundle.sums import digest
from opsctl.engines.events import Emit, Note, Progress
from opsctl.errors import ConfigurationError, OpsctlError, RefusedError
from opsctl.fleet.systems import default_system
from opsctl.serving.locks import Requirement, parse_lock, render_lock
from opsctl.stack.knowledge import System

REQUIREMENTS = "requirements.txt"
OLDEST_GLIBC = (2, 17)  # manylinux2014; older wheels of this architecture carry this tag as well
DOWNLOADING = re.compile(r"^\s*(?:Downloading|Using cached) (?:\S*/)?(?P<file>[^\s/]+\.whl)\S*(?P<size> \([^)]*\))?")


@dataclass(frozen=True)
class Target:
    """Hosts that wheels are for: their Python, ``3.11``, and the glibc of the oldest of them, ``(2, 36)``."""

    python: str
    glibc: tuple[int, int]


def targets_of(systems: Iterable[System]) -> tuple[Target, ...]:
    """One for each Python that the releases have, oldest first."""
    found: dict[str, tuple[int, int]] = {}
    for system in systems:
        glibc = _pair(system.glibc)
        found[system.python] = min(found.get(system.python, glibc), glibc)
    return tuple(Target(python, found[python]) for python in sorted(found, key=_pair))


def _pair(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


DEFAULT_TARGET = targets_of([default_system()])[0]


@dataclass(frozen=True)
class WantedLock:
    """A lock whose wheels are fetched for hosts of one kind; ``name`` is for people."""

    name: str
    target: Target
    requirements: tuple[Requirement, ...]

    @property
    def digests(self) -> frozenset[str]:
        """Every digest that may satisfy one of the requirements."""
        return frozenset(one for requirement in self.requirements for one in requirement.digests)

    @property
    def text(self) -> str:
        """What pip reads: without markers, which pip would judge by the Python that it runs on itself."""
        return render_lock([replace(one, marker="") for one in self.requirements])


def wanted_lock(name: str, text: str, target: Target = DEFAULT_TARGET) -> WantedLock:
    """A lock's requirements that count on the hosts.

    Raises:
        ConfigurationError: a requirement has no exact version with a hash, or a marker that cannot be read.
    """
    environment = hosts_environment(target.python)
    counting = []
    for requirement in parse_lock(text, name):
        try:
            counts = not requirement.marker or Marker(requirement.marker).evaluate(environment)
        except (InvalidMarker, UndefinedEnvironmentName) as error:
            raise ConfigurationError("engine.lock_marker", f"{name}: {requirement.name} has a marker that cannot be "
                                     f"read: {requirement.marker}.",
                                     hint="write the lock with uv pip compile --generate-hashes") from error
        if counts:
            counting.append(requirement)
    return WantedLock(name, target, tuple(counting))


def hosts_environment(python: str) -> dict[str, str]:
    """What markers see on a host."""
    return {"python_version": python, "python_full_version": f"{python}.0", "implementation_version": f"{python}.0",
            "implementation_name": "cpython", "platform_python_implementation": "CPython", "os_name": "posix",
            "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}


def shipped_locks(folder: Path, targets: Sequence[Target] = (DEFAULT_TARGET,)) -> list[WantedLock]:
    """The locks that ship with opsctl, for each kind of hosts."""
    return [wanted_lock(path.name, path.read_text(encoding="utf-8"), target)
            for path in sorted(folder.glob("*.lock")) for target in targets]


def release_locks(bundle: Path, targets: Sequence[Target] = (DEFAULT_TARGET,)) -> list[WantedLock]:
    """The locks of the bundle's releases, each once for each kind of hosts. One without manifest is ``verify``'s.

    A release for one Python gets the wheels of that one, whoever has it: where no host does, staging refuses it.

    Raises:
        RefusedError: a manifest cannot be read.
    """
    found: dict[tuple[str, str], WantedLock] = {}
    for path in sorted(bundle.glob(f"releases/*/*/{manifests.MANIFEST}")):
        if path.parent.name.startswith("."):  # an import on its way
            continue
        engine = manifests.parse(path.read_bytes()).engine
        mine = [target for target in targets if python_fits(engine.python, _pair(target.python))]
        if not mine:
            mine = [Target(engine.python.removeprefix(">="), min(target.glibc for target in targets))]
        for target in mine:
            found[engine.directory, target.python] = wanted_lock(engine.directory, engine.lock, target)
    return list(found.values())


def fetch_engine_wheels(locks: Iterable[WantedLock], out: Path, emit: Emit) -> tuple[str, ...]:
    """Puts the wheels of every lock into the folder ``out``; returns their file names, sorted.

    Raises:
        RefusedError: there is no pip here, or a wheel's content is not what the lock says.
        OpsctlError: pip could not download them; the same command again goes on.
    """
    names: set[str] = set()
    for lock in {(lock.text, lock.target): lock for lock in locks}.values():
        if not lock.requirements:
            continue
        for wheel in _cached(lock, emit):
            if not (out / wheel.name).exists():
                link_or_copy(wheel, out / wheel.name)
            names.add(wheel.name)
    return tuple(sorted(names))


def pip_download_arguments(lock: Path, out: Path, target: Target = DEFAULT_TARGET) -> list[str]:
    """pip's arguments for the hosts' Python, whatever Python runs this."""
    major, newest = target.glibc
    platforms = [f"manylinux_{major}_{minor}_x86_64" for minor in range(newest, OLDEST_GLIBC[1] - 1, -1)]
    arguments = ["download", "--require-hashes", "--only-binary=:all:", "--no-deps", "--no-input",
                 "--disable-pip-version-check", "--progress-bar", "off", "--implementation", "cp",
                 "--python-version", target.python]
    for abi in (f"cp{target.python.replace('.', '')}", "abi3", "none"):
        arguments += ["--abi", abi]
    for platform in [*platforms, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]:
        arguments += ["--platform", platform]
    return [*arguments, "--dest", str(out), "--requirement", str(lock)]


def _cached(lock: WantedLock, emit: Emit) -> list[Path]:
    target = f"{lock.target.python} {lock.target.glibc} x86_64"
    key = hashlib.sha256((lock.text + target).encode()).hexdigest()[:16]
    directory = cache_directory("wheels") / key
    if directory.is_dir():
        wheels = _wheels(directory)
        if len(wheels) == len(lock.requirements) and all(digest(wheel) in lock.digests for wheel in wheels):
            return wheels
    partial = directory.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    (partial / REQUIREMENTS).write_text(lock.text, encoding="utf-8")
    for wheel in _wheels(partial):  # pip keeps what it finds here when its hash is right
        if digest(wheel) not in lock.digests:
            wheel.unlink()
    _download(lock, partial, emit)
    if directory.is_dir():
        shutil.rmtree(directory)
    partial.rename(directory)
    return _wheels(directory)


def _download(lock: WantedLock, out: Path, emit: Emit) -> None:
    if run([sys.executable, "-m", "pip", "--version"]).returncode != 0:
        raise RefusedError("bundle.no_program", f"{sys.executable} has no pip, and it downloads the engines' wheels.",
                           hint=f"{sys.executable} -m ensurepip")
    said = bytearray()
    collected = 0
    argv = [sys.executable, "-m", "pip", *pip_download_arguments(out / REQUIREMENTS, out, lock.target)]
    with started(argv, environment={"PYTHONUNBUFFERED": "1"}) as process:
        for line in _lines(process):
            said += line.encode() + b"\n"
            downloading = DOWNLOADING.match(line)
            if downloading:
                emit(Note(f"downloading {downloading['file']}{downloading['size'] or ''}"))
            if line.startswith("Collecting "):
                collected += 1
                emit(Progress(f"wheels of {lock.name}", min(collected, len(lock.requirements)) - 1,
                              len(lock.requirements), "items"))
        status = process.wait()
    errors = tuple(line for line in last_lines(bytes(said), 40) if "ERROR" in line or "Expected" in line
                   or "Got " in line or "WARNING" in line)[-8:]
    if b"DO NOT MATCH THE HASHES" in said:
        raise RefusedError("bundle.wheel_tampered", f"a wheel is not what {lock.name} says it must be.",
                           hint="this machine's package index serves something else than what was locked; ask who runs "
                                "it", log_tail=errors)
    if status != 0 or len(_wheels(out)) != len(lock.requirements):
        raise OpsctlError("bundle.wheels_unavailable", f"pip could not download the wheels of {lock.name} for Python "
                          f"{lock.target.python}.",
                          hint="pip download shows whether this machine reaches its package index; the same command "
                               "again goes on", log_tail=errors or last_lines(bytes(said)))
    emit(Progress(f"wheels of {lock.name}", len(lock.requirements), len(lock.requirements), "items"))


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    if process.stdout is not None:
        for line in process.stdout:
            yield line.decode("utf-8", "replace").rstrip()


def _wheels(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.whl"))
