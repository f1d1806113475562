#!/usr/bin/python3
"""nv-fabricmanager of opsctl's lab: for boards with NVSwitches, and for one driver version exactly, as the real one.

Words of its refusals: github.com/NVIDIA/gpu-driver-container, issue 735; NVIDIA/gpu-operator, issue 610.
"""

import os
import re
import signal
import socket
import sys
from pathlib import Path

VERSION = "@UPSTREAM@"
LOADED = Path("/proc/driver/nvidia/version")
DEVICES = Path("/sys/bus/pci/devices")
NVIDIA, BRIDGE = "0x10de", "0x0680"  # PCI vendor, and the class of an NVSwitch


def loaded_version(text: str) -> str:
    """The driver's version in /proc/driver/nvidia/version; empty when there is none."""
    found = re.search(r"^NVRM version:.*?\b(\d+\.\d+(?:\.\d+)?)\b", text, re.MULTILINE)
    return found[1] if found else ""


def switches(devices: Path) -> int:
    """How many NVSwitches are among the PCI devices of a /sys/bus/pci/devices."""
    found = ((device / "vendor", device / "class") for device in devices.iterdir())
    return sum(vendor.read_text().strip() == NVIDIA and kind.read_text().startswith(BRIDGE) for vendor, kind in found)


def refusal(loaded: str, own: str, nvswitches: int) -> str:
    """Why the fabric manager cannot run with the driver that is loaded; empty when it can."""
    if not loaded:
        return "fabric manager found no NVIDIA driver loaded: /proc/driver/nvidia/version says nothing."
    if loaded != own:
        return (f"fabric manager NVIDIA GPU driver interface version {own} don't match with driver version {loaded}. "
                "Please update with matching NVIDIA driver package.")
    if not nvswitches:
        return ("request to query NVSwitch device information from NVSwitch driver failed with error:"
                "WARNING Nothing to do [NV_WARN_NOTHING_TO_DO]")
    return ""


def main() -> int:
    loaded = loaded_version(LOADED.read_text(encoding="utf-8")) if LOADED.exists() else ""
    why = refusal(loaded, VERSION, switches(DEVICES))
    if why:
        sys.stderr.write(why + "\n")
        return 1
    ended = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    sys.stderr.write(f"Fabric Manager {VERSION} serves driver version {loaded}\n")
    tell_systemd("READY=1")
    signal.sigwait(ended)
    return 0


def tell_systemd(words: str) -> None:
    """sd_notify(3); nothing when systemd did not start this program."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(words.encode(), "\0" + address[1:] if address.startswith("@") else address)


if __name__ == "__main__":
    sys.exit(main())
