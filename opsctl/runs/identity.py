"""Who is asking: user, machine, boot, process. Enough to tell a process that is gone from one that is busy.

A pid alone is given out again; with the time at which the process began it is not. Another machine's processes cannot
be seen from here: what is known of them is the heartbeat of their locks.
"""

from __future__ import annotations

import getpass
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MACHINE_ID = Path("/etc/machine-id")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")
START_FIELD = 19  # of those after the name in parentheses: starttime, clock ticks; proc_pid_stat(5) counts it as 22


@dataclass(frozen=True)
class Holder:
    """A controller process and its run. ``token``: random, one for each process; ``machine_id`` may be empty.

    ``namespace``: where its ``pid`` means something; empty when it is not known.
    """

    token: str
    run: str
    verb: str
    user: str
    machine: str
    machine_id: str
    boot: str
    pid: int
    pid_start: int
    message: str = ""
    namespace: str = ""

    @property
    def who(self) -> str:
        """``ann@laptop``."""
        return f"{self.user}@{self.machine}" if self.machine else self.user

    def as_document(self) -> dict[str, Any]:
        return asdict(self)


def me(run: str, verb: str, message: str = "") -> Holder:
    """This process as a holder."""
    return Holder(secrets.token_hex(16), run, verb, getpass.getuser(), socket.gethostname(), _text(MACHINE_ID),
                  _text(BOOT_ID), os.getpid(), process_start(os.getpid()) or 0, message, _namespace())


def holder_of(document: Mapping[str, Any]) -> Holder:
    """A holder from a host's document; what is missing in it is empty, and then proves nothing."""
    words = {name: str(document.get(name) or "") for name in
             ("token", "run", "verb", "user", "machine", "machine_id", "boot", "message", "namespace")}
    return Holder(**words, pid=int(document.get("pid") or 0), pid_start=int(document.get("pid_start") or 0))


def alive(holder: Holder, proc: Path = Path("/proc")) -> bool:
    """Whether the holder's process lives; only to be asked on its own machine, in the same boot."""
    return holder.pid > 0 and process_start(holder.pid, proc) == holder.pid_start


def process_start(pid: int, proc: Path = Path("/proc")) -> int | None:
    """When a process began, in clock ticks since boot; None when there is none, or only its corpse."""
    try:
        fields = (proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[START_FIELD])


def _namespace() -> str:
    """``pid:[4026531836]``: containers of one machine have one each."""
    try:
        return PID_NAMESPACE.readlink().name
    except OSError:
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # a container without one: then nobody's process is known to be gone
        return ""
