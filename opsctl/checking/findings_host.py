"""Memory, disks, the clock, the way to the host. Pure."""

from __future__ import annotations

import statistics

from opsctl.agent.stage import MARGIN_BYTES
from opsctl.checking.model import Captured, Judged, Wanted, fix, good, on, shell, skip, some, warn
from opsctl.checking.reading import gib, key_values, memory_bytes
from opsctl.doctor import SLOW_COMMAND_S
from opsctl.verifying import TIME_SERVICES, Doubtful, Wrong, check_clock

NEEDED = 1024 * 2**20  # role base refuses a host with less on any of /, /var, /opt, /srv (base_minimum_free_mib)
BUSY_SWAP = 2**30  # more than what a kernel puts out of the way by itself


def latency(captured: Captured, wanted: Wanted) -> Judged:
    if captured.command_s is None:
        return skip("nobody timed a command")
    if not captured.command_s:
        return good("it is this computer")
    median = statistics.median(captured.command_s)
    if median > SLOW_COMMAND_S:
        return warn(f"a command over SSH takes {median * 1000:.0f} ms: every step of a run waits that long",
                    f"opsctl doctor --limit {wanted.host}")
    return good(f"a command over SSH takes less than {SLOW_COMMAND_S * 1000:.0f} ms")


def memory(captured: Captured, wanted: Wanted) -> Judged:
    """Weights that are larger than memory are read from the disk again at each start."""
    total = memory_bytes(captured, "MemTotal")
    if total is None:
        return skip("/proc/meminfo is missing")
    if wanted.release_bytes > total:
        return warn(f"{gib(total)} of memory for releases of {gib(wanted.release_bytes)}: they do not stay in the page "
                    "cache, and each start reads the disk", on(wanted, "free", "-h") + "   (more memory, or fewer "
                    "services on that host)")
    return good(f"{gib(total)} of memory")


def swap(captured: Captured, wanted: Wanted) -> Judged:
    total, free = memory_bytes(captured, "SwapTotal"), memory_bytes(captured, "SwapFree")
    if total is None or free is None:
        return skip("/proc/meminfo is missing")
    if total - free > BUSY_SWAP:
        return warn(f"{gib(total - free)} of swap are in use: it has too little memory for what runs there", shell(
            wanted, "grep -H VmSwap /proc/[0-9]*/status | sort -k2 -n | tail -5"))
    return good("no swap" if not total else "swap is idle")


def overcommit(captured: Captured, wanted: Wanted) -> Judged:
    """CUDA reserves address space for all memory of host and GPUs; strict accounting takes that for use."""
    said = captured.file("/proc/sys/vm/overcommit_memory")
    if said is None:
        return skip("/proc/sys/vm/overcommit_memory is missing")
    if said.strip() == "2":
        return warn("vm.overcommit_memory=2: the kernel refuses the address space that CUDA reserves", shell(
            wanted, "sysctl -w vm.overcommit_memory=0; grep -rn overcommit_memory /etc/sysctl.conf /etc/sysctl.d"))
    return good(f"vm.overcommit_memory={said.strip()}")


def disk_system(captured: Captured, wanted: Wanted) -> Judged:
    disks = [one for one in captured.rows("disks") if one["path"] != "/boot"]
    if not disks:
        return skip("nobody measured its disks")
    full = [f"{one['path']} has {one['free'] / 2**20:.0f} MiB" for one in disks if one["free"] < NEEDED]
    if full:
        return fix(f"too little free space ({NEEDED // 2**20} MiB are needed): {some(full)}", shell(
            wanted, "journalctl --vacuum-size=500M; apt-get clean; df -h"), stops=True)
    boot = [one for one in captured.rows("disks") if one["path"] == "/boot" and one["free"] < 100 * 2**20]
    if boot:  # an initramfs with the driver in it is that large
        return warn(f"/boot has {boot[0]['free'] / 2**20:.0f} MiB free: the next initramfs does not fit", on(
            wanted, "apt-get", "autoremove"))
    return good("enough free space for packages")


def disk_weights(captured: Captured, wanted: Wanted) -> Judged:
    """A change of model has the old release and the new one on the disk, or there is no way back."""
    srv = next((one for one in captured.rows("disks") if one["path"] == "/srv"), None)
    if not wanted.release_bytes:
        return skip("no release is known yet whose size could be asked for")
    if srv is None:
        return skip("nobody measured its disks")
    has_one = bool(captured.out("releases").split()) and captured.exit("releases") == 0
    one = wanted.release_bytes + MARGIN_BYTES
    free = int(srv["free"])
    room = f"/srv has {gib(free)} free"
    clean = f"opsctl gc --limit {wanted.host}"
    if free < one and not has_one:
        return fix(f"{room}, and its releases need {gib(one)}", on(wanted, "df", "-h", "/srv") + "   (a larger disk "
                   "at /srv)", stops=free < wanted.least_release_bytes + MARGIN_BYTES)
    if free < (one if has_one else 2 * one):
        return warn(f"{room}: no room for a release of {gib(one)} beside the old one, so no model can be changed",
                    clean)
    return good(f"{room}: the old and the new release fit")


def clock(captured: Captured, wanted: Wanted) -> Judged:
    if captured.exit("timedatectl") != 0:
        return skip("timedatectl does not answer")
    states = captured.out("time-services").split()
    running = [name for name, state in zip(TIME_SERVICES, states, strict=False) if state == "active"]
    try:
        check_clock(key_values(captured.out("timedatectl")), running)
    except Doubtful as why:
        return warn(str(why), on(wanted, "timedatectl", "set-ntp", "true"))
    except Wrong as wrong:
        return fix(wrong.found, shell(wanted, "timedatectl timesync-status || chronyc sources"))
    return good(f"{running[0]} keeps the clock")
