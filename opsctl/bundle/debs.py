"""Package files as apt names them, and how its answers are read. Pure but for ``file_is``."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

# What apt says about a package it does not have (apt 2.6 and 3.0).
UNKNOWN_PACKAGE = re.compile(r"^E: (?:Unable to locate package (?P<a>\S+)"
                             r"|Package '(?P<b>[^']+)' has no installation candidate"
                             r"|Couldn't find any package by (?:glob|regex) '(?P<c>[^']+)')", re.MULTILINE)
PRINTED_URI = re.compile(r"^'(?P<address>[^']+)' (?P<name>\S+) (?P<size>\d+) (?P<algorithm>[A-Za-z0-9]+)(?:Sum)?:"
                         r"(?P<digest>[0-9a-f]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Deb:
    """One package file of the closure: its name in the cache, size in bytes, and its digest as apt knows it."""

    name: str
    size: int
    algorithm: str
    digest: str

    @property
    def pool_name(self) -> str:
        """The file's name in a repository: without the epoch, as Debian's own pool has it.

        apt's cache writes the epoch's colon as ``%3a``, which web servers and apt's file: method would undo.
        """
        return re.sub(r"_\d+%3a", "_", self.name)


def parse_printed_uris(text: str) -> tuple[Deb, ...]:
    """The files of ``apt-get --print-uris``, in the order of their names."""
    return tuple(sorted((Deb(match["name"], int(match["size"]), match["algorithm"].lower(), match["digest"])
                         for match in PRINTED_URI.finditer(text)), key=lambda deb: deb.name))


def unknown_packages(apt_output: str) -> tuple[str, ...]:
    """The names that apt says it does not have."""
    found = (match["a"] or match["b"] or match["c"] for match in UNKNOWN_PACKAGE.finditer(apt_output))
    return tuple(dict.fromkeys(found))


def file_is(path: Path, deb: Deb) -> bool:
    """Whether the file is there with the digest that the index names."""
    if not path.is_file() or path.stat().st_size != deb.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, deb.algorithm).hexdigest() == deb.digest
