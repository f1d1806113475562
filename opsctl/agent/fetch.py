"""Fetches one file over HTTP(S): resumes by range, checks size and sha256, retries while it gets on, fsyncs."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from opsctl.agent.durable import sync_directory, write_atomically
from opsctl.agent.pace import Pace
from opsctl.errors import OpsctlError, RefusedError

CHUNK = 1 << 20
TIMEOUT_S = 30.0  # without a single byte
ATTEMPTS = 5  # in a row without progress
PAUSES_S = (0.2, 1.0, 3.0, 5.0)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
PARTIAL = ".part"
VALIDATOR = ".validator"  # after the name of the .part: which content of the source it is the beginning of
CHANGED = "the copy at the source changed after signing: remove it there and publish again"

Advance = Callable[[int], None]  # bytes more than before, those of an earlier try first; negative: thrown away
Opener = Callable[[urllib.request.Request], Any]


def fetch(url: str, path: Path, *, size: int | None, sha256: str, advance: Advance,
          pause: Callable[[float], None] = time.sleep, open_url: Opener | None = None, pace: Pace | None = None) -> str:
    """Brings ``url`` to ``path``; returns the sha256 of what came. What an earlier try left in ``path.part`` is kept.

    ``size`` in bytes, None when unknown; ``sha256`` empty when unknown. Without a sha256 nothing would notice that the
    source was replaced between two tries: then a try goes on only when the source says that it is still the same.
    ``pace``: no faster than that.

    Raises:
        RefusedError: the content is not what it should be (``fetch.corrupted``).
        OpsctlError: the source cannot be reached or gives up again and again (``fetch.failed``).
    """
    partial = path.with_name(path.name + PARTIAL)
    if not sha256 and not _validator(partial):
        _discard(partial)
    furthest = _size(partial)
    if furthest:
        advance(furthest)
    without_progress = 0
    while True:
        try:
            digest = _attempt(url, partial, size, advance, open_url or _open, pace or Pace(), certain=bool(sha256))
            break
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 403, 404, 410):
                raise _failed(url, error) from None
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise  # the disk's fault, not the source's
            if isinstance(error, OSError) and error.errno is not None and not _of_network(error):
                raise _failed(url, error) from None
            # Farther than ever, not than before: a source that got shorter is fetched, thrown away, fetched ...
            without_progress = 0 if _size(partial) > furthest else without_progress + 1
            furthest = max(furthest, _size(partial))
            if without_progress >= ATTEMPTS:
                raise _failed(url, error) from None
            pause(PAUSES_S[min(without_progress, len(PAUSES_S) - 1)])
    if sha256 and digest != sha256:
        advance(-partial.stat().st_size)
        _discard(partial)
        raise RefusedError("fetch.corrupted", f"{without_secrets(url)} is corrupted: its sha256 is {digest}, "
                           f"signed was {sha256}.", hint=CHANGED)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    _validator_file(partial).unlink(missing_ok=True)
    return digest


def without_secrets(url: str) -> str:
    """The URL without user, password, query and fragment: manifests and messages are public, and these hold tokens."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def sha256_of(path: Path, advance: Advance | None = None) -> str:
    """The sha256 of a file, in lower-case hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        _hash(file, digest, advance)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _hash(file: IO[bytes], digest: Any, advance: Advance | None) -> None:
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(view[:count])
        if advance is not None:
            advance(count)


def _attempt(url: str, partial: Path, size: int | None, advance: Advance, open_url: Opener, pace: Pace, *,
             certain: bool) -> str:
    """Appends what is missing to ``partial``; returns the sha256 of all of it. ``certain``: the caller knows that."""
    digest = hashlib.sha256()
    have = _size(partial)
    known = "" if certain else _validator(partial)
    if have and ((size is not None and have > size) or not (certain or known)):
        _discard(partial)
        advance(-have)
        have = 0
    elif have and have == size and not certain:  # ask for the last byte: the source says whether it is the same
        have -= 1
        os.truncate(partial, have)
        advance(-1)
    if have:
        with partial.open("rb") as file:
            _hash(file, digest, None)
        if have == size:
            return digest.hexdigest()
    headers = {"Range": f"bytes={have}-", **({"If-Range": known} if known else {})} if have else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - by caller
    try:
        response = open_url(request)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: what we have is not a beginning of what is there
            raise
        _discard(partial)
        advance(-have)
        raise http.client.HTTPException("the source has fewer bytes than were there before") from None
    with response:
        resumed = have and response.status == 206 and _starts_at(response.headers.get("Content-Range", ""), have)
        same = _validator_of(response.headers)
        # It may not know If-Range. Who does need not repeat Last-Modified, but the ETag.
        if resumed and known and same != known and (same or known.startswith('"')):
            _discard(partial)
            advance(-have)
            raise http.client.HTTPException("the source was replaced")
        if have and not resumed:  # another content, or a server without ranges: it sends all of it again
            advance(-have)
            digest = hashlib.sha256()
        if not resumed:
            _discard(partial)
            if not certain:
                _remember(partial, response.headers)
        with partial.open("ab" if resumed else "wb") as file:
            total = _append(response, file, digest, have if resumed else 0, size, advance, pace)
    if size is None:
        expected = response.headers.get("Content-Length")
        size = int(expected) + (have if resumed else 0) if expected else total
    if total != size:
        raise http.client.IncompleteRead(b"", size - total)
    return digest.hexdigest()


def _validator_file(partial: Path) -> Path:
    return partial.with_name(partial.name + VALIDATOR)


def _validator(partial: Path) -> str:
    """What ``If-Range`` wants to know of ``partial``'s source; empty when nothing is known."""
    path = _validator_file(partial)
    return path.read_text() if path.is_file() else ""


def _validator_of(headers: Any) -> str:
    """A strong ETag, or the time of the last change; a weak ETag may stand for other bytes."""
    tag = str(headers.get("ETag", "")).strip()
    return tag if tag.startswith('"') else str(headers.get("Last-Modified", "")).strip()


def _remember(partial: Path, headers: Any) -> None:
    validator = _validator_of(headers)
    if validator:
        write_atomically(_validator_file(partial), validator)


def _discard(partial: Path) -> None:
    """Together and for good: an old beginning beside a new validator would be a mixture after a power cut."""
    if not partial.exists() and not _validator_file(partial).exists():
        return
    partial.unlink(missing_ok=True)
    _validator_file(partial).unlink(missing_ok=True)
    sync_directory(partial.parent)


def _append(response: Any, file: IO[bytes], digest: Any, total: int, size: int | None, advance: Advance, pace: Pace
            ) -> int:
    while chunk := response.read(pace.chunk()):
        total += len(chunk)
        if size is not None and total > size:
            file.close()
            advance(-(total - len(chunk)))
            _discard(Path(file.name))
            raise RefusedError("fetch.corrupted", f"{without_secrets(response.url)} is longer than the {size} "
                               "bytes that were signed.", hint=CHANGED)
        file.write(chunk)
        digest.update(chunk)
        advance(len(chunk))
        pace.spend(len(chunk))
    return total


def _starts_at(content_range: str, offset: int) -> bool:
    return content_range.replace(" ", "").startswith(f"bytes{offset}-")


def open_directly(request: urllib.request.Request) -> Any:
    """Past any proxy: hosts fetch from their gateway, engines are asked on their own host."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT_S)


def _open(request: urllib.request.Request) -> Any:
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310 - callers allow http, https and file only


def _of_network(error: OSError) -> bool:
    """Whether trying again could help: not for a full disk or a missing folder."""
    return isinstance(error, (ConnectionError, TimeoutError, urllib.error.URLError))


def _failed(url: str, error: Exception) -> OpsctlError:
    return OpsctlError("fetch.failed", f"{without_secrets(url)} could not be fetched: {reason(error, url)}.",
                       hint="is the source up? the same command again goes on where this one stopped")


def reason(error: Exception, url: str) -> str:
    """Why ``url`` did not answer, in words that hold nothing of it: http.client quotes a login as a wrong port."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if urlsplit(url).username is not None and isinstance(error, http.client.InvalidURL):
        return "a user or password in a URL is not supported"
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
