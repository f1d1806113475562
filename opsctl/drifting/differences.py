"""What differs on a host from what it is to have, who changed it, and the command that mends it. Pure.

``differences`` is what others call. A host is compared with what its last provision left there, and that with what
stack.lock or the inventory say now; each function below is one layer.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from datetime import date
from fnmatch import fnmatchcase

from opsctl.checking.model import Captured, on, shell
from opsctl.checking.reading import gpus_on_bus, key_values, loaded, switches_on_bus
from opsctl.drifting.booting import installed_kernels, module_on_disk, next_boot
from opsctl.drifting.history import Culprit
from opsctl.drifting.model import NOT_THERE, Difference, Drift, Expected, Seen
from opsctl.drifting.reading import RECORD, read
from opsctl.stack.driver import PIN, Desired, members, unwanted
from opsctl.stack.knowledge import knowledge
from opsctl.stack.lock import HostFacts, holds
from opsctl.stack.versions import driver_in
from opsctl.verifying import Wrong, check_hold

BLACKLIST = "/etc/apt/apt.conf.d/51opsctl-nvidia"
ROW = re.compile(r"\s*\d[\d.]+, *[0-9A-Fa-f:.]+, *(GPU-\S+)\s*$")
LIBRARY = re.compile(r"\.so\.(\d{3,4}\.\d+(?:\.\d+)?)$")
# Which packages bring a library: Debian's names, Ubuntu's.
BRINGS = {"libnvidia-ml.so.1": ("libnvidia-ml1", "libnvidia-compute"),
          "libcuda.so.1": ("libcuda1", "libnvidia-compute")}
ENABLED = ("enabled", "enabled-runtime", "static", "alias", "indirect", "generated", "linked")


def drift_of(captured: Captured, expected: Expected) -> Drift:
    """What a host's capture says. ``captured``: the document of ``probe.py``."""
    if captured.file("/etc/opsctl") is None:
        return Drift(skipped="never provisioned")
    unknown = tuple(sorted({*captured.document.get("late", ()), *(name for name, said in captured.document.get(
        "commands", {}).items() if said["exit"] is None)}))
    seen = read(captured, expected)
    if seen.record is None:
        return Drift(differences(seen), unknown=unknown)
    return Drift(differences(seen), installed_kernels(captured, seen.record), next_boot(captured), seen.record.version,
                 unknown=unknown)


def differences(seen: Seen) -> tuple[Difference, ...]:
    """Everything that differs, the layers in order; nothing when all is as it is to be."""
    found = [*_record(seen), *_lock(seen)]
    if seen.record is not None:
        for layer in (_packages, _extra, _holds, _pin, _kernel, _library, _services, _unattended, _gpus, _boot):
            found += layer(seen, seen.record)
    return (*found, *_roles(seen))


def _record(seen: Seen) -> Iterator[Difference]:
    wanted, record = seen.expected.wanted, seen.record
    source = seen.expected.source
    if record is None:
        if wanted.driver:
            there = seen.captured.file(RECORD) is not None
            yield Difference("record", RECORD, f"driver {wanted.driver} ({source})",
                             "nothing that can be read" if there else "none", _writer(seen, RECORD), seen.mend)
        return
    if not wanted.driver:
        yield Difference("record", "the driver", "none: the inventory names no nvidia_driver_version",
                         f"{record.version}, of the last provision", None,
                         f'nvidia_driver_version="{record.version}" in the inventory, or remove {RECORD} there')
    elif wanted.driver != record.version:
        yield Difference("record", "the driver", f"{wanted.driver} ({source})",
                         f"{record.version}, of the last provision", None, seen.mend)
    if wanted.flavour and wanted.flavour != record.flavour:
        yield Difference("record", "the kernel module", f"{wanted.flavour} ({source})",
                         f"{record.flavour}, of the last provision", None, seen.mend)
    fabric = "present" if record.fabric_manager else "absent"
    if wanted.fabric_manager in ("present", "absent") and wanted.fabric_manager != fabric:
        yield Difference("record", "the fabric manager", f"{wanted.fabric_manager} ({source})",
                         f"{fabric}, of the last provision", None, seen.mend)


def _lock(seen: Seen) -> Iterator[Difference]:
    """Other GPUs or another distribution than stack.lock was made for."""
    entry = seen.expected.entry
    release = key_values(seen.captured.file("/etc/os-release") or "")
    if entry is None or not release or "pci" in seen.captured.document.get("late", ()):
        return
    gpus = tuple(one["device"].removeprefix("0x") for one in gpus_on_bus(seen.captured))
    system = "".join(release.get(key, "").strip("\"'") for key in ("ID", "VERSION_ID"))
    facts = HostFacts(gpus, system, entry.engines, switches_on_bus(seen.captured))
    for wrong in holds(entry, facts, knowledge(), date.max):
        yield Difference("stack.lock", "the host", "as it was locked", wrong, None,
                         f"opsctl stack resolve --limit {seen.expected.wanted.host}")


def _packages(seen: Seen, record: Desired) -> Iterator[Difference]:
    for name, version in {**record.packages, record.pin: "", **dict.fromkeys(record.own, "")}.items():
        there = seen.packages.get(name)
        if there is None or there.state != "installed" or (version and there.version != version):
            yield Difference("pin" if name == record.pin else "packages", name, version or "installed",
                             seen.found(name), seen.history.last(name), seen.mend)


def _extra(seen: Seen, record: Desired) -> Iterator[Difference]:
    """What belongs to another driver, or must not be beside this one. What an operator added of this one may stay."""
    ours = {name: one.version for name, one in seen.packages.items()
            if any(fnmatchcase(name, pattern) for pattern in seen.expected.patterns)}
    for name in members(record, ours):
        if name in record.packages:
            continue
        if unwanted(record, name):
            yield Difference("packages", name, f"not beside the {record.flavour} driver {record.version}",
                             seen.found(name), seen.history.last(name), seen.mend)
        elif driver_in(ours[name]) != record.version:
            yield Difference("packages", name, f"{record.version}, or none", seen.found(name),
                             seen.history.last(name), seen.mend)
        elif not seen.is_held(name):
            yield Difference("holds", name, "hold", seen.packages[name].want, seen.history.last(name),
                             on(seen.expected.wanted, "apt-mark", "hold", name))
    for name in sorted(seen.packages):
        if name.startswith(PIN) and name != record.pin:
            yield Difference("pin", name, f"{record.pin} alone", seen.found(name), seen.history.last(name), seen.mend)


def _holds(seen: Seen, record: Desired) -> Iterator[Difference]:
    since = seen.changed.get(RECORD, "")
    for name in (record.pin, *record.packages):
        if name in seen.packages and not seen.is_held(name):
            yield Difference("holds", name, "hold", seen.packages[name].want, seen.history.unheld(name, since),
                             seen.mend)


def _pin(seen: Seen, record: Desired) -> Iterator[Difference]:
    """``dpkg --verify``: a flag for each way in which a file differs, ``c`` for configuration, its path."""
    if record.pin not in seen.packages:
        return
    for line in seen.captured.out("pin").splitlines():
        flags, _, path = line.partition(" ")
        path = path.strip().removeprefix("c ").strip()
        if not path.startswith("/"):
            continue
        missing = flags == "missing"
        source = "APT_CONFIG=/etc/opsctl/apt.conf " if seen.expected.wanted.package_source == "gateway" else ""
        mend = (f"rm -f {shlex.quote(path)} && {source}apt-get install -y --reinstall --allow-change-held-packages "
                f"-o Dpkg::Options::=--force-confmiss {record.pin} && apt-mark hold {record.pin}")
        yield Difference("pin", path, f"as {record.pin} brings it", "missing" if missing else "changed",
                         None if missing else _writer(seen, path), shell(seen.expected.wanted, mend))


def _kernel(seen: Seen, record: Desired) -> Iterator[Difference]:
    wanted = seen.expected.wanted
    module = next((name for name in record.packages if name.endswith("-dkms")), "")
    culprit = seen.history.last(module)
    version, flavour = loaded(seen.captured)
    if seen.captured.exit("driver") is None:
        return
    if version != record.version:
        yield Difference("kernel", "the module in the kernel", record.version, version or "none is loaded", culprit,
                         seen.mend)
    elif flavour != record.flavour:
        yield Difference("kernel", "the module in the kernel", f"the {record.flavour} one", f"the {flavour} one",
                         culprit, f"opsctl drain {wanted.host} && {on(wanted, 'systemctl', 'reboot')}")
    on_disk = module_on_disk(seen.captured)
    # A kernel that has no image here came from elsewhere; the others are judged by what they would boot with.
    judged = any(kernel.running for kernel in installed_kernels(seen.captured, record))
    if not judged and on_disk != record.version:
        yield Difference("kernel", "the module on disk of the running kernel", record.version, on_disk or "none",
                         culprit, seen.mend)


def _library(seen: Seen, record: Desired) -> Iterator[Difference]:
    """The files themselves: another installer's lie there and dpkg knows nothing of it."""
    there: Mapping[str, str] = seen.captured.document.get("libraries", {})
    if "libraries" in seen.captured.document.get("late", ()):
        return
    for name, packages in BRINGS.items():
        match = LIBRARY.search(there.get(name, ""))
        version = match[1] if match else ""
        if version == record.version or (not version and name != "libnvidia-ml.so.1"):
            continue
        brings = next((one for one in packages if one in record.packages), packages[0])
        whole = seen.found(brings) == record.packages.get(brings)
        mend = on(seen.expected.wanted, "apt-get", "install", "--reinstall", brings) if whole else seen.mend
        yield Difference("library", name, record.version, version or there.get(name, "not there"),
                         None if whole else seen.history.last(brings), mend)


def _services(seen: Seen, record: Desired) -> Iterator[Difference]:
    if seen.captured.exit("units") != 0:
        return
    shown = {said["Id"]: said for part in seen.captured.out("units").split("\n\n") if (said := key_values(part))}
    for unit in ("nvidia-persistenced.service", *(["nvidia-fabricmanager.service"] if record.fabric_manager else [])):
        said = shown.get(unit, {})
        state, file = said.get("ActiveState", ""), said.get("UnitFileState", "")
        if state != "active" or file not in ENABLED:
            found = NOT_THERE if said.get("LoadState", "not-found") == "not-found" else f"{state}, {file or 'no file'}"
            yield Difference("services", unit, "active, enabled", found, None, seen.mend)


def _unattended(seen: Seen, record: Desired) -> Iterator[Difference]:
    there = seen.captured.file(BLACKLIST)
    if there != seen.expected.blacklist:
        yield Difference("unattended-upgrades", BLACKLIST, "as provision wrote it",
                         "missing" if there is None else "changed", _writer(seen, BLACKLIST), seen.mend)
        return
    listed = set(re.findall(r'"([^"]+)"', seen.expected.blacklist))
    effective = set(re.findall(r'Package-Blacklist::[^"]*"([^"]+)";', seen.captured.out("blacklist")))
    lost = sorted(listed - effective)
    if seen.captured.exit("blacklist") == 0 and lost:
        yield Difference("unattended-upgrades", "its blacklist", f"with all of {BLACKLIST}",
                         f"without {', '.join(lost)}: another file of /etc/apt/apt.conf.d takes them away", None,
                         on(seen.expected.wanted, "grep", "-rn", "Package-Blacklist", "/etc/apt/apt.conf.d"))


def _gpus(seen: Seen, record: Desired) -> Iterator[Difference]:
    """By UUID, where gpus.yml or the inventory has any, and the driver is there to be asked."""
    wanted = seen.expected.wanted
    status = seen.captured.exit("gpus")
    if status in (None, 127) or not wanted.gpu_uuids:
        return
    lines = seen.captured.out("gpus").splitlines()
    there = [match[1] for line in lines if (match := ROW.match(line))]
    words = " ".join(" ".join(line for line in lines if not ROW.match(line)).split())[:200]
    if not there:
        yield Difference("GPUs", "nvidia-smi", f"{len(wanted.gpu_uuids)} GPUs", words or "nothing", None, seen.mend)
        return
    for uuid in wanted.gpu_uuids:
        if uuid not in there:
            said = f"missing; nvidia-smi says: {words}" if words else "missing"
            yield Difference("GPUs", uuid, "as in gpus.yml", said, None,
                             f"opsctl check --limit {wanted.host}; gone for good: opsctl gpus accept {wanted.host}")
    for uuid in there:
        if uuid not in wanted.gpu_uuids:
            yield Difference("GPUs", uuid, "none that gpus.yml does not have", "new", None,
                             f"opsctl gpus accept {wanted.host}")


def _boot(seen: Seen, record: Desired) -> Iterator[Difference]:
    """Kernels that would come up without this driver, the next one above all."""
    wanted = seen.expected.wanted
    for kernel in installed_kernels(seen.captured, record):
        if not kernel.why:
            continue
        build = f"dkms autoinstall -k {kernel.release}"
        if not kernel.headers:
            build = f"apt-get install -y linux-headers-{kernel.release} && {build}"
        fix = f"opsctl check --limit {wanted.host}" if kernel.version == record.version else shell(wanted, build)
        module = next((name for name in record.packages if name.endswith("-dkms")), "")
        came = seen.history.last(f"linux-image-{kernel.release}") or seen.history.last(module)
        which = "of the next boot" if kernel.next else "that runs" if kernel.running else "that could be booted"
        yield Difference("next boot", f"kernel {kernel.release}, {which}",
                         f"the {record.flavour} module {record.version}", kernel.why, came, fix)


def _roles(seen: Seen) -> Iterator[Difference]:
    """Packages that opsctl's other roles brought."""
    wanted = seen.expected.wanted
    for name in dict.fromkeys((*seen.expected.packages, *seen.expected.holds)):
        there = seen.packages.get(name)
        if there is None or there.state != "installed":
            yield Difference("roles", name, "installed", seen.found(name), seen.history.last(name), seen.mend)
            continue
        if name not in seen.expected.holds:
            continue
        try:
            check_hold(name, there.want, there.version, seen.expected.bundle)
        except Wrong as wrong:
            gone = there.want != "hold"
            yield Difference("roles", name, wrong.expected, wrong.found,
                             seen.history.unheld(name, "") if gone else seen.history.last(name),
                             seen.mend if gone else shell(
                                 wanted, "APT_CONFIG=/etc/opsctl/apt.conf apt-get install -y --allow-downgrades "
                                 f"--allow-change-held-packages {name} && apt-mark hold {name}"))


def _writer(seen: Seen, path: str) -> Culprit | None:
    """Who wrote a file by hand, as far as that can be told; None where it is not there."""
    when = seen.changed.get(path, "")
    return seen.history.wrote(path, when) if when else None
