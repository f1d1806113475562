"""GPUs by PCI device id: what they are called, which kernel module, driver branches and CUDA they take.

``gpus.csv`` and ``architectures.csv`` are the catalogue; ``open_module_ids.csv`` is NVIDIA's own list of what the open
module drives, for GPUs that the catalogue does not have. Each row names its source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from opsctl.stack.tables import Read, Row, deciding, read_table
from opsctl.stack.versions import order_of

Modules = Literal["open", "proprietary", "either"]
Fabric = Literal["", "nvswitch", "nvlink5"]
Capability = tuple[int, ...]  # (9, 0)


@dataclass(frozen=True)
class Architecture:
    """``first_branch`` and ``last_branch``: driver branches that know it; 0: the newest does too.

    ``first_driver`` and ``first_cuda``: ``570.26`` and ``12.8``, empty where nobody wrote them down.
    """

    name: str
    modules: Modules
    first_branch: int = 0
    last_branch: int = 0
    first_driver: str = ""
    first_cuda: str = ""


@dataclass(frozen=True)
class Gpu:
    """``fabric``: what a board with it needs besides the driver: nothing, the fabric manager, or that and nvlsm.

    ``subsystems`` tell products apart that share a device id; ``official`` is how NVIDIA's list calls it.
    ``capability`` is empty and ``memory_mib`` 0 where they are not written down; ``kind``: geforce, workstation,
    datacentre, soc; ``cpu``: arm64 where it comes with one.
    """

    device_id: str
    name: str
    architecture: Architecture
    fabric: Fabric = ""
    subsystems: tuple[str, ...] = ()
    official: tuple[str, ...] = ()
    capability: Capability = ()
    kind: str = ""
    cpu: str = ""
    memory_mib: int = 0


@cache
def catalogue() -> Mapping[str, Gpu]:
    """Every known GPU by its PCI device id, ``2335``; products that share one are one GPU with both their names."""
    listed = {gpu.device_id: gpu for gpu in listed_gpus()}
    return listed | {device: together(products_with(device)) for device in dict.fromkeys(
        gpu.device_id for gpu in products())}


@cache
def products() -> tuple[Gpu, ...]:
    """The rows of ``gpus.csv``."""
    return make_products(read_table)


@cache
def listed_gpus() -> tuple[Gpu, ...]:
    """NVIDIA's list of what the open module drives: Turing or newer, and nobody has written down more of it."""
    unknown = Architecture("Turing or newer", "either")
    return tuple(Gpu(row["device_id"], row["name"], unknown) for row in read_table("open_module_ids.csv"))


def make_products(read: Read) -> tuple[Gpu, ...]:
    """The products of a catalogue that ``read`` reads."""
    architectures = {row["architecture"]: _architecture(deciding(row)) for row in read("architectures.csv")}
    return tuple(_product(deciding(row), architectures) for row in read("gpus.csv"))


def products_with(device_id: str) -> tuple[Gpu, ...]:
    """Every product of the catalogue with a PCI device id."""
    return tuple(gpu for gpu in products() if gpu.device_id == device_id)


def together(gpus: Sequence[Gpu]) -> Gpu:
    """Products that share a device id as one GPU."""
    return gpus[0] if len(gpus) == 1 else replace(gpus[0], name=" or ".join(gpu.name for gpu in gpus), memory_mib=0)


def is_called(gpu: Gpu, model: str) -> bool:
    """Whether an operator may say ``model`` for it: its words stand in the GPU's name, ``H200`` in ``H200 NVL``."""
    name, words = f" {gpu.name.lower()} ", model.lower().removeprefix("nvidia ").split()
    return bool(words) and f" {' '.join(words)} " in name


def called(model: str) -> tuple[Gpu, ...]:
    """All GPUs of the catalogue that ``model`` may mean."""
    return tuple(gpu for gpu in catalogue().values() if is_called(gpu, model))


def _architecture(row: Row) -> Architecture:
    return Architecture(row["architecture"], _modules(row["modules"] or "either"), int(row["first_branch"] or 0),
                        int(row["last_branch"] or 0), row["first_driver"], row["first_cuda"])


def _product(row: Row, architectures: Mapping[str, Architecture]) -> Gpu:
    official = tuple(name for name in row["official_name"].split(" / ") if name)
    return Gpu(row["device_id"], row["name"], architectures[row["architecture"]], _fabric(row["fabric"]),
               tuple(row["subsystem"].split()), official,
               order_of(row["compute_capability"]) if row["compute_capability"] else (), row["kind"], row["cpu"],
               int(row["memory_mib"] or 0))


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
