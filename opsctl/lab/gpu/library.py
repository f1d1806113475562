"""Compiles the lab's ``libnvidia-ml.so.1`` and ``nvidia-modprobe``: sources in ``nvml/`` and ``modprobe.c``.

A library is of one driver version, as NVIDIA's are: it refuses to work with another version's module.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from opsctl.errors import UsageError
from opsctl.lab.commands import run
from opsctl.lab.gpu import layout
from opsctl.lab.requirements import require_compiler

SOURCES = Path(__file__).with_name("nvml")
MODPROBE = Path(__file__).with_name("modprobe.c")
NAME = "libnvidia-ml.so.1"
VERSION = re.compile(r"(\d{3})\.\d{2,3}(\.\d{2})?")
# Driver branch -> CUDA version of its driver API, as NVML writes it. Source: docs.nvidia.com/datacenter/tesla/drivers.
CUDA_VERSIONS = {535: 12020, 550: 12040, 570: 12080, 575: 12090, 580: 13000, 590: 13010, 595: 13020, 610: 13030}
FLAGS = ("-std=gnu11", "-O2", "-g0", "-fPIC", "-Wall", "-Wextra", "-Werror")


def build(driver_version: str, out: Path, *, without: Iterable[str] = ()) -> Path:
    """Compiles the library of a driver version.

    Args:
        driver_version: ``580.126.09``.
        out: the file to write, usually ``libnvidia-ml.so.1`` in some folder.
        without: names of functions that it does not have, as older drivers lack newer ones.

    Raises:
        UsageError: no driver version, or one of a branch whose CUDA version is not known here.
        RefusedError: gcc is missing.
        CommandError: the compiler refused.
    """
    match = VERSION.fullmatch(driver_version)
    if not match or int(match[1]) not in CUDA_VERSIONS:
        raise UsageError("lab.driver_version", f"{driver_version!r} is no driver version that the lab can build.",
                         hint=f"like 580.126.09; branches: {', '.join(map(str, CUDA_VERSIONS))}")
    require_compiler()
    cuda = CUDA_VERSIONS[int(match[1])]
    with tempfile.TemporaryDirectory(prefix="opsctl-nvml-") as folder:
        work = Path(folder)
        (work / "layout.h").write_text(layout.header())
        (work / "unmodelled.c").write_text(unmodelled_source())
        (work / "exports.map").write_text(exports(without))
        definitions = [f'-DDRIVER_VERSION="{driver_version}"', f'-DNVML_VERSION="{cuda // 1000}.{driver_version}"',
                       f"-DCUDA_VERSION={cuda}"]
        run(["gcc", *FLAGS, "-shared", f"-Wl,-soname,{NAME}", f"-Wl,--version-script={work / 'exports.map'}",
             *definitions, f"-I{work}", f"-I{SOURCES}", *sorted(SOURCES.glob("*.c")), work / "unmodelled.c",
             "-o", out, "-lpthread"])
    return out


def build_modprobe(out: Path) -> Path:
    """Compiles the lab's nvidia-modprobe; raises as ``build`` does."""
    require_compiler()
    with tempfile.TemporaryDirectory(prefix="opsctl-modprobe-") as folder:
        (Path(folder) / "layout.h").write_text(layout.header())
        run(["gcc", *FLAGS, f"-I{folder}", MODPROBE, "-o", out])
    return out


def unmodelled() -> tuple[str, ...]:
    """Functions of NVML that the lab has but does not model: each answers NOT_SUPPORTED, whatever it is asked."""
    return tuple((SOURCES / "unmodelled.txt").read_text().split())


def unmodelled_source() -> str:
    return "".join(f"int {name}(void) {{ return 3; }}\n" for name in unmodelled())


def exports(without: Iterable[str]) -> str:
    """The linker's version script: NVML's names and no other, but those left out."""
    hidden = "".join(f" {name};" for name in without)
    return f"{{ global: nvml*; local:{hidden} *; }};\n"
