"""What an operator breaks on a machine's GPUs: a file beside its disk, written by ``opsctl lab fault``, read by the
silicon. Faults are the hardware's: they last through reboots and power cuts until they are cleared.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opsctl.agent.durable import write_atomically
from opsctl.errors import UsageError

KINDS = ("cooling", "xid", "nvml-hang", "lost", "clear")
FACTORS = (0.1, 20.0)
TAUS_S = (1.0, 600.0)
LONGEST_HANG_S = 3600.0
XIDS_KEPT = 20
UNKNOWN_XID = "an error that the lab has no words for."
# What the driver writes after the number. Source: docs.nvidia.com/deploy/xid-errors and kernel logs in public issues.
XID_WORDS = {
    13: "Graphics Exception: ESR 0x505648=0x1000e 0x505650=0x20 0x505644=0xd3eff2 0x50564c=0x17f",
    31: "Ch 00000008, intr 00000000. MMU Fault: ENGINE GRAPHICS GPCCLIENT_T1_0 faulted @ 0x7f3c_00000000.",
    43: "Ch 00000008, engmask 00000101, intr 10000000",
    48: "An uncorrectable double bit error (DBE) has been detected on GPU in the framebuffer.",
    62: "Internal micro-controller halt (newer drivers)",
    63: "Row Remapper: New row marked for remapping, reset gpu to activate.",
    64: "Row Remapper: Failed to remap a row.",
    74: "NVLink: fatal error detected on link 3(0x10000, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0)",
    79: "GPU has fallen off the bus.",
    92: "High single-bit ECC error rate",
    94: "Contained: CE User Channel (0x9). RST: No, D-RST: No",
    95: "Uncontained: LTC TAG (0x2,0x0). RST: Yes, D-RST: No",
    119: "Timeout after 45s of waiting for RPC response from GPU GSP! Expected function 76 (GSP_RM_CONTROL).",
    120: "GSP task timeout @ pc:0x4bd3c0c, partition:0, task: 3",
}


@dataclass(frozen=True)
class Xid:
    """``number`` counts a machine's XIDs from 1, so that each happens once and a repeat is another."""

    number: int
    gpu: int
    xid: int


@dataclass(frozen=True)
class Faults:
    """``cooling``: by GPU, the factor on its thermal resistance. ``tau_s``: by GPU, another time constant of its core.
    ``hang_until_ns``: by GPU, on the monotonic clock.
    """

    cooling: dict[int, float] = field(default_factory=dict)
    hang_until_ns: dict[int, int] = field(default_factory=dict)
    lost: tuple[int, ...] = ()
    xids: tuple[Xid, ...] = ()
    xid_count: int = 0
    tau_s: dict[int, float] = field(default_factory=dict)


def chosen(gpu: int | None, count: int, host: str) -> tuple[int, ...]:
    """The GPUs meant: one, or all of them.

    Raises:
        UsageError: the machine has none, or none of that number.
    """
    if not count:
        raise UsageError("lab.no_gpus", f"{host} has no simulated GPUs.",
                         hint="opsctl lab up --gpus 8xH200 makes a lab whose GPU hosts have them")
    if gpu is None:
        return tuple(range(count))
    if not 0 <= gpu < count:
        raise UsageError("lab.no_such_gpu_index", f"{host} has no GPU {gpu}.", hint=f"its GPUs: 0 to {count - 1}")
    return (gpu,)


def cool(faults: Faults, gpus: Iterable[int], factor: float, tau_s: float | None = None) -> Faults:
    """Cooling worse by a factor; 1 mends it. ``tau_s``: how fast it shows, until it is mended; None: as it was.

    Raises:
        UsageError: no sensible factor or time.
    """
    if tau_s is not None and not TAUS_S[0] <= tau_s <= TAUS_S[1]:
        raise UsageError("lab.cooling_tau", f"a time constant of {tau_s:g} s makes no sense.",
                         hint=f"{TAUS_S[0]:g} to {TAUS_S[1]:g} s; the GPUs of the lab have 20 s")
    if not FACTORS[0] <= factor <= FACTORS[1]:
        raise UsageError("lab.cooling_factor", f"a cooling factor of {factor:g} makes no sense.",
                         hint=f"{FACTORS[0]:g} to {FACTORS[1]:g}; 1.33 is a weak fan, 2 a dead one, 1 is as built")
    changed = {**faults.cooling, **dict.fromkeys(gpus, factor)}
    taus = {**faults.tau_s, **({} if tau_s is None else dict.fromkeys(gpus, tau_s))}
    cooling = {gpu: value for gpu, value in changed.items() if value != 1}
    return replace(faults, cooling=cooling, tau_s={gpu: value for gpu, value in taus.items() if gpu in cooling})


def hang(faults: Faults, gpus: Iterable[int], seconds: float, now_ns: int) -> Faults:
    """NVML calls block from now on, for that long.

    Raises:
        UsageError: no sensible time.
    """
    if not 0 < seconds <= LONGEST_HANG_S:
        raise UsageError("lab.hang_time", f"NVML cannot hang for {seconds:g} s.", hint="like 60s or 5m, at most 1h")
    until = now_ns + round(seconds * 1e9)
    return replace(faults, hang_until_ns={**faults.hang_until_ns, **dict.fromkeys(gpus, until)})


def lose(faults: Faults, gpus: Iterable[int]) -> Faults:
    """GPUs fall off the bus, each with its XID 79."""
    new = tuple(gpu for gpu in gpus if gpu not in faults.lost)
    return happen(replace(faults, lost=tuple(sorted({*faults.lost, *new}))), new, 79)


def happen(faults: Faults, gpus: Iterable[int], xid: int) -> Faults:
    """An XID, once on each GPU; the same again is another one.

    Raises:
        UsageError: no number of an XID.
    """
    if not 1 <= xid <= 999:
        raise UsageError("lab.xid", f"{xid} is no XID.", hint="for instance 79 (off the bus), 48 (ECC), 119 (GSP)")
    for gpu in gpus:
        number = faults.xid_count + 1
        faults = replace(faults, xid_count=number, xids=(*faults.xids, Xid(number, gpu, xid))[-XIDS_KEPT:])
    return faults


def clear(faults: Faults) -> Faults:
    """Everything mended; what has happened stays counted."""
    return Faults(xid_count=faults.xid_count)


def words(faults: Faults, now_ns: int) -> tuple[str, ...]:
    """What is broken now, in short words for a table."""
    said = [f"cooling x{factor:g} on GPU {gpu}{f' within {faults.tau_s[gpu]:g} s' if gpu in faults.tau_s else ''}"
            for gpu, factor in sorted(faults.cooling.items())]
    said += [f"NVML of GPU {gpu} hangs for {(until - now_ns) / 1e9:.0f} s more"
             for gpu, until in sorted(faults.hang_until_ns.items()) if until > now_ns]
    said += [f"GPU {gpu} lost" for gpu in faults.lost]
    return (*said, *(f"XID {entry.xid} on GPU {entry.gpu}" for entry in faults.xids if entry.gpu not in faults.lost))


def kernel_line(pci_bus: int, xid: int) -> str:
    """The driver's line in the kernel's log."""
    words = XID_WORDS.get(xid, UNKNOWN_XID)
    return f"NVRM: Xid (PCI:0000:{pci_bus:02x}:00): {xid}, pid='<unknown>', name=<unknown>, {words}"


def encode(faults: Faults) -> dict[str, Any]:
    return {"schema": "opsctl.lab-faults/v1", **dataclasses.asdict(faults)}


def decode(document: dict[str, Any]) -> Faults:
    return Faults(
        cooling={int(gpu): float(factor) for gpu, factor in document["cooling"].items()},
        hang_until_ns={int(gpu): int(until) for gpu, until in document["hang_until_ns"].items()},
        tau_s={int(gpu): float(value) for gpu, value in document.get("tau_s", {}).items()},
        lost=tuple(document["lost"]), xid_count=document["xid_count"],
        xids=tuple(Xid(**entry) for entry in document["xids"]))


def load(path: Path) -> Faults:
    """A machine's faults; none where there is no file."""
    try:
        return decode(json.loads(path.read_text()))
    except FileNotFoundError:
        return Faults()


def save(path: Path, faults: Faults) -> None:
    write_atomically(path, json.dumps(encode(faults), indent=2) + "\n")


def monotonic_ns() -> int:
    """The clock that hangs are counted on: one for all machines of this computer."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)
