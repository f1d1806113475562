"""Where a model comes from: a directory, one file, or a URL. Gives plain files with the names they get in a release."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from opsctl.agent.fetch import fetch, reason, without_secrets
from opsctl.agent.manifest import check_path
from opsctl.engines.events import Emit, Note, Progress
from opsctl.errors import OpsctlError, RefusedError, UsageError
from opsctl.releases import formats

SCHEMES = ("http", "https", "file")


@dataclass(frozen=True)
class SourceFile:
    """``path`` in the release, ``real`` on this machine, ``size`` in bytes."""

    path: str
    real: Path
    size: int


@contextmanager
def gathered(source: str, emit: Emit) -> Iterator[tuple[str, tuple[SourceFile, ...]]]:
    """Yields what to write down as the source, and its files, checked by name and header.

    A URL is downloaded into a cache first, which goes when the import is done; an interrupted one is resumed.

    Raises:
        UsageError: neither a path nor a URL that can be read.
        RefusedError: a file may not be in a release, cannot be read, or there is none.
    """
    scheme = urlsplit(source).scheme.lower()
    if "://" not in source:
        yield str(Path(source).absolute()), checked(_local(Path(source), emit))
        return
    if scheme not in SCHEMES:
        raise UsageError("import.bad_source", f"{without_secrets(source)}: {scheme} is no kind of source.",
                         hint="a directory, a file, or a URL with http, https or file")
    path = _download(source, emit)
    try:
        yield without_secrets(source), checked(_local(path, emit))
    finally:  # also when it was refused: the next try must not take yesterday's file
        path.unlink()
        path.parent.rmdir()


def checked(files: tuple[SourceFile, ...]) -> tuple[SourceFile, ...]:
    """The same files, after every one was looked at: names first, so that a pickle is refused before anything is read.

    Raises:
        RefusedError: one may not be in a release.
    """
    paths = [file.path for file in files]
    for path in paths:
        check_path(path)
        formats.check_name(path)
    for file in files:
        with _opened(file) as content:
            formats.check_content(file.path, content, file.size)
            if file.path.endswith(".safetensors.index.json"):
                content.seek(0)
                formats.check_index(paths, file.path, json.load(content))
    return files


def _local(source: Path, emit: Emit) -> tuple[SourceFile, ...]:
    if not source.exists():
        raise UsageError("import.no_source", f"there is nothing at {source.absolute()}.",
                         hint="opsctl model import DIR|FILE|URL")
    if source.is_file():
        files = [_file(source.name, source)]
    else:
        files = [_file(path.relative_to(source).as_posix(), path) for path in _walk(source, emit)]
    if not files:
        raise RefusedError("import.empty", f"{source.absolute()} holds no file.", hint="is the download complete?")
    links = [file for file in files if (source if source.is_file() else source / file.path).is_symlink()]
    if links:
        emit(Note(f"{len(links)} of {len(files)} files are symbolic links, such as {links[0].path}; "
                  "the release gets what they point at"))
    return tuple(files)


def _walk(top: Path, emit: Emit) -> Iterator[Path]:
    left_out: list[str] = []
    for folder, folders, names in os.walk(top, followlinks=False, onerror=_unreadable):
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        left_out += [Path(folder, name).relative_to(top).as_posix() for name in hidden]
        linked = [name for name in folders if Path(folder, name).is_symlink()]
        if linked:
            raise RefusedError("import.linked_folder", f"{Path(folder, linked[0])} is a link to a folder.",
                               hint="import the folder itself")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(set(names) - set(hidden)):
            yield Path(folder, name)
    if left_out:
        emit(Note(f"left out, hidden: {', '.join(sorted(left_out))}"))


def _file(path: str, real: Path) -> SourceFile:
    try:
        resolved = real.resolve(strict=True)
        size = resolved.stat().st_size
    except (OSError, RuntimeError) as error:
        raise RefusedError("import.unreadable", f"{real} cannot be read: {_reason(error)}.",
                           hint="a link that points nowhere? fetch the file again") from None
    if not resolved.is_file():
        raise RefusedError("import.unreadable", f"{real} is no plain file.", hint="leave it out of the directory")
    return SourceFile(path, resolved, size)


@contextmanager
def _opened(file: SourceFile) -> Iterator[Any]:
    try:
        content = file.real.open("rb")
    except OSError as error:
        raise RefusedError("import.unreadable", f"{file.real} cannot be read: {_reason(error)}.",
                           hint="change its permissions, or import as a user who may read it") from None
    with content:
        yield content


def _unreadable(error: OSError) -> None:
    raise RefusedError("import.unreadable", f"{error.filename} cannot be read: {_reason(error)}.",
                       hint="change its permissions, or import as a user who may read it")


def _download(url: str, emit: Emit) -> Path:
    name = unquote(PurePosixPath(urlsplit(url).path).name)
    if not name:
        raise UsageError("import.bad_source", f"{without_secrets(url)} names no file.",
                         hint="the URL of one file, such as https://host/model.gguf")
    formats.check_name(name)
    folder = cache_directory() / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    size = _length(url)
    done, started, shown = 0, time.monotonic(), 0.0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown >= 0.5 or done == size:
            shown = now
            emit(Progress(f"downloading {name}", done, size or 0, per_second=done / max(now - started, 0.001)))

    path = folder / name
    fetch(url, path, size=size, sha256="", advance=advance)
    return path


def _length(url: str) -> int | None:
    """Bytes, if the source says so beforehand."""
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - only SCHEMES get here
    try:
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - the same
            length = response.headers.get("Content-Length")
            return int(length) if length else None
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) in (405, 501):  # no HEAD there
            return None
        raise OpsctlError("fetch.failed", f"{without_secrets(url)} could not be reached: {reason(error, url)}.",
                          hint="is the address right? proxies are taken from http_proxy and https_proxy") from None


def cache_directory() -> Path:
    """Where unfinished downloads wait."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "opsctl" / "models"


def _reason(error: BaseException) -> str:
    return str(getattr(error, "reason", "") or getattr(error, "strerror", "") or error)
