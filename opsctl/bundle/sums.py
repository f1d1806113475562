"""SHA256SUMS: what a bundle holds, in the format of ``sha256sum -c``."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from opsctl.engines.events import Emit, Progress

LINE = re.compile(r"^(?P<digest>[0-9a-f]{64})  (?P<path>(?:apt|wheels)/[^\n\\]+)$")
QUIET_BYTES = 200_000_000  # less than this is hashed before anyone would look for a progress bar


def render(digests: Mapping[str, str]) -> str:
    """``{"apt/pool/a.deb": "<hex>"}`` -> the text of SHA256SUMS, sorted by path: equal content, equal bytes."""
    return "".join(f"{digests[path]}  {path}\n" for path in sorted(digests))


def parse(text: str) -> dict[str, str]:
    """The text of SHA256SUMS -> ``{"apt/pool/a.deb": "<hex>"}``.

    Raises:
        ValueError: a line is no such line, leads out of the bundle, or names a path again.
    """
    digests: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = LINE.match(line)
        if match is None or ".." in match["path"].split("/") or match["path"] in digests:
            raise ValueError(f"line {number}")
        digests[match["path"]] = match["digest"]
    return digests


def regular_files(root: Path, folders: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Every name under the folders as (path relative to root, whether it is a regular file); folders not named."""
    for folder in folders:
        for directory, names, files in os.walk(root / folder):
            links = [name for name in names if (Path(directory) / name).is_symlink()]
            for name in [*files, *links]:
                path = Path(directory) / name
                yield path.relative_to(root).as_posix(), stat.S_ISREG(path.lstat().st_mode)


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(root: Path, paths: Iterable[str], emit: Emit, subject: str = "checksums",
            on_each: Callable[[str, str], None] | None = None) -> dict[str, str]:
    """The sha256 of every path below ``root``; ``on_each(path, digest)`` may stop early by raising.

    hashlib releases the interpreter while it hashes, so threads use every core.
    """
    paths = sorted(paths)
    sizes = {path: (root / path).stat().st_size for path in paths}
    total, done, began = sum(sizes.values()), 0, time.monotonic()
    said = 0.0
    result: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        futures = {pool.submit(digest, root / path): path for path in paths}
        try:
            for future in as_completed(futures):
                path = futures[future]
                result[path] = future.result()
                if on_each:
                    on_each(path, result[path])
                done += sizes[path]
                now = time.monotonic()
                if total > QUIET_BYTES and (now - said > 0.5 or done == total):
                    said = now
                    emit(Progress(subject, done, total, "bytes", done / max(now - began, 1e-6)))
        finally:
            pool.shutdown(cancel_futures=True)
    return result
