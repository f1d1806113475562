#!/usr/bin/python3
"""Keeps the packages of the driver that a host has, and brings them back without asking anybody. Runs on the host.

``look``                 what is installed, loaded and kept, and which change is under way; touches nothing
``keep``                 copies of every .deb of the installed driver, and of its pin; fails where one cannot be had
``begin {run, to, ...}`` from here on a change is under way: it ends with ``done``, or with ``restore`` and ``done``
``restore``              the kept packages again, offline; the module too, where it can be changed without a reboot
``verify VERSION``       whether every layer of the driver has that version; and what an old kernel lacks
``rotation {...}``       what is out of the rotation in load balancers, and whether by the run or by hand
``mark PHASE``, ``done`` how far the change is; it is over
``leave``                a unit that runs ``continue`` at the next boot
``continue``             what a host can do alone after a boot: accept, or restore and accept

Answers are JSON on stdout, words are on stderr. Every step can be done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

HOME = Path("/var/lib/opsctl/driver")
KEPT = HOME / "kept"
LIST = "list.json"
CHANGE = HOME / "change.json"
ROTATION = HOME / "rotation.json"
CHANGED = Path("/var/lib/opsctl/driver-changed")
RECORD = Path("/etc/opsctl/driver.json")
ARCHIVES = Path("/var/cache/apt/archives")
SUMS = Path("/var/lib/dpkg/info")
LOADED = Path("/proc/driver/nvidia/version")
KERNEL_MODULES = Path("/proc/modules")  # a kernel without modules, as some labs have, has no such file
LAB_MODULE = Path("/lib/modules/lab/nvidia.version")  # a machine of a lab has no kernel module to ask
BOOT = Path("/boot")
BOOTS_NEXT = (Path("/vmlinuz"), BOOT / "vmlinuz")  # links to the kernel that the boot loader takes
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
HOST_PROGRAM = "/opt/opsctl/agent/bin/opsctl-host"
PATTERNS = ("*nvidia*", "libcuda1", "libcudadebugger*", "cuda-drivers*", "libnvcuvid*", "libnvoptix*", "libnvsdm*",
            "libxnvctrl*")
PIN = "nvidia-driver-pinning-"
DRIVER = re.compile(r"(?:\d+:)?(?P<driver>\d{3,4}\.\d{1,3}(?:\.\d{1,3})?)(?:-[A-Za-z0-9.+~]+)?")
FIELDS = "${Package}\t${Architecture}\t${Version}\t${db:Status-Want}\t${db:Status-Status}\n"
APT = ("apt-get", "-y", "-q", "--no-install-recommends", "--allow-downgrades", "--allow-change-held-packages",
       "-o", "APT::Get::Purge=false", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Options::=--force-confdef",
       "-o", "Dpkg::Options::=--force-confold")
# No source, no list of a source and no pin: what is installed is what the files bring. Not --no-download: apt then
# looks for local files in its cache, and dies of an internal error (seen on 2.6).
OFFLINE = ("-o", "Dir::Etc::sourcelist=/dev/null", "-o", "Dir::Etc::sourceparts=/dev/null",
           "-o", "Dir::State::lists=/var/lib/opsctl/driver/no-lists", "-o", "Dir::Etc::preferences=/dev/null",
           "-o", "Dir::Etc::preferencesparts=/dev/null", "-o", "Dir::Cache::pkgcache=", "-o",
           "Dir::Cache::srcpkgcache=")
STEP = re.compile(r"^(?P<act>Inst|Remv|Purg) (?P<name>[^ :]+)(?::\S+)?", re.MULTILINE)
MODULES = ("nvidia_peermem", "nvidia_uvm", "nvidia_drm", "nvidia_modeset", "nvidia", "nouveau")
# Who holds the GPUs open, in the order in which they are stopped.
USERS = ("opsctl-agent.service", "opsctl-setter.service", "nvidia-dcgm.service", "dcgm-exporter.service",
         "nvidia-fabricmanager.service", "nvidia-persistenced.service")
DAEMONS = ("nvidia-persistenced.service", "nvidia-fabricmanager.service")
UNIT = "opsctl-driver-continue.service"
UNIT_FILE = Path("/etc/systemd/system") / UNIT
UNIT_TEXT = f"""\
# Written by opsctl before this machine reboots into another driver; goes away when that is over.
[Unit]
Description=opsctl: go on with the change of the GPUs' driver
ConditionPathExists={CHANGE}
Wants=network-online.target
After=network-online.target nvidia-persistenced.service nvidia-fabricmanager.service opsctl-recover.service
After=opsctl-agent.service

[Service]
Type=oneshot
ExecStart=/usr/local/lib/opsctl/driver-keep continue
TimeoutStartSec=infinity

[Install]
WantedBy=multi-user.target
"""
OVER = ("accepted", "back")
LOAD_WAIT_S = 120.0  # for udev to load a module after a boot
STALE_S = 60.0  # of a lock, as opsctl-host has it
Package = dict[str, Any]


class SorryError(Exception):
    """One sentence for a person; nothing was done, or what was done can be done again."""


def driver_in(version: str) -> str:
    """``580.126.09`` of ``580.126.09-1+lab``; empty for what is no driver's version."""
    match = DRIVER.fullmatch(version)
    return match["driver"] if match else ""


def members(listed: str) -> list[Package]:
    """The driver's packages and its pins among dpkg's lines: what has a driver's version, or pins one."""
    found = []
    for line in listed.splitlines():
        name, architecture, version, want, status = line.split("\t")
        pin = name.startswith(PIN)
        if status in ("not-installed", "config-files") or not (pin or driver_in(version)):
            continue
        found.append({"name": name, "architecture": architecture, "version": version, "hold": want == "hold",
                      "status": status, "pin": pin})
    return found


def versions_of(packages: Sequence[Package]) -> list[str]:
    """The driver versions that packages have, pins aside."""
    return sorted({driver_in(package["version"]) for package in packages if not package["pin"]})


def word(package: Package) -> str:
    """apt's word for a package, ``libcuda1:amd64``."""
    return package["name"] if package["architecture"] == "all" else f"{package['name']}:{package['architecture']}"


def file_name(package: Package) -> str:
    return f"{package['name']}_{package['version'].replace(':', '%3a')}_{package['architecture']}.deb"


def unlike(kept: Sequence[Package], installed: Sequence[Package]) -> tuple[list[Package], list[Package]]:
    """Kept packages that are not installed as they were, and installed ones that the kept driver does not have."""
    there = {word(package): package for package in installed}
    lacking = [package for package in kept if word(package) not in there
               or there[word(package)]["version"] != package["version"]
               or there[word(package)]["status"] != "installed"]
    known = {word(package) for package in kept}
    return lacking, [package for package in installed if word(package) not in known]


def refusal(output: str, allowed: Sequence[str]) -> str:
    """Why a restore is not begun: apt would remove more than what came with the other driver."""
    acts: dict[str, set[str]] = {"Inst": set(), "Remv": set(), "Purg": set()}
    for match in STEP.finditer(output):
        acts[match["act"]].add(match["name"])
    beyond = sorted((acts["Remv"] | acts["Purg"]) - acts["Inst"] - set(allowed))
    return f"apt would remove {', '.join(beyond)}, which came with no driver" if beyond else ""


def loaded_version() -> str:
    text = LOADED.read_text() if LOADED.exists() else ""
    found = re.search(r"^NVRM version:.*?\b(\d{3,4}\.\d+(?:\.\d+)?)\b", text, re.MULTILINE)
    return found[1] if found else ""


def installed() -> list[Package]:
    return members(said(["dpkg-query", "--show", f"--showformat={FIELDS}", "--", *PATTERNS]))


def look() -> dict[str, Any]:
    packages = installed()
    return {"versions": versions_of(packages), "loaded": loaded_version(), "boot": boot_id(), "change": read_change(),
            "rotation": json.loads(ROTATION.read_text()) if ROTATION.exists() else {},
            "states": {package["name"]: package["status"] for package in packages
                       if package["status"] != "installed"},
            "kept": sorted(path.parent.name for path in KEPT.glob(f"*/{LIST}"))}


def keep() -> dict[str, Any]:
    """Copies of what is installed. While a change is under way the driver before it counts, which is kept already.

    Raises:
        SorryError: there is no whole driver, or one of its packages cannot be had.
    """
    change = read_change()
    if change and change["phase"] not in OVER:
        check_files(change["from"])
        return {"version": change["from"], "changed": False}
    packages = installed()
    versions = versions_of(packages)
    halves = [package["name"] for package in packages if package["status"] != "installed"]
    if len(versions) != 1 or halves:
        what = f"{', '.join(halves)} is installed by half" if halves else \
            f"packages of {' and '.join(versions)} are mixed" if versions else "no driver is installed"
        raise SorryError(f"there is no way back: {what}; opsctl provision brings one whole driver first")
    version = versions[0]
    if (KEPT / version / LIST).exists() and _same(version, packages):
        check_files(version)
        return {"version": version, "changed": False}
    _gather(version, packages)
    return {"version": version, "changed": True}


def _same(version: str, packages: Sequence[Package]) -> bool:
    kept = read_list(version)["packages"]
    return unlike(kept, packages) == ([], []) and [one["hold"] for one in kept] == [one["hold"] for one in packages]


def _gather(version: str, packages: Sequence[Package]) -> None:
    partial = KEPT / f".{version}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o755)
    # apt checks what it fetches against its sources' hashes
    fetch(partial, packages)
    lacking = [package for package in packages
               if not (partial / file_name(package)).exists() and not from_cache(partial, package)]
    if lacking:
        names = ", ".join(f"{package['name']} {package['version']}" for package in lacking)
        shutil.rmtree(partial)
        raise SorryError(f"there is no way back: neither the host's package sources nor apt's cache have {names}; "
                    "nvidia_driver_bundle_versions brings an old driver into the bundle")
    kept = []
    for package in packages:
        path = partial / file_name(package)
        about = said(["dpkg-deb", "--show", "--showformat=${Package} ${Architecture} ${Version}", str(path)])
        if about != f"{package['name']} {package['architecture']} {package['version']}":
            raise SorryError(f"there is no way back: {path.name} says that it is {about or 'nothing'}")
        kept.append({**{key: package[key] for key in ("name", "architecture", "version", "hold", "pin")},
                     "file": path.name, "sha256": digest(path)})
        flush(path)
    record = RECORD.read_text() if RECORD.exists() else None
    write(partial / LIST, {"version": version, "packages": kept, "record": record})
    shutil.rmtree(KEPT / version, ignore_errors=True)
    partial.rename(KEPT / version)
    flush(KEPT)


def fetch(folder: Path, packages: Sequence[Package]) -> None:
    """Has apt bring packages into a folder: all at once, or else each that it can."""
    words = [f"{word(package)}={package['version']}" for package in packages]
    if run(["apt-get", "-q", "download", *words], cwd=folder, may_fail=True) == 0:
        return
    for package, one in zip(packages, words, strict=True):
        if not (folder / file_name(package)).exists():
            run(["apt-get", "-q", "download", one], cwd=folder, may_fail=True)


def from_cache(folder: Path, package: Package) -> bool:
    """A copy out of apt's cache, if what it says of its files is what dpkg has written down of those installed."""
    path = ARCHIVES / file_name(package)
    if not path.is_file():
        return False
    sums = [SUMS / f"{name}.md5sums" for name in (f"{package['name']}:{package['architecture']}", package["name"])]
    known = next((one.read_text() for one in sums if one.exists()), None)
    inside = said(["dpkg-deb", "--info", str(path), "md5sums"])
    if known is None or sorted(inside.splitlines()) != sorted(known.splitlines()):
        return False
    shutil.copy(path, folder / path.name)
    return True


def read_list(version: str) -> dict[str, Any]:
    path = KEPT / version / LIST
    if not path.exists():
        raise SorryError(f"there is no way back: {path} is missing")
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def check_files(version: str) -> None:
    """Raises SorryError when a kept file is not what it was."""
    for package in read_list(version)["packages"]:
        path = KEPT / version / package["file"]
        if not path.exists() or digest(path) != package["sha256"]:
            raise SorryError(f"there is no way back: {path} is not what was kept")


def begin(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Writes down what is about to happen; a change that did not end is gone on with."""
    before = read_change()
    same = before if before and before["phase"] not in OVER else None  # of whichever run: the driver before it counts
    version = same["from"] if same else "".join(versions_of(installed()))
    check_files(version)
    instances = sorted({*asked["instances"], *(same["instances"] if same else [])})
    change = {"run": asked["run"], "from": version, "to": asked["to"], "instances": instances, "phase": "changing",
              "boot": boot_id(), "host": asked.get("host", "")}
    write(CHANGE, change)
    return change


def rotation(instances: Mapping[str, Any]) -> dict[str, Any]:
    """By instance ``{"ours": [...], "by_hand": [...]}``, names of load balancers; one that has neither is not kept.

    Not in the record of the change: a load balancer is told before that begins, and a run may die in between.
    """
    kept = {name: out for name, out in instances.items() if any(out.values())}
    if kept:
        write(ROTATION, kept)
    elif ROTATION.exists():
        ROTATION.unlink()
        flush(HOME)
    return kept


def restore() -> dict[str, Any]:
    """The packages before the change, from their files alone; and their holds, their record, their module."""
    change = _change()
    version = change["from"]
    kept = read_list(version)
    check_files(version)
    run(["systemctl", "stop", "inference@*.service"], may_fail=True)
    lacking, extra = unlike(kept["packages"], installed())
    if lacking or extra:
        (HOME / "no-lists/partial").mkdir(parents=True, exist_ok=True)
        run(["dpkg", "--configure", "-a"], may_fail=True)  # what was cut off; a module that does not build stays so
        files = [str(KEPT / version / package["file"]) for package in kept["packages"]]
        goes = [f"{word(package)}-" for package in extra]
        argv = [*APT, *OFFLINE, "install", "--", *files, *goes]
        done = subprocess.run([argv[0], "-s", *argv[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              check=False)
        why = refusal(done.stdout, [package["name"] for package in extra]) if done.returncode == 0 else \
            "apt cannot do it: " + " ".join(done.stdout.split()[-60:])
        if why:
            raise SorryError(f"{version} is not brought back: {why}")
        # as the role writes it: the packages were changed in this boot
        CHANGED.write_text(BOOT_ID.read_text() if BOOT_ID.exists() else "")
        run(argv)
    for words, on in (("hold", True), ("unhold", False)):
        names = [word(package) for package in kept["packages"] if package["hold"] is on]
        if names:
            run(["apt-mark", words, *names])
    if kept["record"] is not None:
        write_text(RECORD, kept["record"])
    if loaded_version() != version:
        reload_module()
    for unit in DAEMONS:
        if run(["systemctl", "is-enabled", "--quiet", unit], may_fail=True) == 0:
            run(["systemctl", "restart", unit], may_fail=True)
    mark("restored")
    return {"version": version, "loaded": loaded_version(), "changed": bool(lacking or extra)}


def reload_module() -> None:
    """Puts the module on disk in place of the one in the kernel. One that is in use stays: then it takes a reboot."""
    active = [unit for unit in USERS if run(["systemctl", "is-active", "--quiet", unit], may_fail=True) == 0]
    try:
        for unit in active:
            run(["systemctl", "stop", unit], may_fail=True)
        text = KERNEL_MODULES.read_text() if KERNEL_MODULES.exists() else ""
        there = {line.split()[0] for line in text.splitlines() if line.split()}
        old = [name for name in MODULES if name in there]
        if old:
            unloaded = run(["modprobe", "-r", *old], may_fail=True) == 0
        else:  # a driver that is no module of this kernel is a lab's, and its own tool takes it away
            unloaded = not LOADED.exists() or run(["nvidia-modprobe", "-r"], may_fail=True) == 0
        if unloaded:
            run(["nvidia-modprobe"], may_fail=True)
    finally:
        for unit in reversed(active):
            run(["systemctl", "start", unit], may_fail=True)


def verify(version: str) -> list[str]:
    """What is wrong, a sentence each: every layer, with the modules of the kernel that runs and of the next boot's."""
    wrong = []
    loaded = loaded_version()
    if loaded != version:
        wrong.append(f"the module in the kernel is {loaded or 'not there'} where {version} is wanted")
    found = modules()
    wrong += _without(version, {kernel: found[kernel] for kernel in needed(found)})
    library = said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split()
    if not library or set(library) != {version}:
        has = " ".join(dict.fromkeys(library))[:100]
        wrong.append(f"the library is {has or 'not there'} where {version} is wanted")
    packages = installed()
    others = [f"{package['name']} {package['version']}" for package in packages
              if not package["pin"] and driver_in(package["version"]) != version]
    if others:
        more = f" and {len(others) - 2} more packages" if len(others) > 2 else ""
        wrong.append(f"{', '.join(others[:2])}{more} where {version} is wanted")
    if any(package["name"] == "nvidia-fabricmanager" for package in packages):
        unit = said(["systemctl", "is-active", "nvidia-fabricmanager.service"]).strip()
        if unit != "active":
            wrong.append(f"nvidia-fabricmanager.service is {unit or 'not there'}")
    return wrong


def told(version: str) -> list[str]:
    """What kernels lack that neither run nor boot next; no fault of the host's, but who boots them has no driver."""
    found = modules()
    return _without(version, {kernel: found[kernel] for kernel in found if kernel not in needed(found)})


def _without(version: str, found: Mapping[str, str]) -> list[str]:
    return [f"the module for kernel {kernel} is {module or 'not there'} where {version} is wanted"
            for kernel, module in found.items() if module != version]


def needed(kernels: Collection[str]) -> set[str]:
    """Those of ``kernels`` that run or boot next; a lab's only one too."""
    if len(kernels) < 2:
        return set(kernels)
    named = [path.readlink().name.removeprefix("vmlinuz-") for path in BOOTS_NEXT if path.is_symlink()]
    newest = max(kernels, key=lambda kernel: [int(part) for part in re.findall(r"\d+", kernel)])
    return {kernel for kernel in kernels if kernel == running()} | set(
        next(([name] for name in named if name in kernels), [newest]))


def running() -> str:
    return os.uname().release


def modules() -> dict[str, str]:
    """By kernel that could be booted, the version of its nvidia module; empty where it has none."""
    kernels = sorted(path.name.removeprefix("vmlinuz-") for path in BOOT.glob("vmlinuz-*"))
    found = {kernel: said(["modinfo", "-k", kernel, "-F", "version", "nvidia"]).strip() for kernel in kernels
             if Path("/lib/modules", kernel).is_dir()}
    if not found and LAB_MODULE.parent.is_dir():
        found["lab"] = LAB_MODULE.read_text().strip() if LAB_MODULE.exists() else ""
    return found


def read_change() -> dict[str, Any] | None:
    if not CHANGE.exists():
        return None
    document: dict[str, Any] = json.loads(CHANGE.read_text())
    return document


def _change() -> dict[str, Any]:
    change = read_change()
    if change is None:
        raise SorryError("no change of a driver is under way here")
    return change


def mark(phase: str, **more: Any) -> dict[str, Any]:
    """``changing``, ``accepted``, ``restored``, ``back``, ``broken``."""
    change = {**_change(), "phase": phase, **more}
    write(CHANGE, change)
    return change


def done() -> dict[str, Any]:
    """The change is over: its record goes, and kept drivers that are neither before nor after it."""
    take_unit_away()
    rotation({})
    change = read_change()
    if change is None:
        return {"changed": False}
    for path in KEPT.iterdir() if KEPT.is_dir() else []:
        if path.name not in (change["from"], change["to"]):
            shutil.rmtree(path)
    CHANGE.unlink()
    flush(HOME)
    return {"changed": True}


def leave() -> dict[str, Any]:
    _change()
    write_text(UNIT_FILE, UNIT_TEXT)
    run(["systemctl", "daemon-reload"])
    run(["systemctl", "enable", UNIT])
    return {"unit": UNIT}


def take_unit_away() -> None:
    if UNIT_FILE.exists():
        run(["systemctl", "disable", UNIT], may_fail=True)
        UNIT_FILE.unlink()  # and no reload: a unit that runs and has no file any more gets the default's timeout (seen)


def go_on(pause: Callable[[float], object] = time.sleep) -> dict[str, Any]:
    """After a boot: accept the new driver, or restore the old one and accept that. One more boot at the most."""
    change = read_change()
    if change is None or change["phase"] in ("accepted", "back", "broken"):
        take_unit_away()
        return {"phase": change["phase"] if change else ""}
    if change["phase"] == "changing":
        wait_for_module(pause)
        wrong = verify(change["to"]) or accept(change)
        if not wrong:
            return _over("accepted")
        say(f"{change['to']} is not accepted: {'; '.join(wrong)}")
        mark("changing", why="; ".join(wrong))
        restore()
        if loaded_version() != change["from"]:
            say(f"{change['from']} is installed, and comes with another boot")
            why = not_now(change)
            if why:
                say(f"which is not now: {why}")
            else:
                run(["systemctl", "--no-block", "reboot"])
            return {"phase": "restored"}
    wait_for_module(pause)
    wrong = verify(change["from"]) or accept(change)
    if wrong:
        mark("broken", why="; ".join(wrong))
        take_unit_away()
        raise SorryError(f"{change['from']} does not serve: {'; '.join(wrong)}")
    return _over("back")


def not_now(change: Mapping[str, Any]) -> str:
    """Why nobody may reboot this machine unasked: another run is at work here, or a person holds it. Or empty."""
    for lock in _told("locks"):
        holder = lock["holder"]
        if lock["name"] == "host" and holder["run"] != change["run"] and holder["beat_s"] <= STALE_S:
            return f"{holder['user']}@{holder['machine']} has it for {holder['verb']} (run {holder['run']})"
    for hold in _told("holds"):
        if hold["host"] == change.get("host"):
            return f"it is on hold by {hold['by']}"
    return ""


def _told(what: str) -> list[dict[str, Any]]:
    text = said([HOST_PROGRAM, what])
    found: list[dict[str, Any]] = json.loads(text).get(what, []) if text else []  # it may say an error instead
    return found


def _over(phase: str) -> dict[str, Any]:
    change = mark(phase)
    for instance in change["instances"]:  # who stopped it may never come back to say that it may serve
        run([HOST_PROGRAM, "undrain", instance, "--owner", f"run:{change['run']}"], may_fail=True)
    take_unit_away()
    return {"phase": phase}


def accept(change: Mapping[str, Any]) -> list[str]:
    """Starts the instances that served and asks each; what is wrong with which."""
    return [f"{instance} does not serve" for instance in change["instances"]
            if run([HOST_PROGRAM, "accept", instance], may_fail=True)]


def wait_for_module(pause: Callable[[float], object]) -> None:
    """Until some module is loaded: another one than the wanted does not go by itself."""
    until = time.monotonic() + LOAD_WAIT_S
    while not loaded_version() and time.monotonic() < until:
        pause(1)


def boot_id() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def write(path: Path, document: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """By rename, and on the disk when it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    flush(new)
    new.rename(path)
    flush(path.parent)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def said(argv: Sequence[str]) -> str:
    """What a program prints; nothing when there is no such program."""
    try:
        return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    except FileNotFoundError:
        return ""


def run(argv: Sequence[str], *, may_fail: bool = False, cwd: Path | None = None) -> int:
    """Its words go to stderr: stdout is the answer's."""
    say("+ " + " ".join(argv))
    try:
        return subprocess.run(argv, check=not may_fail, stdout=sys.stderr, cwd=cwd, stdin=subprocess.DEVNULL).returncode
    except FileNotFoundError:
        if not may_fail:
            raise
        return 127


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


VERBS: Mapping[str, Callable[..., Any]] = {
    "look": look, "keep": keep, "begin": lambda text: begin(json.loads(text)), "restore": restore,
    "rotation": lambda text: rotation(json.loads(text)),
    "verify": lambda version: {"wrong": verify(version), "told": told(version)}, "mark": mark, "done": done,
    "leave": leave, "continue": go_on}


def main() -> int:
    os.environ.update({"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1", "LC_ALL": "C.UTF-8"})
    try:
        answer = VERBS[sys.argv[1]](*sys.argv[2:])
    except SorryError as sorry:
        say(str(sorry))
        return 3
    except subprocess.CalledProcessError as error:
        say(f"{error.cmd[0]} failed with exit status {error.returncode}")
        return 1
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
