"""What the probes of opsctl check and opsctl drift have in common; ``sending.py`` puts it before the one that is sent.

Python 3.8, standard library only, as all that runs on hosts.
"""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Python 3.8 would not evaluate it
    Said = dict[str, Any]

LIMIT = 400000  # characters kept of one text: the XML of 16 GPUs without their clocks is a fifth of that
SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


def run(argv: Sequence[str], timeout_s: float) -> Said:
    """``{"exit", "out"}`` of a program; ``exit`` is None past the deadline, 127 where there is no such program."""
    environment = dict(os.environ, LC_ALL="C.UTF-8", LANGUAGE="", DEBIAN_FRONTEND="noninteractive")
    environment["PATH"] = environment.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin"
    try:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 env=environment, start_new_session=True)
    except OSError:
        return {"exit": 127, "out": ""}
    try:
        out, _ = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as late:
        out = late.output or b""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # in the kernel nobody ends it from here
            os.killpg(child.pid, signal.SIGKILL)
            rest, _ = child.communicate(timeout=1.0)
            out = rest or out
        return {"exit": None, "out": text(out)}
    return {"exit": child.returncode, "out": text(out)}


def text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")[:LIMIT]


def read(path: str) -> str | None:
    """The text of a file, None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return text(file.read(LIMIT))
    except OSError:
        return None


def files_of(paths: Sequence[str]) -> dict[str, str | None]:
    """The texts of files, and what the firmware says of secure boot."""
    found: dict[str, str | None] = {path: read(path) for path in paths}
    with contextlib.suppress(OSError), open(SECURE_BOOT, "rb") as file:
        found[SECURE_BOOT] = file.read(8).hex()
    found["/sys/firmware/efi"] = "" if os.path.isdir("/sys/firmware/efi") else None
    return found


def kernels() -> Said:
    """Every kernel that could boot, and the one that boots next: what the distribution's link names."""
    running = os.uname().release
    following = ""
    for link in ("/vmlinuz", "/boot/vmlinuz"):
        if os.path.islink(link):
            following = os.path.basename(os.readlink(link)).partition("vmlinuz-")[2]
            break
    images = {os.path.basename(path).partition("-")[2] for path in glob.glob("/boot/vmlinuz-*")}
    return {"running": running, "next": following, "installed": [
        {"release": name, "image": name in images,
         "modules": os.path.exists(f"/lib/modules/{name}/modules.dep") or os.path.isdir(f"/lib/modules/{name}/kernel"),
         "headers": os.path.isdir(f"/lib/modules/{name}/build/")} for name in sorted(images | {running})]}
