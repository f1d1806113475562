#!/usr/bin/python3
"""Brings a host's driver to what opsctl worked out: apt, holds, the module. Runs as opsctl-driver.service.

One argument, JSON: ``transactions`` (``what``, ``install``, ``remove``), ``hold``, and ``load``, the version that the
kernel is to have. Each transaction is simulated first, and is not begun when apt would do more than it was asked for.
Every step can be done again, so a run that was cut off is finished by the next one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

APT = ("apt-get", "-y", "-q", "--no-install-recommends", "--allow-downgrades", "--allow-change-held-packages",
       "-o", "APT::Get::Purge=false", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Options::=--force-confdef",
       "-o", "Dpkg::Options::=--force-confold")
STEP = re.compile(r"^(?P<act>Inst|Remv|Purg) (?P<name>[^ :]+)(?::\S+)?", re.MULTILINE)
# What decides whether and how the machine boots: never along with a driver, unless it was named.
BOOT = re.compile(r"linux-image-|linux-modules-|linux-signed-|grub|shim-|firmware-|intel-microcode|amd64-microcode")
MODULES = ("nvidia_peermem", "nvidia_uvm", "nvidia_drm", "nvidia_modeset", "nvidia", "nouveau")
# Who holds the GPUs open, in the order in which they are stopped.
USERS = ("opsctl-agent.service", "opsctl-setter.service", "nvidia-dcgm.service", "dcgm-exporter.service",
         "nvidia-fabricmanager.service", "nvidia-persistenced.service")
LOADED = Path("/proc/driver/nvidia/version")
# In which boot the packages were last changed: the next run sees by it whether the machine was rebooted with them. Not
# fsynced, because what a power cut takes from it was of another boot in any case.
CHANGED = Path("/var/lib/opsctl/driver-changed")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
STOPPED = Path("/run/opsctl-driver.stopped")  # outlives a run that is killed, and is gone after a boot, as it should
KERNEL_MODULES = Path("/proc/modules")  # a kernel without modules, as some labs have, has no such file


def simulated(output: str) -> tuple[set[str], set[str]]:
    """What apt-get -s says it would install and remove; what it replaces by another version counts as installed."""
    found: dict[str, set[str]] = {"Inst": set(), "Remv": set(), "Purg": set()}
    for match in STEP.finditer(output):
        found[match["act"]].add(match["name"])
    return found["Inst"], (found["Remv"] | found["Purg"]) - found["Inst"]


def refusal(transaction: Mapping[str, Any], output: str) -> str:
    """Why a transaction is not begun; empty when apt would do what it was asked for."""
    installs, removes = simulated(output)
    named = {word.partition("=")[0] for word in transaction["install"]}
    beyond = sorted(removes - set(transaction["remove"]))
    if beyond:
        return f"apt would remove {', '.join(beyond)}, which is none of the driver's."
    boot = sorted(name for name in installs - named if BOOT.match(name))
    if boot:
        return f"apt would change what the machine boots with: {', '.join(boot)}."
    more = sorted(installs - named) if transaction["what"] == "pin" else []
    if more:
        return f"apt would install {', '.join(more)} along with the pin, which has to come alone."
    return ""


def together(transactions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All of them as one, which is only ever tried: a refusal of the last would leave the first done."""
    return {"what": "all", "install": [one for each in transactions for one in each["install"]],
            "remove": [one for each in transactions for one in each["remove"]]}


def packages_of(transaction: Mapping[str, Any]) -> list[str]:
    """apt's words for it: ``name=version``, and ``name-`` for what goes."""
    return [*transaction["install"], *(f"{name}-" for name in transaction["remove"])]


def loaded_modules(text: str) -> list[str]:
    """Of /proc/modules those that must go before another driver can come, in the order in which they can."""
    there = {line.split()[0] for line in text.splitlines() if line.split()}
    return [name for name in MODULES if name in there]


def is_loaded(version: str) -> bool:
    text = LOADED.read_text() if LOADED.exists() else ""
    return re.search(rf"^NVRM version:.* {re.escape(version)} ", text, re.MULTILINE) is not None


def reload_module(version: str) -> None:
    """Puts the module on disk in place of the one in the kernel. One that is in use stays: then it takes a reboot.

    Leaves the services that hold the GPUs stopped, and their names in ``STOPPED``.
    """
    active = [unit for unit in USERS if run(["systemctl", "is-active", "--quiet", unit], may_fail=True) == 0]
    STOPPED.write_text("".join(f"{unit}\n" for unit in dict.fromkeys([*stopped(), *active])))
    for unit in active:
        run(["systemctl", "stop", unit], may_fail=True)  # one that stays makes it a reboot
    old = loaded_modules(KERNEL_MODULES.read_text() if KERNEL_MODULES.exists() else "")
    if old:
        unloaded = run(["modprobe", "-r", *old], may_fail=True) == 0
    else:  # a driver that is no module of this kernel is a lab's, and its own tool takes it away
        unloaded = not LOADED.exists() or run(["nvidia-modprobe", "-r"], may_fail=True) == 0
    if unloaded:
        run(["nvidia-modprobe"], may_fail=True)
    if not is_loaded(version):
        say(f"the kernel does not have {version} yet: it takes a reboot")


def stopped() -> list[str]:
    """What this run or one that was killed has stopped, in the order of ``USERS``."""
    listed = STOPPED.read_text().split() if STOPPED.exists() else []
    return [unit for unit in USERS if unit in listed]


def start_again() -> None:
    """Starts what was stopped, also when it takes a reboot: who reboots may be a person, later."""
    for unit in reversed(stopped()):
        run(["systemctl", "start", unit], may_fail=True)
    STOPPED.unlink(missing_ok=True)


def run(argv: Sequence[str], *, may_fail: bool = False) -> int:
    say("+ " + " ".join(argv))
    return subprocess.run(argv, check=not may_fail).returncode


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def tried(transaction: Mapping[str, Any], *, may_fail: bool = False) -> str:
    """Why it is not begun, after apt has simulated it; empty when it may be. ``may_fail``: apt may be unable to."""
    argv = [*APT, "install", "--", *packages_of(transaction)]
    say("+ apt-get -s: " + " ".join(packages_of(transaction)))
    done = subprocess.run([*argv[:1], "-s", *argv[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, check=False)
    if done.returncode:
        return "" if may_fail else "apt cannot do it:\n" + done.stdout
    return refusal(transaction, done.stdout)


def main() -> int:
    wanted = json.loads(sys.argv[1])
    os.environ.update({"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1", "LC_ALL": "C.UTF-8"})
    try:
        if wanted["transactions"]:
            run(["dpkg", "--configure", "-a"], may_fail=True)  # a power cut's; a module that does not build stays so
        # Only apt knows all who depend on what goes. Whether it can do both at once says nothing: the pin comes alone.
        why = tried(together(wanted["transactions"]), may_fail=True) if len(wanted["transactions"]) > 1 else ""
        if why:
            say(why)
            return 1
        for transaction in wanted["transactions"]:
            argv = [*APT, "install", "--", *packages_of(transaction)]
            why = tried(transaction)
            if why:
                say(f"{transaction['what']}: {why}")
                return 1
            CHANGED.parent.mkdir(parents=True, exist_ok=True)
            CHANGED.write_text(BOOT_ID.read_text())
            run(argv)
        if wanted["hold"]:
            run(["apt-mark", "hold", *wanted["hold"]])
        if wanted["load"] and not is_loaded(wanted["load"]):
            reload_module(wanted["load"])
    except subprocess.CalledProcessError as error:
        say(f"{error.cmd[0]} failed with exit status {error.returncode}")
        if wanted["hold"]:  # half of a driver is nobody else's business either
            run(["apt-mark", "hold", *wanted["hold"]], may_fail=True)
        return 1
    finally:
        start_again()
    return 0


if __name__ == "__main__":
    sys.exit(main())
