"""What differs between versions of vLLM: two data files with a source for each row, and pure functions over them.

``vllm_versions.csv``: which versions are known and what they need of a host. ``vllm_features.csv``: what came and went.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from opsctl.errors import RefusedError

FOLDER = Path(__file__).parent
# PEP 440 but for epochs; a local version ("+cu129") says how a build was made and not which version it is.
VERSION = re.compile(r"(?P<release>\d+(?:\.\d+)*)(?:(?P<pre>a|b|rc)(?P<pre_number>\d+))?(?:\.post(?P<post>\d+))?"
                     r"(?:\.dev(?P<dev>\d+))?(?:\+[a-z0-9.]+)?")
PRE = {"a": 0, "b": 1, "rc": 2}
FINAL = 3

Key = tuple[tuple[int, ...], int, int, int, float]


@dataclass(frozen=True)
class Line:
    """A row of ``vllm_versions.csv``: versions from ``first`` to ``last`` and what they need of a host."""

    first: str
    last: str
    torch: str
    cuda: str
    minimum_driver: str
    first_python: str
    last_python: str
    glibc: str
    first_capability: str
    source: str


@dataclass(frozen=True)
class Feature:
    """A row of ``vllm_features.csv``; ``until`` is empty for what is still there."""

    feature: str
    since: str
    until: str
    source: str


@cache
def lines() -> tuple[Line, ...]:
    """Known versions, oldest first."""
    return tuple(Line(**row) for row in _rows("vllm_versions.csv"))


@cache
def features() -> dict[str, Feature]:
    return {row["feature"]: Feature(**row) for row in _rows("vllm_features.csv")}


def version_key(version: str) -> Key:
    """What versions are ordered by: 0.8.5rc1 < 0.8.5 < 0.8.5.post1 < 0.8.6.

    Raises:
        ValueError: it is no version.
    """
    match = VERSION.fullmatch(version)
    if match is None:
        raise ValueError(f"{version!r} is no version")
    release = _release(match["release"])
    pre = PRE[match["pre"]] if match["pre"] else FINAL
    post = int(match["post"]) if match["post"] else -1
    dev = int(match["dev"]) if match["dev"] else float("inf")
    if match["dev"] and not match["pre"] and not match["post"]:
        pre = -1  # 0.9.0.dev3 comes before 0.9.0a1
    return release, pre, int(match["pre_number"] or 0), post, dev


def line_of(version: str) -> Line | None:
    """The row of a version; None when it is not known. A post release is of the line of what it repairs."""
    try:
        key = version_key(version)
    except ValueError:
        return None
    for line in lines():
        if key >= version_key(line.first) and key[0] <= version_key(line.last)[0]:
            return line
    return None


def newest() -> str:
    """The newest version known."""
    return lines()[-1].last


def known(version: str) -> Line:
    """The row of a version.

    Raises:
        RefusedError: it is not known.
    """
    found = line_of(version)
    if found is None:
        raise RefusedError("engine.unknown_version", f"vLLM {version} is not known to this version of opsctl.",
                           hint=f"known are {lines()[0].first} to {newest()}; pin one of them, or bring a newer opsctl")
    return found


def supports(version: str, feature: str) -> bool:
    """Whether a known version has a feature.

    Raises:
        KeyError: the data file has no such feature.
    """
    row = features()[feature]
    key = version_key(version)
    return key >= version_key(row.since) and (not row.until or key[0] <= version_key(row.until)[0])


def fits_python(line: Line, python: str) -> bool:
    """Whether a line has wheels for Python ``3.12``."""
    return _release(line.first_python) <= _release(python) <= _release(line.last_python)


def _release(text: str) -> tuple[int, ...]:
    """``0.9.0`` and ``0.9`` are the same."""
    numbers = [int(part) for part in text.split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
