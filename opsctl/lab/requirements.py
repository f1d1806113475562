"""What a lab needs of this computer, and the exact words when it is not there. ``missing`` is pure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from opsctl.errors import RefusedError
from opsctl.lab.commands import SYSTEM_PATH, CommandError, run

# program -> the Debian package that brings it
PROGRAMS = {
    "systemd-nspawn": "systemd-container",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "mkfs.ext4": "e2fsprogs",
    "mount": "mount",
    "umount": "mount",
    "cp": "coreutils",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")  # debootstrap checks signatures with it
FILE_SYSTEMS = ("overlay", "ext4", "cgroup2")
CAPABILITIES = {"CAP_SYS_ADMIN": 21, "CAP_NET_ADMIN": 12, "CAP_SYS_CHROOT": 18, "CAP_MKNOD": 27}  # linux/capability.h
LEAST_FREE_BYTES = 4_000_000_000  # a base (0.3 GB) and three provisioned machines (0.8 GB each, measured)


@dataclass(frozen=True)
class Computer:
    """What there is. ``capabilities`` is CapEff of /proc/self/status, a bit set."""

    is_root: bool
    capabilities: int
    programs: frozenset[str]
    file_systems: frozenset[str]
    keyring: bool
    loop_devices: bool
    free_bytes: int


@dataclass(frozen=True)
class Missing:
    what: str
    package: str = ""  # the Debian package that brings it
    cure: str = ""  # what else does


COMPILER = Missing("gcc, which compiles the GPU simulator", package="gcc libc6-dev")


def missing(computer: Computer) -> tuple[Missing, ...]:
    """Everything a lab lacks here, what is easiest to mend first; empty when it can run."""
    lacks: list[Missing] = []
    if not computer.is_root:
        lacks.append(Missing("root", cure="sudo opsctl lab up"))
    for program, package in PROGRAMS.items():
        if program not in computer.programs:
            lacks.append(Missing(program, package=package))
    if not computer.keyring:
        lacks.append(Missing("Debian's archive keyring", package="debian-archive-keyring"))
    if computer.is_root:  # without root these can neither be seen nor mended
        absent = [name for name, bit in CAPABILITIES.items() if not computer.capabilities >> bit & 1]
        if absent:
            lacks.append(Missing(", ".join(absent), cure="use a real or virtual machine, or a privileged container"))
        for name in FILE_SYSTEMS:
            if name not in computer.file_systems:
                lacks.append(Missing(f"the kernel's {name} file system", cure=f"modprobe {name}"))
        if not computer.loop_devices:
            lacks.append(Missing("loop devices (/dev/loop-control)", cure="modprobe loop"))
        if computer.free_bytes < LEAST_FREE_BYTES:
            lacks.append(Missing(f"disk space: {computer.free_bytes / 1e9:.1f} GB free in /var, "
                                 f"{LEAST_FREE_BYTES / 1e9:.0f} GB wanted", cure="make room in /var"))
    return tuple(lacks)


def words(lacks: Iterable[Missing]) -> tuple[str, str]:
    """One sentence of what is missing, and the line (or lines) to type."""
    lacks = tuple(lacks)
    packages = sorted({lack.package for lack in lacks if lack.package})
    cures = [f"apt-get install {' '.join(packages)}"] if packages else []
    cures += [lack.cure for lack in lacks if lack.cure]
    return f"a lab needs what is missing here: {'; '.join(lack.what for lack in lacks)}.", "; then ".join(cures)


def require() -> None:
    """Raises:
        RefusedError: ``lab.missing``, naming everything that is not there and how to get it.
    """
    lacks = missing(look())
    if lacks:
        sentence, hint = words(lacks)
        raise RefusedError("lab.missing", sentence, hint=hint)


def require_compiler() -> None:
    """Raises:
        RefusedError: ``lab.missing``: there is no C compiler, which only simulated GPUs need.
    """
    search = os.environ.get("PATH", "") + ":" + SYSTEM_PATH
    if not shutil.which("gcc", path=search):
        sentence, hint = words([COMPILER])
        raise RefusedError("lab.missing", sentence, hint=hint)


def look() -> Computer:
    """Looks at this computer; as root, loads a kernel module that is only not loaded yet."""
    is_root = os.geteuid() == 0
    if is_root:
        for module, there in (("overlay", "overlay" in _file_systems()), ("loop", Path("/dev/loop-control").exists())):
            if not there:
                _load(module)
    search = os.environ.get("PATH", "") + ":" + SYSTEM_PATH
    return Computer(
        is_root=is_root,
        capabilities=_capabilities(),
        programs=frozenset(name for name in PROGRAMS if shutil.which(name, path=search)),
        file_systems=_file_systems(),
        keyring=KEYRING.is_file(),
        loop_devices=Path("/dev/loop-control").exists(),
        free_bytes=shutil.disk_usage("/var").free,
    )


def _file_systems() -> frozenset[str]:
    return frozenset(line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines())


def _capabilities() -> int:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return int(status["CapEff"], 16)


def _load(module: str) -> None:
    try:
        run(["modprobe", module])
    except CommandError:
        return  # what is still not there is told by missing()
