"""The state that the silicon and every process with the library of one machine share: one file, mapped by all.

This is its only description: the silicon uses these structures, and ``header()`` writes them as C for the library.
Who writes what: the silicon everything but ``Settings`` (the library's setters) and the request of ``Machine`` (the
lab's nvidia-modprobe). ``Now`` changes at each tick and is read under its sequence, which is odd while it is written;
what else changes is one aligned word at a time.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_int32, c_uint32, c_uint64
from typing import Any

MAGIC = 0x4F50534C  # "OPSL"
VERSION = 1
GPUS = 16
SWITCHES = 6
EVENTS = 64
PROCESSES = 16
MIG_DEVICES = 7
TEXT = 96

# Abilities of a GPU, one bit each.
ABILITIES = {name: 1 << bit for bit, name in enumerate(
    ("t_limit", "memory_sensor", "gpm", "mig", "ecc", "row_remap", "fan", "fabric", "nvlink"))}


class Event(ctypes.Structure):
    """An XID; ``number`` counts from 1 and is written last."""

    _fields_ = [("number", c_uint64), ("time_us", c_uint64), ("gpu", c_uint32), ("xid", c_uint32)]


class Process(ctypes.Structure):
    """A process that computes on a GPU; ``pid`` as the machine knows it."""

    _fields_ = [("memory_bytes", c_uint64), ("pid", c_uint32), ("utilization_percent", c_uint32)]


class Mig(ctypes.Structure):
    """A MIG device: a compute instance that has all of its GPU instance."""

    _fields_ = [("memory_mib", c_uint64), ("gpu_instance", c_uint32), ("compute_instance", c_uint32),
                ("slices", c_uint32), ("reserved", c_uint32), ("uuid", c_char * TEXT)]


class Fixed(ctypes.Structure):
    """What a GPU is; changes never while the machine runs. Limits in milliwatts, clocks in MHz, degrees Celsius."""

    _fields_ = [
        ("name", c_char * TEXT), ("uuid", c_char * TEXT), ("serial", c_char * TEXT), ("vbios", c_char * TEXT),
        ("board_part_number", c_char * TEXT),
        ("memory_bytes", c_uint64), ("memory_reserved_bytes", c_uint64), ("bar1_bytes", c_uint64),
        ("abilities", c_uint32), ("architecture", c_uint32), ("capability_major", c_uint32),
        ("capability_minor", c_uint32), ("pci_domain", c_uint32), ("pci_bus", c_uint32), ("pci_device", c_uint32),
        ("pci_id", c_uint32), ("pci_subsystem", c_uint32), ("pcie_generation", c_uint32), ("minor", c_uint32),
        ("power_min_mw", c_uint32), ("power_default_mw", c_uint32), ("power_max_mw", c_uint32),
        ("clock_sm_min_mhz", c_uint32), ("clock_sm_max_mhz", c_uint32), ("clock_memory_mhz", c_uint32),
        ("clock_video_mhz", c_uint32), ("nvlinks", c_uint32), ("mig_slices", c_uint32), ("mig_count", c_uint32),
        ("max_operating_c", c_int32), ("slowdown_c", c_int32), ("shutdown_c", c_int32), ("memory_max_c", c_int32),
        ("reserved", c_uint32), ("mig", Mig * MIG_DEVICES),
    ]


class Settings(ctypes.Structure):
    """What root sets; lost at boot. A locked clock of 0: none."""

    _fields_ = [("persistence", c_uint32), ("power_limit_mw", c_uint32), ("locked_min_mhz", c_uint32),
                ("locked_max_mhz", c_uint32)]


class Now(ctypes.Structure):
    """What a GPU does at this moment."""

    _fields_ = [
        ("time_us", c_uint64), ("energy_mj", c_uint64), ("reasons", c_uint64), ("memory_used_bytes", c_uint64),
        ("busy_ns", c_uint64), ("memory_busy_ns", c_uint64),
        ("power_cap_ns", c_uint64), ("sw_thermal_ns", c_uint64), ("hw_thermal_ns", c_uint64), ("brake_ns", c_uint64),
        ("sync_boost_ns", c_uint64),
        ("nvlink_tx_kib", c_uint64), ("nvlink_rx_kib", c_uint64), ("pcie_tx_bytes", c_uint64),
        ("pcie_rx_bytes", c_uint64),
        ("ecc_single", c_uint64), ("ecc_double", c_uint64),
        ("temperature_c", c_int32), ("memory_temperature_c", c_int32), ("margin_c", c_int32),
        ("power_mw", c_uint32), ("power_mean_mw", c_uint32), ("clock_sm_mhz", c_uint32), ("clock_memory_mhz", c_uint32),
        ("clock_video_mhz", c_uint32), ("utilization_percent", c_uint32), ("memory_utilization_percent", c_uint32),
        ("performance_state", c_uint32), ("pcie_replays", c_uint32), ("remapped_correctable", c_uint32),
        ("remapped_uncorrectable", c_uint32), ("remapping_pending", c_uint32), ("remapping_failed", c_uint32),
        ("fan_percent", c_uint32), ("process_count", c_uint32), ("processes", Process * PROCESSES),
    ]


class Gpu(ctypes.Structure):
    """One GPU. ``hang_until_ns`` is on the monotonic clock; ``recovery_action`` as NVML's field 230."""

    _fields_ = [("fixed", Fixed), ("settings", Settings), ("hang_until_ns", c_uint64), ("lost", c_uint32),
                ("recovery_action", c_uint32), ("sequence", c_uint32), ("reserved", c_uint32), ("now", Now)]


class Machine(ctypes.Structure):
    """The whole file. ``module_version`` is empty while no driver is loaded; ``beat_ns`` is the silicon's last tick."""

    _fields_ = [
        ("magic", c_uint32), ("version", c_uint32), ("gpu_count", c_uint32), ("fabric_state", c_uint32),
        ("boots", c_uint64), ("beat_ns", c_uint64), ("hang_until_ns", c_uint64),
        ("requested_version", c_char * TEXT), ("module_version", c_char * TEXT),
        ("request", c_uint32), ("answered", c_uint32),
        ("event_count", c_uint64), ("events", Event * EVENTS), ("gpus", Gpu * GPUS),
    ]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (Event, Process, Mig, Fixed, Settings, Now, Gpu, Machine)
C_NAMES: dict[Any, str] = {c_char: "char", c_int32: "int32_t", c_uint32: "uint32_t", c_uint64: "uint64_t"}
SIZE = ctypes.sizeof(Machine)


def header() -> str:
    """layout.h: the same structures in C, with their sizes checked by the compiler."""
    lines = ["/* Written by opsctl/lab/gpu/layout.py; not to be edited. */", "#pragma once", "#include <stdint.h>", ""]
    lines += [f"#define LAB_{name} {value}" for name, value in (
        ("MAGIC", hex(MAGIC)), ("VERSION", VERSION), ("GPUS", GPUS), ("EVENTS", EVENTS), ("PROCESSES", PROCESSES),
        ("MIG_DEVICES", MIG_DEVICES), ("TEXT", TEXT))]
    lines += [f"#define CAN_{name.upper()} {hex(bit)}u" for name, bit in ABILITIES.items()]
    for structure in STRUCTURES:
        lines += ["", f"struct lab_{structure.__name__.lower()} {{"]
        lines += [f"    {_declaration(field[0], field[1])};" for field in structure._fields_]
        lines += ["};", f"_Static_assert(sizeof(struct lab_{structure.__name__.lower()}) == "
                        f"{ctypes.sizeof(structure)}, \"{structure.__name__}\");"]
    return "\n".join(lines) + "\n"


def _declaration(name: str, kind: Any) -> str:
    suffix = ""
    if issubclass(kind, ctypes.Array):
        kind, suffix = kind._type_, f"[{kind._length_}]"
    written = C_NAMES.get(kind) or f"struct lab_{kind.__name__.lower()}"
    return f"{written} {name}{suffix}"
