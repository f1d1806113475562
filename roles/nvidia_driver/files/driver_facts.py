"""Prints as JSON what a host has of GPUs and their driver; with ``upstream`` also what its package sources have.

Arguments: where packages come from, and the names and patterns of packages that are asked for; none: no package is.
``holder`` alone: prints in words who works with dpkg, and nothing where nobody does.
Looks at /sys, /proc, dpkg and systemd, and asks no driver: there may be none yet.
"""

from __future__ import annotations

import fcntl
import fnmatch
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PCI = Path("/sys/bus/pci/devices")
NVIDIA = "0x10de"
DISPLAY, BRIDGE = "0x03", "0x0680"  # PCI classes: VGA and 3D controllers; "other bridge", which NVSwitches are
FIELDS = "${Package}\t${Version}\t${db:Status-Want}\t${db:Status-Status}\n"
LOCKS = ("/var/lib/dpkg/lock-frontend", "/var/lib/dpkg/lock")
OURS = "opsctl-"  # how the units that change packages for opsctl begin
MARK = b"OPSCTL_PROVISION="  # in the environment of what a provision runs (playbooks/vars/fleet.yml)
CHANGED = Path("/var/lib/opsctl/driver-changed")  # driver_transaction.py writes it: the boot of the last change
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
STOPPED = Path("/run/opsctl-driver.stopped")  # of a change that was killed: services that it had stopped
COMMAND = 80  # letters of a command that are shown
FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid


def pci_devices(root: Path) -> tuple[list[str], int]:
    """The device ids of NVIDIA's GPUs in PCI order, and how many NVSwitches there are."""
    gpus, switches = [], 0
    for device in sorted(root.iterdir()) if root.is_dir() else []:
        if (device / "vendor").read_text().strip() != NVIDIA:
            continue
        kind = (device / "class").read_text().strip()
        if kind.startswith(DISPLAY):
            gpus.append((device / "device").read_text().strip().removeprefix("0x"))
        switches += kind.startswith(BRIDGE)
    return gpus, switches


def packages(listed: str) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Versions by name; the states of those that are not installed whole, ``half-configured``; who is on hold."""
    installed, states, held = {}, {}, []
    for line in listed.splitlines():
        name, version, want, status = line.split("\t")
        if status in ("not-installed", "config-files"):
            continue
        installed[name] = version
        if status != "installed":
            states[name] = status
        if want == "hold":
            held.append(name)
    return installed, states, held


def loaded_version(text: str) -> str:
    """The driver's version in /proc/driver/nvidia/version; empty when there is none."""
    found = re.search(r"^NVRM version:.*?\b(\d{3,4}\.\d+(?:\.\d+)?)\b", text, re.MULTILINE)
    return found[1] if found else ""


def is_of_this_boot(changed: Path, boot_id: Path) -> bool:
    """Whether the driver's packages were changed since the machine booted: no reboot was tried with them yet."""
    return changed.exists() and changed.read_text() == boot_id.read_text()


def dpkg_holder() -> str:
    """Who works with dpkg, ``apt-get -qq update (pid 7, apt-daily.service)``; empty: nobody, or opsctl itself."""
    for lock in (name for name in LOCKS if Path(name).exists()):
        with Path(lock).open("rb") as file:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
        if kind == fcntl.F_UNLCK:
            continue
        folder = Path(f"/proc/{pid}")
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            name = " ".join(command.split())[:COMMAND] or (folder / "comm").read_text().strip()
            units = re.findall(r"[^/\n]+\.(?:service|scope)", (folder / "cgroup").read_text())
            marked = os.geteuid() == 0 and MARK in (folder / "environ").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if not marked and not any(unit.startswith(OURS) for unit in units):
            return f"{name} (pid {pid}{', ' + units[-1] if units else ''})"
    return ""


def sources_have(kernel: str, patterns: Sequence[str]) -> str:
    """The stanzas of every version of a package that may belong to a driver."""
    known = re.compile("|".join(map(fnmatch.translate, (*patterns, f"linux-headers-{kernel}"))))
    names = said(["apt-cache", "pkgnames"]).split()
    wanted = [name for name in sorted(names) if known.match(name)]
    return said(["apt-cache", "show", "--all-versions", "--", *wanted]) if wanted else ""


def said(argv: Sequence[str]) -> str:
    """What a program prints. dpkg-query's exit status says that one of several patterns fits nothing: no error."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
                          env={**os.environ, "LC_ALL": "C.UTF-8"})
    return done.stdout


def main() -> None:
    if sys.argv[1:] == ["holder"]:
        sys.stdout.write(dpkg_holder())
        return
    kernel = os.uname().release
    gpus, switches = pci_devices(PCI)
    source, *patterns = sys.argv[1:] or [""]
    asked = [*patterns, f"linux-headers-{kernel}"]
    installed, states, held = packages(said(["dpkg-query", "--show", f"--showformat={FIELDS}", "--", *asked]))
    version = Path("/proc/driver/nvidia/version")
    serving = said(["systemctl", "list-units", "--plain", "--no-legend", "--no-pager",
                    "--state=active,activating,reloading,deactivating", "inference@*.service"])
    found: dict[str, object] = {"seen": {
        "gpus": gpus, "switches": switches, "installed": installed, "states": states, "held": held,
        "loaded": loaded_version(version.read_text()) if version.exists() else "",
        "serving": [line.split()[0] for line in serving.splitlines() if line.split()],
        "dpkg": dpkg_holder(), "kernel": kernel, "headers": Path(f"/lib/modules/{kernel}/build").exists()},
        "changed_in_this_boot": is_of_this_boot(CHANGED, BOOT_ID),
        "stopped": STOPPED.exists()}
    if source == "upstream":
        found["index_text"] = sources_have(kernel, patterns)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
