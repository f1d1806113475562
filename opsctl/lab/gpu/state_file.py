"""One machine's shared state as the silicon holds it: made, mapped, and written so that no reader sees half a tick."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from opsctl.lab.gpu import layout
from opsctl.lab.gpu.profiles import ARCHITECTURES, Gpus, Profile

MIB = 1024**2
NVIDIA = 0x10DE
# Buses of the GPUs on a board, in PCI order; a host of the lab has no bridges above them.
BUSES = (0x1A, 0x3D, 0x4C, 0x5B, 0x9A, 0xBB, 0xCA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xE0, 0xE1, 0xE2, 0xE3)
SWITCH_BUSES = (0x07, 0x08, 0x09, 0x0A, 0x0B, 0x0C)
FABRIC_NOT_STARTED, FABRIC_COMPLETED = 1, 3  # NVML_GPU_FABRIC_STATE_*
NAMESPACE = uuid.UUID("7d1ac8f6-5b0f-5e0e-9a44-6f1c1b2f0a35")  # of the UUIDs of simulated GPUs


def gpu_uuid(lab: str, host: str, index: int) -> str:
    """The UUID of a GPU: the same in each lab of that name, so that an inventory stays true."""
    return f"GPU-{uuid.uuid5(NAMESPACE, f'{lab}/{host}/{index}')}"


def gpu_uuids(lab: str, host: str, gpus: Gpus) -> tuple[str, ...]:
    """In PCI order."""
    return tuple(gpu_uuid(lab, host, index) for index in range(gpus.count))


def abilities(profile: Profile) -> int:
    has = {"t_limit": profile.t_limit, "memory_sensor": profile.memory_max_c is not None, "gpm": profile.gpm,
           "mig": profile.mig_slices > 0, "ecc": profile.ecc, "row_remap": profile.row_remapper, "fan": profile.fan,
           "fabric": profile.fabric, "nvlink": profile.nvlinks > 0}
    return sum(layout.ABILITIES[name] for name, there in has.items() if there)


def create(path: Path, uuids: Sequence[str], profile: Profile, *, mig: int = 0) -> None:
    """Writes the state of a machine that is off, in place of an older one.

    Args:
        mig: into how many MIG devices of one slice each GPU is cut.
    """
    machine = layout.Machine(magic=layout.MAGIC, version=layout.VERSION, gpu_count=len(uuids),
                             fabric_state=FABRIC_NOT_STARTED)
    for index, name in enumerate(uuids):
        _describe(machine.gpus[index], index, name, profile, mig)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(bytes(machine))
    partial.chmod(0o644)
    partial.rename(path)


def _describe(gpu: layout.Gpu, index: int, name: str, profile: Profile, mig: int) -> None:
    fixed = gpu.fixed
    major, minor = profile.compute_capability.split(".")
    serial = str(1_650_000_000_000 + uuid.uuid5(NAMESPACE, name).int % 1_000_000_000)
    for field, value in {
        "name": profile.nvml_name.encode(), "uuid": name.encode(), "vbios": profile.vbios.encode(),
        "serial": serial.encode() if profile.form != "PCIe" or profile.ecc else b"",
        "board_part_number": profile.board_part_number.encode(),
        "memory_bytes": profile.memory_mib * MIB, "memory_reserved_bytes": profile.memory_reserved_mib * MIB,
        "bar1_bytes": profile.bar1_mib * MIB, "abilities": abilities(profile),
        "architecture": ARCHITECTURES[profile.architecture], "capability_major": int(major),
        "capability_minor": int(minor), "pci_bus": BUSES[index], "pci_id": profile.pci_device_id << 16 | NVIDIA,
        "pci_subsystem": profile.pci_subsystem_id << 16 | NVIDIA, "pcie_generation": profile.pcie_generation,
        "minor": index, "power_min_mw": round(profile.power_min_w * 1000),
        "power_default_mw": round(profile.power_default_w * 1000), "power_max_mw": round(profile.power_max_w * 1000),
        "clock_sm_min_mhz": profile.clock_sm_idle_mhz, "clock_sm_max_mhz": profile.clock_sm_max_mhz,
        "clock_memory_mhz": profile.clock_memory_mhz, "clock_video_mhz": profile.clock_video_mhz,
        "nvlinks": profile.nvlinks, "mig_slices": profile.mig_slices, "mig_count": mig,
        "max_operating_c": profile.max_operating_c, "slowdown_c": profile.slowdown_c,
        "shutdown_c": profile.shutdown_c, "memory_max_c": profile.memory_max_c or 0,
    }.items():
        setattr(fixed, field, value)
    for part in range(mig):
        device = fixed.mig[part]
        device.memory_mib = profile.memory_mib // (profile.mig_slices + 1)
        device.gpu_instance, device.slices = 7 + part, 1
        device.uuid = f"MIG-{uuid.uuid5(NAMESPACE, f'{name}/{part}')}".encode()
    gpu.settings.power_limit_mw = fixed.power_default_mw


class StateFile:
    """The mapping. ``machine`` is the file: what is assigned there, readers see at once."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as stream:
            self._inode = os.fstat(stream.fileno()).st_ino
            self._map = mmap.mmap(stream.fileno(), layout.SIZE)
        self.path = path
        self.machine = layout.Machine.from_buffer(self._map)
        for gpu in self.machine.gpus:
            if gpu.sequence % 2:  # of a silicon that died in the middle of a tick
                gpu.sequence += 1

    @property
    def is_current(self) -> bool:
        """Whether the file still is the one at its path."""
        try:
            return self.path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def boot(self) -> None:
        """What a boot does: no driver is loaded, and all that was set is as the board has it."""
        machine = self.machine
        machine.module_version = machine.requested_version = b""
        machine.answered = machine.request
        machine.fabric_state = FABRIC_NOT_STARTED
        for gpu in machine.gpus[:machine.gpu_count]:
            settings = gpu.settings
            settings.persistence = settings.locked_min_mhz = settings.locked_max_mhz = 0
            settings.power_limit_mw = gpu.fixed.power_default_mw
        machine.boots += 1

    def publish(self, index: int, now: layout.Now) -> None:
        """Replaces what a GPU does now, under its sequence."""
        gpu = self.machine.gpus[index]
        gpu.sequence += 1
        ctypes.memmove(ctypes.addressof(gpu) + layout.Gpu.now.offset, ctypes.addressof(now), ctypes.sizeof(now))
        gpu.sequence += 1

    def happened(self, index: int, xid: int) -> None:
        """Adds an XID to what event sets will tell."""
        machine = self.machine
        number = machine.event_count + 1
        event = machine.events[(number - 1) % layout.EVENTS]
        event.gpu, event.xid, event.time_us, event.number = index, xid, time.time_ns() // 1000, number
        machine.event_count = number

    def close(self) -> None:
        self.machine = layout.Machine()
        self._map.close()

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
