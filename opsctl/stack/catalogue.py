"""GPUs by PCI device id: what they are called, which kernel module and which driver branches they take.

``gpus.csv`` and ``architectures.csv`` are the catalogue; ``open_module_ids.csv`` is NVIDIA's own list of what the open
module drives, for GPUs that the catalogue does not have. Each row names its source.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent
Modules = Literal["open", "proprietary", "either"]
Fabric = Literal["", "nvswitch", "nvlink5"]


@dataclass(frozen=True)
class Architecture:
    """``first_branch`` and ``last_branch``: driver branches that know it; 0: the newest does too."""

    name: str
    modules: Modules
    first_branch: int = 0
    last_branch: int = 0


@dataclass(frozen=True)
class Gpu:
    """``fabric``: what a board with it needs besides the driver: nothing, the fabric manager, or that and nvlsm."""

    device_id: str
    name: str
    architecture: Architecture
    fabric: Fabric = ""


@cache
def catalogue() -> Mapping[str, Gpu]:
    """Every known GPU by its PCI device id, ``2335``."""
    architectures = {row["architecture"]: Architecture(
        row["architecture"], _modules(row["modules"]), int(row["first_branch"] or 0), int(row["last_branch"] or 0))
        for row in _rows("architectures.csv")}
    # Turing or newer, and nobody has written down more of it.
    unknown = Architecture("Turing or newer", "either")
    found = {row["device_id"]: Gpu(row["device_id"], row["name"], unknown) for row in _rows("open_module_ids.csv")}
    return found | {row["device_id"]: Gpu(row["device_id"], row["name"], architectures[row["architecture"]],
                                          _fabric(row["fabric"])) for row in _rows("gpus.csv")}


def is_called(gpu: Gpu, model: str) -> bool:
    """Whether an operator may say ``model`` for it: its words stand in the GPU's name, ``H200`` in ``H200 NVL``."""
    name, words = f" {gpu.name.lower()} ", model.lower().removeprefix("nvidia ").split()
    return bool(words) and f" {' '.join(words)} " in name


def called(model: str) -> tuple[Gpu, ...]:
    """All GPUs of the catalogue that ``model`` may mean."""
    return tuple(gpu for gpu in catalogue().values() if is_called(gpu, model))


def _rows(name: str) -> list[dict[str, str]]:
    with (HERE / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _modules(text: str) -> Modules:
    for known in ("open", "proprietary", "either"):
        if text == known:
            return known
    raise ValueError(f"architectures.csv: modules={text}")


def _fabric(text: str) -> Fabric:
    for known in ("", "nvswitch", "nvlink5"):
        if text == known:
            return known
    raise ValueError(f"gpus.csv: fabric={text}")
