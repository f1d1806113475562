"""Makes the .deb files: a tree for each package, then dpkg-deb. The same content gives the same bytes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from opsctl.bundle.closure import Closure, Deb
from opsctl.bundle.process import last_lines, require_program, run
from opsctl.bundle.sums import digest
from opsctl.engines.events import Emit, Progress
from opsctl.errors import OpsctlError
from opsctl.lab.vendor.catalogue import BUILT, Package, control, fill, script_parts

HERE = Path(__file__).resolve().parent
PARTS = HERE / "parts"
EPOCH_S = 1_767_225_600  # every file is dated 2026-01-01: a rebuild of the same is the same for apt
UNITS = "usr/lib/systemd/system"
# The lab's oldest machines: bookworm has this glibc. https://packages.debian.org/bookworm/libc6
GLIBC = (2, 36)
GLIBC_SYMBOL = re.compile(rb"GLIBC_(\d+)\.(\d+)")

Built = Mapping[str, Mapping[str, Path]]  # driver version -> "library" and "modprobe" -> the program made for it


def make_debs(wanted: Iterable[Package], suite: str, built: Built, work: Path, archives: Path, emit: Emit) -> Closure:
    """Makes every package of a suite below ``archives``; ``work`` is scratch space.

    As NVIDIA's are, those of another suite are other files of the same name and version.

    Raises:
        OpsctlError: ``lab.vendor_failed``: dpkg-deb refused a package.
        RefusedError: there is no dpkg-deb here.
    """
    program = require_program("dpkg-deb", "dpkg", "it makes the lab's driver packages")
    wanted = tuple(wanted)
    archives.mkdir(parents=True, exist_ok=True)
    debs = []
    for count, package in enumerate(wanted, 1):
        tree = work / package.name
        _tree(package, suite, built, tree)
        path = archives / package.file_name
        done = run([program, "--root-owner-group", "-Zgzip", "-z1", "--build", str(tree), str(path)],
                   environment={"SOURCE_DATE_EPOCH": str(EPOCH_S)})
        if done.returncode:
            raise OpsctlError("lab.vendor_failed", f"dpkg-deb could not make {package.name} {package.version}.",
                              log_tail=last_lines(done.stderr))
        shutil.rmtree(tree)
        debs.append(Deb(path.name, path.stat().st_size, "sha256", digest(path)))
        emit(Progress(f"driver packages for {suite}", count, len(wanted), "items"))
    return Closure(tuple(debs), archives)


def check_glibc(program: Path) -> None:
    """Refuses what was compiled here and would not load on the lab's machines.

    Raises:
        OpsctlError: ``lab.vendor_glibc``.
    """
    found = GLIBC_SYMBOL.findall(program.read_bytes())
    wants = max(((int(major), int(minor)) for major, minor in found), default=GLIBC)
    if wants > GLIBC:
        raise OpsctlError("lab.vendor_glibc",
                          f"{program.name}, as this computer's compiler makes it, wants glibc {wants[0]}.{wants[1]}; "
                          f"the lab's machines have {GLIBC[0]}.{GLIBC[1]}.",
                          hint="run the lab on Debian 12, or report it: the simulator should not use that function")


def _tree(package: Package, suite: str, built: Built, tree: Path) -> None:
    for file in package.files:
        _place(package, built, file.source, tree / file.path.lstrip("/"), file.mode)
    for link, target in (package.links or {}).items():
        path = tree / link.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    for unit in package.units:
        _place(package, built, f"parts/{unit.name}", tree / UNITS / unit.name)
    for dropin in package.dropins:
        _place(package, built, "parts/dropin.conf", tree / UNITS / dropin / "opsctl-lab-nvidia.conf")
    readme = fill((PARTS / "readme").read_text(encoding="utf-8"), {**package.words, "SUITE": suite})
    _write(tree / "usr/share/doc" / package.name / "README", readme.encode(), 0o644)
    _control_files(package, tree / "DEBIAN")
    for directory, _, _ in os.walk(tree):
        Path(directory).chmod(0o755)  # whatever the umask


def _control_files(package: Package, directory: Path) -> None:
    directory.mkdir(parents=True)
    texts = {"control": control(package)}
    conffiles = [file.path for file in package.files if file.conffile]
    if conffiles:
        texts["conffiles"] = "\n".join(conffiles) + "\n"
    if package.triggers:
        texts["triggers"] = "\n".join(package.triggers) + "\n"
    for name, text in texts.items():
        _write(directory / name, text.encode(), 0o644)
    for name, parts in script_parts(package).items():
        body = "".join(fill((PARTS / part).read_text(encoding="utf-8"), words) for part, words in parts)
        _write(directory / name, f"#!/bin/sh\nset -e\n{body}".encode(), 0o755)


def _place(package: Package, built: Built, source: str, path: Path, mode: int = 0o644) -> None:
    """Writes one file of a package, a text with its words filled in."""
    if source.startswith(BUILT):
        content = built[package.upstream][source.removeprefix(BUILT)].read_bytes()
    else:
        name = HERE / source if "/" in source else PARTS / source
        content = fill(name.read_text(encoding="utf-8"), package.words).encode()
    _write(path, content, mode)


def _write(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
