"""Packs files of a bundle into a tar archive: BUNDLE ARCHIVE, the files' names on standard input, one a line.

Owners and modes are the gateway's, not those of whoever built the bundle.
"""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path


def as_the_gateway_keeps_it(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mode = 0o755 if member.isdir() else 0o644
    return member


def pack(bundle: Path, archive: Path, names: list[str]) -> None:
    """Writes the named files, and the folders they lie in, to ``archive``."""
    folders = {str(folder) for name in names for folder in Path(name).parents if str(folder) != "."}
    with tarfile.open(archive, "w") as tar:
        for name in [*sorted(folders), *sorted(names)]:
            tar.add(bundle / name, arcname=name, recursive=False, filter=as_the_gateway_keeps_it)


if __name__ == "__main__":
    try:
        pack(Path(sys.argv[1]), Path(sys.argv[2]), sys.stdin.read().splitlines())
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}: opsctl bundle build makes the bundle whole again")
