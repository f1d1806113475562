"""A machine's disk: an ext4 image on a loop device, under the overlay on the shared base.

It is a file system of its own so that it can lose power: what was not fsynced is then really gone.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from pathlib import Path

from opsctl.errors import OpsctlError
from opsctl.lab.commands import run
from opsctl.lab.mounts import POLL_S, UNMOUNT_DEADLINE_S, mounts, unmount_below
from opsctl.lab.processes import all_processes, arguments

IMAGE_BYTES = 16 * 1024**3  # sparse: takes what is written, 8 MB when new
EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), fs/ext4/ext4.h
LOOP_MAJOR = 7  # Documentation/admin-guide/devices.txt
SHUTDOWN_WITHOUT_LOG_FLUSH = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH: neither data nor journal reach the disk any more


def image(place: Path) -> Path:
    return place / "layer.img"


def layer(place: Path) -> Path:
    """Where the image is mounted."""
    return place / "layer"


def root(place: Path) -> Path:
    """Where the machine's whole file system is mounted."""
    return place / "root"


def create(place: Path) -> None:
    """Makes an empty disk, in place of an older one."""
    place.mkdir(parents=True, exist_ok=True)
    image(place).unlink(missing_ok=True)
    with image(place).open("wb") as stream:
        stream.truncate(IMAGE_BYTES)
    run(["mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", image(place)])


def share(directory: Path) -> None:
    """Makes a directory a mount whose mounts and unmounts reach every machine.

    A machine starts with a hidden copy of all mounts that this computer has then. Where / is not shared (no systemd),
    a copy would stay as long as the machine: another's disk would never really be unmounted, and a lost one come back
    as the dead file system that it was.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # disks hold private keys
    if directory not in {seen.point for seen in mounts()}:
        run(["mount", "--bind", directory, directory])
        run(["mount", "--make-private", directory])
        run(["mount", "--make-shared", directory])


def mount(place: Path, base: Path) -> None:
    """Mounts disk and overlay, each only if it is not yet; an interrupted disk recovers by its journal here."""
    mounted = {seen.point for seen in mounts()}
    if layer(place) not in mounted:
        layer(place).mkdir(exist_ok=True)
        # discard: what a machine deletes goes back to this computer, so that images stay quick to copy
        run(["mount", "-o", "loop,noatime,discard", image(place), layer(place)])
    if root(place) not in mounted:
        upper, work = layer(place) / "upper", layer(place) / "work"
        for directory in (upper, work, root(place)):
            directory.mkdir(exist_ok=True)
        upper.chmod(0o755)  # it is the machine's /, whatever the umask here
        options = f"lowerdir={base},upperdir={upper},workdir={work}"
        run(["mount", "-t", "overlay", "-o", options, "overlay", root(place)])


def sync(place: Path) -> None:
    """Brings a disk to what it holds: an installed host has been for long, so that a power cut finds its keys there."""
    run(["sync", "--file-system", layer(place)], timeout_s=300)


def unmount(place: Path) -> None:
    """Unmounts disk and overlay, and waits until the kernel has let go of the image.

    Raises:
        OpsctlError: ``lab.busy``: something still holds it.
    """
    unmount_below(place)
    deadline = time.monotonic() + UNMOUNT_DEADLINE_S
    while _is_attached(image(place)):
        if time.monotonic() > deadline:
            holders = _who_sees(layer(place))
            raise OpsctlError("lab.busy", f"{image(place)} is unmounted here and still in use by {holders}.",
                              hint="end that, then the same command again")
        time.sleep(POLL_S)


def _is_attached(path: Path) -> bool:
    """Whether a loop device has the file."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if backing.read_text().strip() == str(path):
                return True
        except OSError:
            continue  # it has just been detached
    return False


def _who_sees(point: Path) -> str:
    """Processes in whose mount namespaces a mount is, for a message."""
    found = [f"pid {process.pid} ({' '.join(arguments(process))[:80]})" for process in all_processes()
             if any(seen.point == point for seen in mounts(process.pid))]
    return ", ".join(found[:3]) or "a container or unshare(1) that was started meanwhile"


def lose_power(place: Path) -> None:
    """From now on nothing of the machine reaches its disk, and nothing in memory ever will.

    Raises:
        OpsctlError: ``lab.no_disk``: the disk is not mounted. The same call would then take this computer's own down.
    """
    handle = os.open(layer(place), os.O_RDONLY | os.O_DIRECTORY)
    try:
        if os.major(os.fstat(handle).st_dev) != LOOP_MAJOR or os.fstat(handle).st_dev == place.stat().st_dev:
            raise OpsctlError("lab.no_disk", f"{layer(place)} is not a machine's mounted disk.")
        fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", SHUTDOWN_WITHOUT_LOG_FLUSH))
    finally:
        os.close(handle)


def copy_image(source: Path, target: Path) -> None:
    """Copies an image as sparse as it is, sharing blocks where the file system can; whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    run(["cp", "--sparse=always", "--reflink=auto", source, partial], timeout_s=600)
    partial.rename(target)
