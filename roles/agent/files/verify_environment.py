"""Prints what is wrong with a virtual environment: ENVIRONMENT REQUIREMENTS.

``environment``: there is none, or it was made for another Python. ``package``: a package of the requirements file is
missing, has another version, or a file of it is not what its RECORD says. ``intact``: nothing.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import re
import sys
from pathlib import Path

REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)", re.MULTILINE)


def verdict(environment: Path, requirements: Path) -> str:
    packages = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    if not (environment / "bin" / "python3").exists() or not (packages / "pip" / "__main__.py").exists():
        return "environment"
    if not requirements.is_file():
        return "package"
    wanted = list(REQUIREMENT.finditer(requirements.read_text(encoding="utf-8")))
    return "intact" if wanted and all(is_intact(packages, one["name"], one["version"]) for one in wanted) else "package"


def is_intact(packages: Path, name: str, version: str) -> bool:
    """Whether this version of the package is installed, alone, and as its RECORD says."""
    folded = re.sub(r"[-_.]+", "_", name).lower()
    found = [path for path in packages.glob("*.dist-info") if path.name.lower().startswith(folded + "-")]
    if [path.name.lower() for path in found] != [f"{folded}-{version.lower()}.dist-info"]:
        return False
    return all(map(is_as_recorded, recorded(packages, found[0])))


def recorded(packages: Path, dist_info: Path) -> list[tuple[Path, str]]:
    """Every file of the package with its hash as ``sha256=<base64>``; no hash: only that it is there counts."""
    record = dist_info / "RECORD"
    if not record.exists():
        return [(record, "")]
    with record.open(encoding="utf-8", newline="") as rows:
        return [(packages / row[0], row[1]) for row in csv.reader(rows) if row and not row[0].endswith(".pyc")]


def is_as_recorded(entry: tuple[Path, str]) -> bool:
    path, digest = entry
    if not path.is_file():
        return False
    if not digest.startswith("sha256="):
        return True
    actual = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
    return digest == f"sha256={actual}"


if __name__ == "__main__":
    sys.stdout.write(verdict(Path(sys.argv[1]), Path(sys.argv[2])))
