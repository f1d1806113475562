#!/usr/bin/python3
"""nv-fabricmanager of opsctl's lab: serves one driver version exactly, and refuses every other, as the real one does.

Words of the refusal: github.com/NVIDIA/gpu-driver-container, issue 735.
"""

import os
import re
import signal
import socket
import sys
from pathlib import Path

VERSION = "@UPSTREAM@"
LOADED = Path("/proc/driver/nvidia/version")


def loaded_version(text: str) -> str:
    """The driver's version in /proc/driver/nvidia/version; empty when there is none."""
    found = re.search(r"^NVRM version:.*?\b(\d+\.\d+(?:\.\d+)?)\b", text, re.MULTILINE)
    return found[1] if found else ""


def refusal(loaded: str, own: str) -> str:
    """Why the fabric manager cannot run with the driver that is loaded; empty when it can."""
    if not loaded:
        return "fabric manager found no NVIDIA driver loaded: /proc/driver/nvidia/version says nothing."
    if loaded != own:
        return (f"fabric manager NVIDIA GPU driver interface version {own} don't match with driver version {loaded}. "
                "Please update with matching NVIDIA driver package.")
    return ""


def main() -> int:
    loaded = loaded_version(LOADED.read_text(encoding="utf-8")) if LOADED.exists() else ""
    why = refusal(loaded, VERSION)
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
