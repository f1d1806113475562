"""Downloads the wheels that the engines' hashed locks name, through this machine's own pip configuration.

A lock is a pip requirements file in which every line is ``name==version`` with hashes. What pip fetched for a lock is
kept under the lock's own digest, so a build with the same locks asks nobody.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from opsctl.bundle.cache import cache_directory, link_or_copy
from opsctl.bundle.process import last_lines, run, started
from opsctl.bundle.sums import digest
from opsctl.engines.events import Emit, Note, Progress
from opsctl.errors import ConfigurationError, OpsctlError, RefusedError

PYTHON_VERSION = "3.11"  # Debian 12's
GLIBC = (2, 36)  # Debian 12's
OLDEST_GLIBC = (2, 17)  # manylinux2014; older wheels of this architecture carry this tag as well
REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^]]*\])?==(?P<version>[^\s;]+)")
HASH = re.compile(r"--hash=sha256:(?P<digest>[0-9a-f]{64})")
DOWNLOADING = re.compile(r"^\s*(?:Downloading|Using cached) (?:\S*/)?(?P<file>[^\s/]+\.whl)\S*(?P<size> \([^)]*\))?")


@dataclass(frozen=True)
class Lock:
    """A hashed lock: how many requirements it has and every digest that may satisfy one of them."""

    path: Path
    requirements: tuple[str, ...]
    digests: frozenset[str]


def read_lock(path: Path) -> Lock:
    """Reads a lock.

    Raises:
        ConfigurationError: a requirement has no exact version or no sha256 hash.
    """
    requirements, digests = [], set[str]()
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in (line.strip() for line in text.splitlines()):
        if not line or line.startswith(("#", "--")):
            continue
        match, hashes = REQUIREMENT.match(line), HASH.findall(line)
        if match is None or not hashes:
            raise ConfigurationError("bundle.lock_without_hash",
                                     f"{path}: {line.split(' ')[0]} has no exact version with a sha256 hash.",
                                     hint="write the lock with uv pip compile --generate-hashes")
        requirements.append(f"{match['name']}=={match['version']}")
        digests.update(hashes)
    return Lock(path, tuple(requirements), frozenset(digests))


def fetch_engine_wheels(locks: Iterable[Path], out: Path, emit: Emit) -> tuple[str, ...]:
    """Puts the wheels of every lock into the folder ``out``; returns their file names, sorted.

    Raises:
        ConfigurationError: a lock is not hashed.
        RefusedError: there is no pip here, or a wheel's content is not what the lock says.
        OpsctlError: pip could not download them; the same command again goes on.
    """
    names: set[str] = set()
    for lock in map(read_lock, sorted(locks)):
        if not lock.requirements:
            continue
        for wheel in _cached(lock, emit):
            if not (out / wheel.name).exists():
                link_or_copy(wheel, out / wheel.name)
            names.add(wheel.name)
    return tuple(sorted(names))


def pip_download_arguments(lock: Path, out: Path) -> list[str]:
    """pip's arguments for the hosts' Python, whatever Python runs this."""
    platforms = [f"manylinux_{GLIBC[0]}_{minor}_x86_64" for minor in range(GLIBC[1], OLDEST_GLIBC[1] - 1, -1)]
    arguments = ["download", "--require-hashes", "--only-binary=:all:", "--no-deps", "--no-input",
                 "--disable-pip-version-check", "--progress-bar", "off", "--implementation", "cp",
                 "--python-version", PYTHON_VERSION]
    for abi in (f"cp{PYTHON_VERSION.replace('.', '')}", "abi3", "none"):
        arguments += ["--abi", abi]
    for platform in [*platforms, "manylinux2014_x86_64", "linux_x86_64"]:
        arguments += ["--platform", platform]
    return [*arguments, "--dest", str(out), "--requirement", str(lock)]


def _cached(lock: Lock, emit: Emit) -> list[Path]:
    target = f"{PYTHON_VERSION} {GLIBC} x86_64".encode()
    key = hashlib.sha256(lock.path.read_bytes() + target).hexdigest()[:16]
    directory = cache_directory("wheels") / f"{lock.path.stem}-{key}"
    if directory.is_dir():
        wheels = _wheels(directory)
        if len(wheels) == len(lock.requirements) and all(digest(wheel) in lock.digests for wheel in wheels):
            return wheels
    partial = directory.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    for wheel in _wheels(partial):  # pip keeps what it finds here when its hash is right
        if digest(wheel) not in lock.digests:
            wheel.unlink()
    _download(lock, partial, emit)
    if directory.is_dir():
        for wheel in _wheels(directory):
            wheel.unlink()
        directory.rmdir()
    partial.rename(directory)
    return _wheels(directory)


def _download(lock: Lock, out: Path, emit: Emit) -> None:
    if run([sys.executable, "-m", "pip", "--version"]).returncode != 0:
        raise RefusedError("bundle.no_program", f"{sys.executable} has no pip, and it downloads the engines' wheels.",
                           hint=f"{sys.executable} -m ensurepip")
    said = bytearray()
    collected = 0
    argv = [sys.executable, "-m", "pip", *pip_download_arguments(lock.path, out)]
    with started(argv, environment={"PYTHONUNBUFFERED": "1"}) as process:
        for line in _lines(process):
            said += line.encode() + b"\n"
            downloading = DOWNLOADING.match(line)
            if downloading:
                emit(Note(f"downloading {downloading['file']}{downloading['size'] or ''}"))
            if line.startswith("Collecting "):
                collected += 1
                emit(Progress(f"wheels of {lock.path.name}", min(collected, len(lock.requirements)) - 1,
                              len(lock.requirements), "items"))
        status = process.wait()
    errors = tuple(line for line in last_lines(bytes(said), 40) if "ERROR" in line or "Expected" in line
                   or "Got " in line or "WARNING" in line)[-8:]
    if b"DO NOT MATCH THE HASHES" in said:
        raise RefusedError("bundle.wheel_tampered", f"a wheel is not what {lock.path.name} says it must be.",
                           hint="this machine's package index serves something else than what was locked; ask who runs "
                                "it", log_tail=errors)
    if status != 0 or len(_wheels(out)) != len(lock.requirements):
        raise OpsctlError("bundle.wheels_unavailable", f"pip could not download the wheels of {lock.path.name}.",
                          hint="pip download shows whether this machine reaches its package index; the same command "
                               "again goes on", log_tail=errors or last_lines(bytes(said)))
    emit(Progress(f"wheels of {lock.path.name}", len(lock.requirements), len(lock.requirements), "items"))


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    if process.stdout is not None:
        for line in process.stdout:
            yield line.decode("utf-8", "replace").rstrip()


def _wheels(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.whl"))
