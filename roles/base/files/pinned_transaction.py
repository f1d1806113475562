#!/usr/bin/python3
"""Brings packages of a vendor to exact versions, in one transaction that is simulated first, and holds them.

One argument, JSON: ``install`` (``name=version``), ``remove`` and ``hold``. It is not begun when apt would touch a
driver, remove something else, or change what the machine boots with. A run that was cut off is finished by the next.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

APT = ("apt-get", "-y", "-q", "--no-install-recommends", "--allow-downgrades", "--allow-change-held-packages",
       "-o", "APT::Get::Purge=false", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Options::=--force-confdef",
       "-o", "Dpkg::Options::=--force-confold")
STEP = re.compile(r"^(?P<act>Inst|Remv|Purg) (?P<name>[^ :]+)(?::\S+)?", re.MULTILINE)
BOOT = re.compile(r"linux-image-|linux-modules-|linux-headers-|linux-signed-|grub|shim-|firmware-|intel-microcode|"
                  r"amd64-microcode")
# The driver, and the metapackages that pull it: nobody but the role nvidia_driver changes it, and cuda-compat is a
# second one beside it.
DRIVERS = re.compile(
    r"cuda(-\d+(-\d+)?)?$|cuda-(drivers|runtime|demo-suite|compat)|libcuda1$|libcudadebugger|libnvcuvid|libnvoptix|"
    r"nvidia-(?!container-)|libnvidia-(?!container)|libnvsdm|nvlsm$|xserver-xorg-video-nvidia|libxnvctrl|firmware-nvidia")


def simulated(output: str) -> tuple[set[str], set[str]]:
    """What apt-get -s says it would install and remove; what it replaces by another version counts as installed."""
    found: dict[str, set[str]] = {"Inst": set(), "Remv": set(), "Purg": set()}
    for match in STEP.finditer(output):
        found[match["act"]].add(match["name"])
    return found["Inst"], (found["Remv"] | found["Purg"]) - found["Inst"]


def refusal(asked: Mapping[str, Any], output: str) -> str:
    """Why a transaction is not begun; empty when apt would do what it was asked for."""
    installs, removes = simulated(output)
    drivers = sorted(name for name in installs | removes if DRIVERS.match(name))
    if drivers:
        return f"apt would touch the driver: {', '.join(drivers)}."
    beyond = sorted(removes - set(asked["remove"]))
    if beyond:
        return f"apt would remove {', '.join(beyond)}, which nobody asked for."
    boot = sorted(name for name in installs if BOOT.match(name))
    if boot:
        return f"apt would change what the machine boots with: {', '.join(boot)}."
    return ""


def packages_of(asked: Mapping[str, Any]) -> list[str]:
    """apt's words for it: ``name=version``, and ``name-`` for what goes."""
    return [*asked["install"], *(f"{name}-" for name in asked["remove"])]


def run(argv: Sequence[str], *, may_fail: bool = False) -> None:
    say("+ " + " ".join(argv))
    subprocess.run(argv, check=not may_fail)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    asked = json.loads(sys.argv[1])
    os.environ.update({"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1", "LC_ALL": "C.UTF-8"})
    try:
        if packages_of(asked):
            argv = [*APT, "install", "--", *packages_of(asked)]
            run(["dpkg", "--configure", "-a"], may_fail=True)  # a power cut's; somebody else's may stay so
            say("+ apt-get -s install " + " ".join(packages_of(asked)))
            done = subprocess.run([*argv[:1], "-s", *argv[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  text=True, check=False)
            why = refusal(asked, done.stdout) if done.returncode == 0 else "apt cannot do it:\n" + done.stdout
            if why:
                say(why)
                return 1
            run(argv)
        if asked["hold"]:
            run(["apt-mark", "hold", *asked["hold"]])
    except subprocess.CalledProcessError as error:
        say(f"{error.cmd[0]} failed with exit status {error.returncode}")
        if asked["hold"]:  # apt took the holds off as it began, and half of a set is nobody else's business either
            run(["apt-mark", "hold", *asked["hold"]], may_fail=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
