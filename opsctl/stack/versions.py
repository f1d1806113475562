"""Driver versions: ``580.126.09`` of NVIDIA's, ``580.126.09-1+lab`` of the package that brings it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

DRIVER_VERSION = re.compile(r"\d{3,4}\.\d{1,3}(?:\.\d{1,3})?")
PACKAGE_VERSION = re.compile(r"(?:\d+:)?(?P<driver>\d{3,4}\.\d{1,3}(?:\.\d{1,3})?)(?:-[A-Za-z0-9.+~]+)?")
NEAREST = 3


def is_driver_version(text: str) -> bool:
    return DRIVER_VERSION.fullmatch(text) is not None


def driver_in(package_version: str) -> str:
    """``580.126.09`` of ``580.126.09-1+lab``; empty when the package has no version of a driver's form."""
    match = PACKAGE_VERSION.fullmatch(package_version)
    return match["driver"] if match else ""


@cache
def order_of(driver: str) -> tuple[int, ...]:
    """What driver versions are sorted by: 580.95.05 is older than 580.126.09."""
    return tuple(int(part) for part in driver.split("."))


def branch_of(driver: str) -> int:
    """580 of ``580.126.09``."""
    return order_of(driver)[0]


def nearest(wanted: str, there: Iterable[str]) -> tuple[str, ...]:
    """The versions of ``there`` that are nearest to ``wanted``: of its branch first, then by number; at most three."""
    def distance(version: str) -> tuple[int, ...]:
        pairs = zip((*order_of(version), 0, 0), (*order_of(wanted), 0, 0), strict=False)
        return tuple(abs(one - other) for one, other in pairs)

    return tuple(sorted(set(there), key=lambda version: (distance(version), order_of(version)))[:NEAREST])
