"""Prints as JSON what a host's programs and files say, judged elsewhere. Python 3.8, standard library only.

Sent as one file with ``probe_common.py`` before it, and run as ``python3 - '{"gateway": "http://...", "apt": true}'``,
best as root. Changes nothing: apt looks at its sources in a scratch folder, which goes again, and only where ``apt``
does not say false: silent sources take their time. Never hangs: whatever may (programs, and files of the GPUs' driver
through ``cat``) is a child with a deadline, and one that not even SIGKILL ends (a driver that hangs) is left behind.
``/proc/PID/cmdline`` is not read: that can block on a process that hangs.

Printed: ``commands`` (by name: ``exit``, None when it ran past its deadline; ``out``, both streams), ``files`` (text by
path), ``kernels``, ``pci``, ``disks`` (bytes), ``locks``, ``listeners``, ``gpu_users``, ``owners`` and ``bundle``.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opsctl.checking.probe_common import files_of, kernels, read, run

if TYPE_CHECKING:  # Python 3.8 would not evaluate it
    Said = dict[str, Any]

DEADLINE_S = 60.0  # for all of it; the slowest single one is nvidia-smi that has to wake up 16 GPUs
FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid
LOCKS = ("/var/lib/dpkg/lock-frontend", "/var/lib/dpkg/lock", "/var/lib/apt/lists/lock")
PORTS = (9400,)
DISKS = ("/", "/boot", "/var", "/opt", "/srv")
PACKAGES = ("*nvidia*", "libcuda1", "libcudadebugger*", "cuda-drivers*", "libnvcuvid*", "libnvoptix*", "libnvsdm*",
            "libxnvctrl*", "datacenter-gpu-*")
TIME_SERVICES = ("systemd-timesyncd", "chrony", "chronyd", "ntpsec", "ntp", "ntpd", "openntpd")
FILES = ("/etc/os-release", "/proc/cmdline", "/proc/meminfo", "/proc/swaps", "/proc/modules",
         "/proc/sys/vm/overcommit_memory", "/lib/modules/lab/nvidia.version")
# Where Debian and Ubuntu keep the key that DKMS signs modules with.
MOK_KEYS = ("/var/lib/shim-signed/mok/MOK.der", "/var/lib/dkms/mok.pub")
RUN_FILE_MARKS = ("/usr/bin/nvidia-uninstall", "/usr/bin/nvidia-installer")
QUERY = ("index,uuid,name,pci.bus_id,driver_version,persistence_mode,ecc.mode.current,"
         "ecc.errors.uncorrected.volatile.total,clocks_event_reasons.active")
# Read last, after the host's own configuration: only the signed InRelease of each source is fetched, into a scratch
# folder, and no hook of the host's runs.
APT = """#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Dir::State::lists "SCRATCH/lists";
Dir::Cache "SCRATCH/cache";
Acquire::Languages "none";
Acquire::Retries "0";
Acquire::http::Timeout "8";
Acquire::https::Timeout "8";
APT::Get::List-Cleanup "false";
Acquire::IndexTargets::deb::Packages::DefaultEnabled "false";
Acquire::IndexTargets::deb-src::Sources::DefaultEnabled "false";
"""


def files() -> dict[str, str]:
    found = files_of((*FILES, *glob.glob("/etc/apt/sources.list.d/opsctl.sources")))
    return {path: said for path, said in sorted(found.items()) if said is not None}


def pci() -> list[Said]:
    """NVIDIA's functions on the PCI bus, in bus order, with what /sys shows of each as text."""
    found = []
    for folder in sorted(glob.glob("/sys/bus/pci/devices/*")):
        if (read(folder + "/vendor") or "").strip() != "0x10de":
            continue
        one: Said = {name: (read(folder + "/" + name) or "").strip() for name in (
            "device", "class", "current_link_width", "max_link_width", "current_link_speed", "max_link_speed",
            "resource", "iommu_group/type")}
        driver = folder + "/driver"
        one["driver"] = os.path.basename(os.readlink(driver)) if os.path.islink(driver) else ""
        found.append(dict(one, address=os.path.basename(folder)))
    return found


def disks() -> list[Said]:
    """Free and all bytes of the file system that each path lies on; a path that is not there counts as its parent."""
    found = []
    for path in DISKS:
        place = path
        while not os.path.exists(place):
            place = os.path.dirname(place)
        said = os.statvfs(place)
        found.append({"path": path, "free": said.f_bavail * said.f_frsize, "size": said.f_blocks * said.f_frsize,
                      "device": os.stat(place).st_dev})
    return found


def process(pid: int | str) -> Said:
    """What can be said of a process without asking it: its name, and its unit and container from its cgroups."""
    groups = read(f"/proc/{pid}/cgroup") or ""
    units = re.findall(r"[^/\n]+\.(?:service|scope)", groups)
    return {"pid": int(pid), "name": (read(f"/proc/{pid}/comm") or "").strip(), "unit": units[-1] if units else "",
            "cgroup": groups.strip()}


def locks() -> list[Said]:
    """Who holds the locks of dpkg and apt, a process each."""
    found = []
    for path in LOCKS:
        try:
            with open(path, "rb") as file:
                asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                kind, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
        except OSError:
            continue
        if kind != fcntl.F_UNLCK:
            found.append(dict(process(pid), lock=path))
    return found


def holders() -> tuple[list[Said], list[Said]]:
    """Processes with a GPU's node open, and those that listen on our ports: ``(gpu_users, listeners)``."""
    sockets: dict[str, int] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in (read(table) or "").splitlines()[1:]:
            fields = line.split()
            port = int(fields[1].rsplit(":", 1)[1], 16)
            if fields[3] == "0A" and port in PORTS:
                sockets[f"socket:[{fields[9]}]"] = port
    users: list[Said] = []
    listeners: list[Said] = []
    hidden = dict(sockets)
    for folder in sorted(glob.glob("/proc/[0-9]*"), key=lambda path: int(path[6:])):
        links: set[str] = set()
        for descriptor in glob.glob(folder + "/fd/*"):
            try:
                links.add(os.readlink(descriptor))
            except OSError:
                continue  # closed meanwhile
        devices = sorted(link for link in links if re.fullmatch(r"/dev/nvidia\d+", link))
        if devices:
            users.append(dict(process(folder[6:]), devices=devices))
        for link in sorted(links & set(sockets)):
            hidden.pop(link, None)
            listeners.append(dict(process(folder[6:]), port=sockets[link]))
    listeners += [{"pid": 0, "name": "", "unit": "", "cgroup": "", "port": port} for port in sorted(hidden.values())]
    return users, listeners


def bundle(url: str, codename: str) -> Said:
    """What the gateway answers for its signed package index: ``{"url", "status", "error"}``; by no proxy."""
    asked = f"{url}/apt/dists/{codename}/InRelease"
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(asked, timeout=8) as answer:
            return {"url": asked, "status": answer.status, "error": ""}
    except (OSError, ValueError) as error:  # HTTPError and URLError are OSErrors
        return {"url": asked, "status": getattr(error, "code", 0), "error": str(getattr(error, "reason", error))}


def programs(scratch: str, following: str) -> dict[str, tuple[list[str], float]]:
    """``{name: (argv, seconds)}``."""
    asked: dict[str, tuple[list[str], float]] = {
        "dpkg-audit": (["dpkg", "--audit"], 15),
        "dpkg-list": (["dpkg-query", "--show", "--showformat=${Package}\\t${Version}\\t${db:Status-Abbrev}\\n",
                       *PACKAGES], 15),
        "dpkg-depends": (["dpkg-query", "--show", "--showformat=${Package}\\t${db:Status-Abbrev}\\t${Pre-Depends}, "
                          "${Depends}\\n"], 15),
        "apt-update": (["apt-get", "update", "-c", scratch + "/apt.conf"], 40),
        "modprobe-config": (["modprobe", "--showconfig"], 10),
        "modinfo": (["modinfo", "nvidia", "nvidia-current"], 10),  # NVIDIA's packages' name for it, and Debian's
        "driver": (["cat", "/proc/driver/nvidia/version"], 10),
        "fabric-unit": (["systemctl", "show", "-p", "LoadState,UnitFileState,ActiveState", "nvidia-fabricmanager"], 10),
        "time-services": (["systemctl", "is-active", *TIME_SERVICES], 10),
        "timedatectl": (["timedatectl", "show"], 10),
        "lspci-bridges": (["lspci", "-D", "-vvv", "-d", "::0604"], 20),
        "xids": (["journalctl", "--boot", "--quiet", "--no-pager", "--lines=50", "--output=cat",
                  "--grep=NVRM: Xid", "SYSLOG_IDENTIFIER=kernel"], 20),
        "releases": (["find", "/srv/opsctl", "-mindepth", "3", "-maxdepth", "3", "-path", "*/releases/v*"], 10),
    }
    if os.path.exists("/proc/driver/nvidia/version"):  # else nvidia-smi would load the driver: that is a change
        asked["nvidia-smi"] = (["nvidia-smi", "-q", "-x"], 40)
        asked["nvidia-smi-csv"] = (["nvidia-smi", "--query-gpu=" + QUERY, "--format=csv,noheader"], 40)
        asked["nvlink"] = (["nvidia-smi", "nvlink", "--status"], 40)
    if following:
        asked["modinfo-next"] = (["modinfo", "-k", following, "nvidia", "nvidia-current"], 10)
    for key in MOK_KEYS:
        if os.path.exists(key):
            asked["mok-test"] = (["mokutil", "--test-key", key], 10)
            break
    for path in RUN_FILE_MARKS:
        if os.path.exists(path):
            asked["owner:" + path] = (["dpkg", "--search", path], 15)
    return asked


def exact(said: str) -> str:
    """Of all packages those that depend on exactly one version of something of NVIDIA's."""
    return "".join(line for line in said.splitlines(keepends=True) if re.search(r"(?:nvidia|cuda)\S* \(= ", line))


def shortened(said: str) -> str:
    """nvidia-smi's XML without the lists of clocks, which are nine tenths of it."""
    return re.sub(r"<supported_clocks>.*?</supported_clocks>", "", said, flags=re.DOTALL)


KEPT = {"nvidia-smi": shortened, "dpkg-depends": exact}


def capture(wanted: Mapping[str, Any]) -> Said:
    following = kernels()["next"]
    until = time.monotonic() + DEADLINE_S
    said: dict[str, Said] = {}
    scratch = tempfile.mkdtemp(prefix="opsctl-check-")
    try:
        os.chmod(scratch, 0o755)  # noqa: S103 - apt fetches as its own user
        for name in ("lists/partial", "cache/archives/partial"):
            os.makedirs(scratch + "/" + name)
        with open(scratch + "/apt.conf", "w") as file:
            file.write(APT.replace("SCRATCH", scratch))

        def one(name: str, argv: list[str], timeout_s: float) -> None:
            done = run(argv, min(timeout_s, max(until - time.monotonic(), 0.1)))
            keep = KEPT.get(name)
            said[name] = dict(done, out=keep(done["out"])) if keep else done

        asked = programs(scratch, following)
        if not wanted.get("apt", True):
            del asked["apt-update"]
        workers = [threading.Thread(target=one, args=(name, argv, timeout_s), daemon=True)
                   for name, (argv, timeout_s) in asked.items()]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(max(until + 5.0 - time.monotonic(), 0.1))
        done = dict(said)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    names = [line.split("\t")[0] for line in done.get("dpkg-list", {}).get("out", "").splitlines()
             if "\tii" in line or "\thi" in line]
    if names:
        done["apt-policy"] = run(["apt-cache", "policy", "--", *names[:60]], 15)
    for name in asked:
        done.setdefault(name, {"exit": None, "out": ""})
    users, listeners = holders()
    for program in ("docker", "podman"):  # asked only where a container has a GPU: asking may start the daemon
        if any(program in one["cgroup"] or "libpod" in one["cgroup"] for one in users):
            done[program] = run([program, "ps", "--no-trunc", "--format", "{{.ID}}\t{{.Names}}\t{{.Image}}"], 10)
    release = re.search(r"^VERSION_CODENAME=\"?(\w+)", read("/etc/os-release") or "", re.MULTILINE)
    found = {"schema": "opsctl.probe/v1", "root": os.geteuid() == 0, "commands": done, "files": files(),
             "kernels": kernels(), "pci": pci(), "disks": disks(), "locks": locks(), "listeners": listeners,
             "gpu_users": users, "bundle": None}
    if wanted.get("gateway") and release:
        found["bundle"] = bundle(wanted["gateway"], release.group(1))
    return found


def main() -> None:
    wanted = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    json.dump(capture(wanted), sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # a thread that waits for a child in the kernel must not keep us


if __name__ == "__main__":
    main()
