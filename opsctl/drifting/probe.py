"""Prints as JSON what a host has of packages, driver and kernels, and what apt's and dpkg's logs say of them.

Python 3.8, standard library only; sent as one file with opsctl/checking/probe_common.py before it. Runs as
``python3 - '{"packages": ["*nvidia*", "haproxy"]}'``, best as root: ``packages`` are names and patterns. Changes
nothing, and decides nothing. Never hangs: programs have deadlines and run side by side, files are read by threads that
are left behind when they do not come back.

Printed: ``commands`` (by name: ``exit``, None when it ran past its deadline; ``out``), ``files`` (text by path),
``changed`` (when files were last written), ``kernels``, ``pci``, ``libraries`` (what their links name), ``logs`` (the
entries of those packages alone) and ``late``, what did not come back in time. Times are the host's own, as its logs'.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import gzip
import json
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from opsctl.checking.probe_common import files_of, kernels, read, run

if TYPE_CHECKING:  # Python 3.8 would not evaluate it
    Said = dict[str, Any]

DEADLINE_S = 60.0
LOG_LIMIT = 64 * 2**20  # bytes read of one log, unpacked: a year of a busy host is a tenth of that
LOGS = "/var/log"
HISTORY, DPKG = "apt/history.log", "dpkg.log"
RECORD = "/etc/opsctl/driver.json"
BLACKLIST = "/etc/apt/apt.conf.d/51opsctl-nvidia"
FILES = (RECORD, BLACKLIST, "/etc/os-release", "/proc/meminfo", "/proc/cmdline", "/boot/grub/grub.cfg",
         "/boot/grub/grubenv", "/boot/grub2/grub.cfg", "/boot/grub2/grubenv", "/lib/modules/lab/nvidia.version")
LIBRARIES = ("libnvidia-ml.so.1", "libcuda.so.1")
LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64")
UNITS = ("nvidia-persistenced.service", "nvidia-fabricmanager.service")
FIELDS = "${Package}\\t${Architecture}\\t${Version}\\t${db:Status-Want}\\t${db:Status-Status}\\n"
KERNELS = ("linux-image-*", "linux-headers-*")  # whose comings and goings are told too
# Lines of apt's history that list packages, and lines of dpkg's log that change one.
LISTS = re.compile(r"(Install|Reinstall|Upgrade|Downgrade|Remove|Purge): (.*)", re.DOTALL)
CHANGES = re.compile(r"\S+ \S+ (?:install|upgrade|remove|purge|disappear) ([^ :]+)")
# What was typed as root, by sudo (COMMAND=) or opsctl exec ("argv":).
TYPED = r"(COMMAND=|\"argv\":).*(apt-mark|apt-get|aptitude|/apt|dpkg|dkms|unhold|\.deb|51opsctl|preferences\.d)"


def files() -> dict[str, str]:
    found = files_of(FILES)
    found["/etc/opsctl"] = "" if os.path.isdir("/etc/opsctl") else None
    return {path: said for path, said in sorted(found.items()) if said is not None}


def changed() -> dict[str, str]:
    """When a file was last written, of those that somebody may change by hand."""
    found = {}
    for path in (RECORD, BLACKLIST, *sorted(glob.glob("/etc/apt/preferences.d/*"))):
        with contextlib.suppress(OSError):
            found[path] = moment(os.stat(path).st_mtime)
    return found


def moment(seconds: float) -> str:
    """As dpkg and apt write times."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def pci() -> list[Said]:
    """NVIDIA's functions on the PCI bus, in bus order."""
    found = []
    for folder in sorted(glob.glob("/sys/bus/pci/devices/*")):
        one: Said = {name: (read(folder + "/" + name) or "").strip() for name in ("vendor", "device", "class")}
        if one["vendor"] == "0x10de":
            found.append(dict(one, address=os.path.basename(folder)))
    return found


def libraries() -> dict[str, str]:
    """What a library's link ends at: ``libnvidia-ml.so.580.126.09``; nothing of one that is not there."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        for folder in LIBRARY_FOLDERS:
            path = os.path.join(folder, name)
            if os.path.exists(path):
                found.setdefault(name, os.path.basename(os.path.realpath(path)))
    return found


def log_lines(path: str) -> Iterator[str]:
    """The lines of a log and of its rotated ones, the oldest first. One that is broken gives what can be read of it."""
    def age(name: str) -> int:
        number = re.search(r"\.(\d+)(?:\.gz)?$", name)
        return -int(number.group(1)) if number else 0

    for name in sorted(glob.glob(glob.escape(path) + "*"), key=age):
        if not re.fullmatch(re.escape(path) + r"(?:\.\d+(?:\.gz)?)?", name):
            continue
        left = LOG_LIMIT
        opener: Callable[..., Any] = gzip.open if name.endswith(".gz") else open
        with contextlib.suppress(OSError, EOFError, zlib.error), opener(name, "rb") as file:
            for raw in file:
                left -= len(raw)
                if left < 0:
                    break
                yield raw.decode("utf-8", "replace").rstrip("\n")
        yield ""  # a log that was cut off must not run into the next


def matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    known = re.compile("|".join(map(fnmatch.translate, patterns)) or r"(?!)")
    return lambda name: known.match(name) is not None


def history(patterns: Sequence[str]) -> str:
    """apt's history: the entries that tell of these packages, and of those entries these packages alone."""
    ours = matcher(patterns)
    kept: list[str] = []
    entry: list[str] = []
    tells = False

    def close() -> None:
        if tells:
            kept.extend([*entry, ""])

    for line in log_lines(os.path.join(LOGS, HISTORY)):
        if not line or line.startswith("Start-Date: "):
            close()
            entry, tells = [], False
        listed = LISTS.match(line)
        if listed:
            items = [one for one in re.split(r"(?<=\)), ", listed.group(2)) if ours(re.split("[: ]", one)[0])]
            if items:
                tells = True
                entry.append(f"{listed.group(1)}: {', '.join(items)}")
        elif line:
            entry.append(line[:2000])  # a command line may name thousands of packages
    close()
    return "\n".join(kept)


def dpkg_log(patterns: Sequence[str]) -> str:
    """dpkg's log: the lines that change one of these packages."""
    ours = matcher(patterns)
    kept = []
    for line in log_lines(os.path.join(LOGS, DPKG)):
        found = CHANGES.match(line)
        if found and ours(found.group(1)):
            kept.append(line[:500])
    return "\n".join(kept)


def recorded() -> Said:
    """What provision left on the host; empty where it left nothing, or what cannot be read."""
    try:
        found = json.loads(read(RECORD) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def names_of(wanted: Said, record: Said) -> list[str]:
    """Everything that is asked of dpkg and its logs."""
    own = record.get("own", [])
    return list(dict.fromkeys([*wanted.get("packages", []), *record.get("packages", {}), record.get("pin", ""),
                               *(own if isinstance(own, list) else []), "nvidia-driver-pinning-*"]))


def programs(patterns: Sequence[str], pin: str) -> dict[str, tuple[list[str], float]]:
    """``{name: (argv, seconds)}``."""
    asked: dict[str, tuple[list[str], float]] = {
        "dpkg-list": (["dpkg-query", "--show", "--showformat=" + FIELDS, "--", *(name for name in patterns if name)],
                      20),
        "driver": (["cat", "/proc/driver/nvidia/version"], 10),
        "units": (["systemctl", "show", "-p", "Id,LoadState,UnitFileState,ActiveState", *UNITS], 10),
        "dkms": (["dkms", "status"], 30),
        "blacklist": (["apt-config", "dump", "Unattended-Upgrade::Package-Blacklist"], 10),
        "typed": (["journalctl", "--quiet", "--no-pager", "--lines=300", "--output=short-iso", "--grep=" + TYPED,
                   "SYSLOG_IDENTIFIER=sudo", "SYSLOG_IDENTIFIER=opsctl-audit"], 20),
    }
    if pin:
        asked["pin"] = (["dpkg", "--verify", pin], 20)
    if os.path.exists("/proc/driver/nvidia/version"):  # else nvidia-smi would load the driver: that is a change
        asked["gpus"] = (["nvidia-smi", "--query-gpu=driver_version,pci.bus_id,uuid", "--format=csv,noheader"], 40)
    for one in kernels()["installed"]:
        asked["modinfo:" + one["release"]] = (["modinfo", "-k", one["release"], "nvidia"], 10)
    return asked


def capture(wanted: Said) -> Said:
    record = recorded()
    patterns = names_of(wanted, record)
    told = [*filter(None, patterns), *KERNELS]
    until = time.monotonic() + DEADLINE_S
    asked = programs(patterns, str(record.get("pin", "")))
    said: dict[str, Said] = {}
    texts: dict[str, Any] = {}
    readers: dict[str, Callable[[], Any]] = {
        "files": files, "changed": changed, "pci": pci, "libraries": libraries, "kernels": kernels,
        "history": lambda: history(told), "dpkg": lambda: dpkg_log(told)}

    def ask(name: str, argv: list[str], timeout_s: float) -> None:
        said[name] = run(argv, min(timeout_s, max(until - time.monotonic(), 0.1)))

    def reading(name: str, reader: Callable[[], Any]) -> None:
        texts[name] = reader()

    workers = [threading.Thread(target=ask, args=(name, *how), daemon=True) for name, how in asked.items()]
    workers += [threading.Thread(target=reading, args=one, daemon=True) for one in readers.items()]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(until + 5.0 - time.monotonic(), 0.1))
    done, read_whole = dict(said), dict(texts)
    late = sorted({*asked} - {*done}) + sorted({*readers} - {*read_whole})
    return {"schema": "opsctl.drift-probe/v1", "root": os.geteuid() == 0, "now": moment(time.time()),
            "commands": {name: done.get(name, {"exit": None, "out": ""}) for name in asked},
            "files": read_whole.get("files", {}), "changed": read_whole.get("changed", {}),
            "kernels": read_whole.get("kernels", {}), "pci": read_whole.get("pci", []),
            "libraries": read_whole.get("libraries", {}),
            "logs": {"history": read_whole.get("history", ""), "dpkg": read_whole.get("dpkg", "")}, "late": late}


def main() -> None:
    wanted = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    json.dump(capture(wanted), sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # a thread that waits for the kernel must not keep us


if __name__ == "__main__":
    main()
