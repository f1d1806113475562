"""The file of pinned host keys, as both OpenSSH and Fabric's SSH library read it. Pure but for ``load``."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opsctl.errors import ConfigurationError

KEY_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa")


@dataclass(frozen=True)
class HostKey:
    """A public key: its type and its base64 text."""

    type: str
    text: str

    @property
    def fingerprint(self) -> str:
        """``SHA256:...`` as ``ssh-keygen -l`` prints it."""
        digest = hashlib.sha256(base64.b64decode(self.text)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


@dataclass(frozen=True)
class Pin:
    """One line of the file; ``line`` counts from 1."""

    line: int
    names: tuple[str, ...]
    key: HostKey


def pin_name(address: str, port: int) -> str:
    """How a host is called in the file: its address, with the port in brackets when it is not 22."""
    return address if port == 22 else f"[{address}]:{port}"


def load(path: Path) -> tuple[Pin, ...]:
    """The pins of a file; none when it is not there."""
    return parse(path.read_text(encoding="utf-8"), path) if path.is_file() else ()


def parse(text: str, path: Path) -> tuple[Pin, ...]:
    """The pins of a known_hosts file.

    Raises:
        ConfigurationError: a line that one of the readers would skip or take as something else: a host would then be
            believed by one engine and not by the other.
    """
    return tuple(_parse(text, path))


def _parse(text: str, path: Path) -> Iterator[Pin]:
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        problem = ""
        if fields[0].startswith("@"):
            problem = f"{fields[0]} is not supported"
        elif fields[0].startswith("|"):
            problem = "hashed names cannot be told apart by a person"
        elif len(fields) < 3:
            problem = "it is not `names type key`"
        elif fields[1] not in KEY_TYPES:
            problem = f"{fields[1]} is no type of key that all engines know"
        else:
            try:
                inner = base64.b64decode(fields[2], validate=True)
                if fields[1].encode() not in inner[:40]:
                    problem = f"the key is not of type {fields[1]}"
            except binascii.Error:
                problem = "the key is not base64"
        if problem:
            raise ConfigurationError("known_hosts.bad_line", f"{path}:{number}: this is no pinned host key: {problem}.",
                                     hint=f"remove the line (sed -i {number}d {path.name}), then opsctl trust")
        yield Pin(number, tuple(fields[0].split(",")), HostKey(fields[1], fields[2]))


def pins_of(pins: Sequence[Pin], name: str) -> tuple[Pin, ...]:
    return tuple(pin for pin in pins if name in pin.names)


def pinned_text(text: str, name: str, key: HostKey, comment: str) -> str:
    """The file's text with ``key`` as the one pin of ``name``; other hosts' lines and comments stay as they are."""
    kept = []
    for line in text.splitlines():
        fields = line.split()
        names = fields[0].split(",") if fields and not fields[0].startswith("#") else []
        if name not in names:
            kept.append(line)
        elif len(names) > 1:
            kept.append(" ".join([",".join(other for other in names if other != name), *fields[1:]]))
    return "\n".join([*kept, f"{name} {key.type} {key.text} {comment}".rstrip()]) + "\n"
