#!/usr/bin/python3
"""nvidia-persistenced of opsctl's lab: keeps the devices open and persistence mode on for as long as it runs."""

import ctypes
import os
import re
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

VERSION = "@UPSTREAM@"
NOT_THERE = ("Failed to query NVIDIA devices. Please ensure that the NVIDIA device files (/dev/nvidia*) exist, and "
             "that user 0 has read and write permissions for those files.")
ENABLED, DISABLED = 1, 0


def device_nodes(directory: Path) -> list[Path]:
    """Those of the GPUs, in the order of their numbers; nvidiactl and nvidia-uvm are none."""
    return sorted((node for node in directory.iterdir() if re.fullmatch(r"nvidia\d+", node.name)),
                  key=lambda node: int(node.name.removeprefix("nvidia")))


def set_persistence(mode: int) -> str:
    """Sets it on every GPU through NVML; returns what went wrong, or nothing."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        return str(error)
    status = nvml.nvmlInit_v2()
    if status:
        return f"nvmlInit answers {status}"
    count = ctypes.c_uint()
    status = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    refused = []
    for index in range(count.value):
        device = ctypes.c_void_p()
        status = (nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
                  or nvml.nvmlDeviceSetPersistenceMode(device, mode))
        if status:
            refused.append(f"GPU {index} answers {status}")
    nvml.nvmlShutdown()
    return ", ".join(refused)


def main() -> int:
    ended = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    with ExitStack() as opened:
        nodes = device_nodes(Path("/dev"))
        if not nodes:
            sys.stderr.write(NOT_THERE + "\n")
            return 1
        for node in (Path("/dev/nvidiactl"), *nodes):
            opened.enter_context(node.open("rb"))
        why = set_persistence(ENABLED)
        sys.stderr.write(f"Started ({os.getpid()}), version {VERSION}, {len(nodes)} GPUs"
                         f"{'; persistence mode is not set: ' + why if why else ''}\n")
        tell_systemd("READY=1")
        signal.sigwait(ended)
        set_persistence(DISABLED)
    return 0


def tell_systemd(words: str) -> None:
    """sd_notify(3); nothing when systemd did not start this program."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(words.encode(), "\0" + address[1:] if address.startswith("@") else address)


if __name__ == "__main__":
    sys.exit(main())
