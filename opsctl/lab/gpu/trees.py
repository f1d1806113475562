"""The files of a machine's GPUs: what the kernel and the driver show of them in /sys and /proc.

Below ``<machine's folder>/gpu/machine/``, which the machine sees at /run/opsctl-lab; the silicon binds the parts to
their places at each boot.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opsctl.lab.commands import run
from opsctl.lab.gpu.profiles import Gpus, Profile, named
from opsctl.lab.gpu.state_file import BUSES, NVIDIA, SWITCH_BUSES
from opsctl.lab.mounts import mounts
from opsctl.lab.processes import Process

INSIDE = "/run/opsctl-lab"
# folder below INSIDE -> where the machine expects it
BOUND = {"proc": "/proc/driver", "pci": "/sys/bus/pci/devices"}
CLASS_3D, CLASS_VGA, CLASS_BRIDGE = 0x030200, 0x030000, 0x068000


def folder(place: Path) -> Path:
    """Everything about a machine's GPUs; ``place`` is the machine's folder."""
    return place / "gpu"


def shared(place: Path) -> Path:
    """What the machine sees of it."""
    return folder(place) / "machine"


def state_path(place: Path) -> Path:
    return shared(place) / "proc/nvidia/lab-state"


def faults_path(place: Path) -> Path:
    return folder(place) / "faults.json"


@dataclass(frozen=True)
class PciDevice:
    """A function on a bus of its own."""

    bus: int
    device_id: int
    subsystem_id: int
    class_code: int

    @property
    def name(self) -> str:
        return f"0000:{self.bus:02x}:00.0"


def pci_devices(gpus: Gpus) -> Iterator[PciDevice]:
    """GPUs, and the NVSwitches of a board that has them. Graphics cards are VGA controllers, the others 3D ones."""
    profile = named(gpus.model)
    kind = CLASS_VGA if "GeForce" in profile.nvml_name else CLASS_3D
    for bus in BUSES[:gpus.count]:
        yield PciDevice(bus, profile.pci_device_id, profile.pci_subsystem_id, kind)
    for bus in SWITCH_BUSES[:profile.nvswitches]:
        yield PciDevice(bus, profile.nvswitch_device_id, profile.pci_subsystem_id, CLASS_BRIDGE)


def configuration_space(device: PciDevice) -> bytes:
    """The first 64 bytes, which lspci reads for what is not in a file of its own."""
    space = bytearray(64)
    space[0:4] = NVIDIA.to_bytes(2, "little") + device.device_id.to_bytes(2, "little")
    space[8:12] = b"\xa1" + device.class_code.to_bytes(3, "little")  # revision, class
    space[0x2C:0x30] = NVIDIA.to_bytes(2, "little") + device.subsystem_id.to_bytes(2, "little")
    return bytes(space)


def write(place: Path, gpus: Gpus) -> None:
    """Writes the PCI devices and the empty folder of the driver; what is there of an earlier call stays."""
    pci = shared(place) / "pci"
    if not pci.is_dir():
        partial = pci.with_name("pci.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for device in pci_devices(gpus):
            _write_device(partial / device.name, device)
        partial.rename(pci)
    state_path(place).parent.mkdir(parents=True, exist_ok=True)


def _write_device(directory: Path, device: PciDevice) -> None:
    directory.mkdir(parents=True)
    for name, text in {
        "vendor": f"0x{NVIDIA:04x}", "device": f"0x{device.device_id:04x}", "class": f"0x{device.class_code:06x}",
        "subsystem_vendor": f"0x{NVIDIA:04x}", "subsystem_device": f"0x{device.subsystem_id:04x}",
        "revision": "0xa1", "irq": "0", "numa_node": "-1", "enable": "1",
        "resource": "\n".join(["0x0000000000000000 0x0000000000000000 0x0000000000000000"] * 7),
        "modalias": f"pci:v{NVIDIA:08X}d{device.device_id:08X}sv{NVIDIA:08X}sd{device.subsystem_id:08X}"
                    "bc{:02X}sc{:02X}i{:02X}".format(*device.class_code.to_bytes(3, "big")),
        "uevent": f"PCI_CLASS={device.class_code:X}\nPCI_ID={NVIDIA:04X}:{device.device_id:04X}\n"
                  f"PCI_SUBSYS_ID={NVIDIA:04X}:{device.subsystem_id:04X}\nPCI_SLOT_NAME={device.name}",
    }.items():
        (directory / name).write_text(text + "\n")
    (directory / "config").write_bytes(configuration_space(device))


def version_text(version: str, flavour: str) -> str:
    """/proc/driver/nvidia/version, as the two kinds of module write it."""
    kind = (f"NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (opsctl-lab)"
            if flavour == "open" else f"NVIDIA UNIX x86_64 Kernel Module  {version}  (opsctl-lab)")
    return f"NVRM version: {kind}\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14+deb12u1)\n"


def show_module(place: Path, version: str, flavour: str, profile: Profile, uuids: Sequence[str]) -> None:
    """What a loaded driver shows in /proc/driver/nvidia."""
    root = state_path(place).parent
    for index, uuid in enumerate(uuids):
        directory = root / "gpus" / f"0000:{BUSES[index]:02x}:00.0"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "information").write_text(
            f"Model: \t\t {profile.nvml_name}\nIRQ:   \t\t 0\nGPU UUID: \t {uuid}\nVideo BIOS: \t {profile.vbios}\n"
            f"Bus Type: \t PCIe\nBus Location: \t {directory.name}\nDevice Minor: \t {index}\n"
            f"GPU Firmware: \t {version}\n")
    (root / "params").write_text("ModifyDeviceFiles: 1\nDeviceFileUID: 0\nDeviceFileGID: 0\nDeviceFileMode: 438\n")
    (root / "version").write_text(version_text(version, flavour))


def hide_module(place: Path) -> None:
    """The driver is not loaded: only the shared state stays, for nvidia-modprobe to ask through."""
    root = state_path(place).parent
    for name in ("version", "params"):
        (root / name).unlink(missing_ok=True)
    if (root / "gpus").is_dir():
        shutil.rmtree(root / "gpus")


def bound(init: Process) -> bool:
    """Whether a machine already has everything in its place."""
    points = {str(seen.point) for seen in mounts(init.pid)}
    return points.issuperset(BOUND.values())


def bind(init: Process) -> None:
    """Puts the trees into their places in a running machine; no other process sees those mounts.

    Raises:
        CommandError: a mount failed.
    """
    for name, target in BOUND.items():
        if target not in {str(seen.point) for seen in mounts(init.pid)}:
            run(["nsenter", f"--target={init.pid}", "--mount", "--", "mount", "--bind", f"{INSIDE}/{name}", target])
