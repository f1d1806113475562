"""``gpus.yml`` beside the inventory: which GPUs each host has, by UUID in PCI bus order. Pure.

A bare host's GPUs have no UUIDs that anybody could write down: their driver tells them. The provision that brings it
writes here what it found, once, and instances are dealt GPUs from here ever after. So a GPU that is gone is missed by
its name, and never makes the others move up. ``gpu_uuids`` in the inventory stands above this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opsctl.agent import flat_toml
from opsctl.errors import ConfigurationError, RefusedError
from opsctl.fleet.strict_yaml import Block, Words, read_blocks

NAME = "gpus.yml"
HEADER = """\
# The GPUs of each host in PCI bus order, as opsctl provision found them: instances are dealt them by these UUIDs.
# Keep it in git. A GPU that is gone is an error; after a repair: opsctl gpus accept HOST
"""
WORDS = Words("gpus", "a host's name", 'gpu-1: and below it, indented, GPU-...: "00000000:17:00.0 NVIDIA H200"')
# What a host is asked, as root; ``listed`` reads the answer.
QUERY = ("nvidia-smi", "--query-gpu=pci.bus_id,uuid,name", "--format=csv,noheader")


@dataclass(frozen=True)
class Gpu:
    """``bus``: the PCI address as NVML writes it, ``00000000:17:00.0``; ``model``: ``NVIDIA H200``."""

    uuid: str
    bus: str
    model: str

    @property
    def words(self) -> str:
        return f"{self.uuid} ({self.bus} {self.model})"


Lock = Mapping[str, tuple[Gpu, ...]]


def read(text: str, path: Path) -> dict[str, tuple[Gpu, ...]]:
    """The file's GPUs by host; ``path`` is what errors call it.

    Raises:
        ConfigurationError: ``gpus.*``; the message names the line.
    """
    blocks = read_blocks(text, str(path), WORDS)
    found: dict[str, tuple[Gpu, ...]] = {}
    owners: dict[str, str] = {}
    for host, block in blocks.values.items():
        if not isinstance(block, Block):
            raise ConfigurationError("gpus.bad_value", f"{path}:{blocks.lines[host]}: {host} is {block!r}, and its "
                                     "GPUs are expected.", hint=WORDS.hint)
        found[host] = tuple(_gpu(uuid, value, f"{path}:{block.lines[uuid]}") for uuid, value in block.values.items())
        for uuid in block.values:
            if owners.setdefault(uuid, host) != host:
                raise ConfigurationError("gpus.twice", f"{path}:{block.lines[uuid]}: {uuid} stands under "
                                         f"{owners[uuid]} and under {host}.",
                                         hint="remove it from the host that no longer has it")
    return found


def _gpu(uuid: str, value: object, where: str) -> Gpu:
    bus, _, model = str(value).partition(" ")
    if not isinstance(value, str) or not model or bus.count(":") != 2:
        raise ConfigurationError("gpus.bad_value", f"{where}: {uuid} is {value!r}, and a PCI address and a model are "
                                 "expected.", hint=f'{uuid}: "00000000:17:00.0 NVIDIA H200"; or remove the host: '
                                 "opsctl provision finds its GPUs again")
    return Gpu(uuid, bus, model)


def render(lock: Lock) -> str:
    """The file's text; the same lock gives the same text."""
    lines = [HEADER]
    for host in sorted(lock):
        lines.append(f"{host}:")
        lines += [f"  {gpu.uuid}: {json.dumps(f'{gpu.bus} {gpu.model}')}" for gpu in lock[host]]
    return "\n".join([*lines, ""])


def listed(csv: str) -> tuple[Gpu, ...]:
    """The GPUs in nvidia-smi's answer to ``QUERY``, in PCI order; lines that are no GPU's are passed over."""
    rows = [[word.strip() for word in line.split(",", 2)] for line in csv.splitlines()]
    return tuple(sorted((Gpu(row[1], row[0], row[2]) for row in rows if len(row) == 3 and row[1].startswith("GPU-")),
                        key=lambda gpu: gpu.bus))


def settle(host: str, known: Sequence[str] | None, recorded: Iterable[str], said: str) -> tuple[Gpu, ...]:
    """The GPUs of a host, from what it says, when that agrees with what was known before.

    ``known``: the UUIDs of inventory or gpus.yml, None when nobody has written them yet; ``recorded``: those that an
    earlier provision gave the host's agent; ``said``: nvidia-smi's answer.

    Raises:
        RefusedError: ``gpus.none``, ``gpus.missing``, or ``gpus.others``: that earlier provision's gpus.yml lacks here.
    """
    there = listed(said)
    uuids = [gpu.uuid for gpu in there]
    if not there:
        words = " ".join(said.split())[:200] or "nothing"
        raise RefusedError("gpus.none", f"{host} is to serve on GPUs, and nvidia-smi there says: {words}.",
                           hint='nvidia_driver_version="580.126.09" in the inventory gives it a driver; or '
                                "gpus_per_instance: 0")
    missing = [uuid for uuid in known or () if uuid not in uuids]
    if missing:
        raise RefusedError("gpus.missing", f"{host}: {len(missing)} of its {len(known or ())} GPUs are missing: "
                           f"{', '.join(missing)}.", hint=f"look after the card (opsctl status --gpus); when it is "
                           f"gone for good: opsctl gpus accept {host}, or gpu_uuids of the inventory")
    before = sorted(recorded)
    if known is None and before and before != sorted(uuids):
        raise RefusedError("gpus.others", f"{host} was given {', '.join(before)} by an earlier provision and has "
                           f"{', '.join(uuids)} now, and {NAME} does not say which of them are right.",
                           hint=f"bring {NAME} of that provision here, from git; or opsctl gpus accept {host} takes "
                                "what is there now")
    return there


def recorded_in(agent_toml: str) -> tuple[str, ...]:
    """The GPUs that a host's agent was told of; none when there is no such file, or it cannot be read."""
    try:
        found = flat_toml.loads(agent_toml).get("gpus", ())
    except ValueError:
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()
