"""The manifest of a release: what is true of it on every host. Pure; its canonical bytes are what is signed.

``opsctl.release/v1`` is canonical JSON: sorted keys, no blanks, UTF-8, one newline at the end. The digest of a release
is the sha256 of these bytes; its folder is ``<version>-<first 12 digits>``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from opsctl.errors import RefusedError
from opsctl.serving.adapter import Value

SCHEMA = "opsctl.release/v1"
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,39}")
FOLDER = re.compile(rf"{NAME.pattern}-[0-9a-f]{{12}}")
SERVICE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
SHA256 = re.compile(r"[0-9a-f]{64}")
PYTHON = re.compile(r"(>=)?3\.\d+")
DIGEST12 = 12
MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
FILES = "files"

T = TypeVar("T")


@dataclass(frozen=True)
class ReleaseFile:
    """``path`` is relative, with ``/``; ``size`` in bytes; ``sha256`` in lower-case hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Engine:
    """A pinned engine: ``lock`` is the whole text of hashed requirement lines, ``python`` is ``>=3.10`` or ``3.12``."""

    name: str
    version: str
    python: str
    lock: str

    @property
    def directory(self) -> str:
        """``llamacpp-2026.10.11549-1a2b3c4d``: the folder of its environment on a host."""
        return f"{self.name}-{self.version}-{hashlib.sha256(self.lock.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Release:
    """One version of a service. ``created`` is UTC, ISO 8601; ``source`` says where the files came from, for people."""

    service: str
    version: str
    created: str
    engine: Engine
    arguments: Mapping[str, Value]
    files: tuple[ReleaseFile, ...]
    source: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def content(self) -> dict[str, Any]:
        """What makes two releases the same: all but when and from where they were made."""
        document = self._document()
        return {key: value for key, value in document.items() if key not in ("created", "source")}

    def to_bytes(self) -> bytes:
        """The canonical bytes."""
        return canonical(self._document())

    def _document(self) -> dict[str, Any]:
        files = [asdict(file) for file in sorted(self.files, key=lambda file: file.path)]
        return {"schema": SCHEMA, "service": self.service, "version": self.version, "created": self.created,
                "engine": asdict(self.engine), "arguments": dict(self.arguments), "files": files,
                "source": self.source}


def canonical(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def digest(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()


def directory_name(version: str, manifest_digest: str) -> str:
    """``v1-0123456789ab``."""
    return f"{version}-{manifest_digest[:DIGEST12]}"


def split_directory_name(name: str) -> tuple[str, str]:
    """``v1-0123456789ab`` -> version and the first 12 digits of its digest; digits empty when it is no such name."""
    version, _, digits = name.rpartition("-")
    return (version, digits) if FOLDER.fullmatch(name) else (name, "")


def check_name(version: str) -> str:
    """A version name: lower case, digits, dots, dashes.

    Raises:
        RefusedError: it is not.
    """
    if not NAME.fullmatch(version):
        raise RefusedError("release.bad_version", f"version {version!r} is not a name for a release.",
                           hint="lower-case letters, digits, dots and dashes, such as v3 or v3.1")
    return version


def check_path(path: str) -> str:
    """A relative path that stays inside the release.

    Raises:
        RefusedError: absolute, ``..``, empty parts, control characters.
    """
    parts = path.split("/")
    if not path or path.startswith("/") or any(part in ("", ".", "..") for part in parts) or "\\" in path or any(
            ord(character) < 32 or ord(character) == 127 for character in path):
        raise RefusedError("release.bad_path", f"the file name {path!r} may not stand in a release.",
                           hint="relative names without .. only")
    return str(PurePosixPath(path))


def parse(manifest: bytes) -> Release:
    """The release that ``manifest`` describes. Keys that this version does not know are left for newer ones.

    Raises:
        RefusedError: not a manifest, or a value in it is wrong.
    """
    try:
        document = json.loads(manifest)
    except ValueError:
        raise _wrong("it is not JSON") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise _wrong(f"its schema is not {SCHEMA}")
    engine = _take(document, "engine", dict)
    release = Release(
        service=_matching(document, "service", SERVICE),
        version=_matching(document, "version", NAME),
        created=_take(document, "created", str),
        engine=Engine(_matching(engine, "name", SERVICE), _matching(engine, "version", NAME_OR_PEP440),
                      _matching(engine, "python", PYTHON), _take(engine, "lock", str)),
        arguments=_arguments(_take(document, "arguments", dict)),
        files=tuple(_file(entry) for entry in _take(document, "files", list)),
        source=_take(document, "source", str),
    )
    paths = [file.path for file in release.files]
    if not paths or len(set(paths)) != len(paths):
        raise _wrong("it lists no file, or one twice")
    folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    if folders & set(paths):
        raise _wrong("a file and a folder have the same name")
    return release


NAME_OR_PEP440 = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")


def _wrong(what: str) -> RefusedError:
    return RefusedError("release.bad_manifest", f"the manifest is wrong: {what}.",
                        hint="import the model again; or a newer opsctl made it: opsctl provision brings the agent")


def _take(table: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = table.get(key)
    if not isinstance(value, kind):
        raise _wrong(f"{key} is {value!r}" if key in table else f"{key} is missing")
    return value


def _matching(table: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    value = _take(table, key, str)
    if not pattern.fullmatch(value):
        raise _wrong(f"{key} is {value!r}")
    return value


def _arguments(table: Mapping[str, Any]) -> dict[str, Value]:
    for key, value in table.items():
        if not isinstance(value, (bool, int, float, str)):
            raise _wrong(f"argument {key} is {value!r}")
    return dict(table)


def _file(entry: Any) -> ReleaseFile:
    if not isinstance(entry, dict):
        raise _wrong(f"file {entry!r}")
    size = _take(entry, "size", int)
    if size < 0 or isinstance(size, bool):
        raise _wrong(f"size is {size!r}")
    return ReleaseFile(check_path(_take(entry, "path", str)), size, _matching(entry, "sha256", SHA256))
