"""Follows a program's output on a host for as long as anybody listens, over an SSH connection of its own or as a child.

A ``Session`` answers when a command has ended; what never ends comes here, line by line. A host that goes away is
reported once and tried again with pauses of ``PAUSES_S``; whoever follows says where to go on (``command``).
"""

from __future__ import annotations

import getpass
import os
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from opsctl.engines.child import die_with_parent
from opsctl.fleet.model import Host

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)  # before each new attempt; the last one again and again
# What is left on a host of a follower that died in a way nobody there noticed ends by itself.
LONGEST_S = 3600
TIME_IS_UP = 124  # how `timeout` ends
CONNECTED = "opsctl: following"  # the first line: a quiet journal would not show that the host is back
STDERR_LIMIT = 4096  # bytes


class Kind(StrEnum):
    LINE = "line"
    GONE = "gone"  # ``text`` says why
    BACK = "back"


@dataclass(frozen=True)
class Heard:
    host: str
    kind: Kind
    text: str = ""


def wrapped(argv: Sequence[str], *, become: bool) -> list[str]:
    """``argv`` as it runs on the host: as root, bounded in time, with ``CONNECTED`` said first."""
    return [*(["sudo", "-n", "--"] if become else []), "timeout", str(LONGEST_S), "sh", "-c",
            f'echo "{CONNECTED}"; exec "$@"', "sh", *argv]


def ssh_arguments(ssh_config: Path, host: Host, argv: Sequence[str]) -> list[str]:
    """By the generated configuration, and on a connection of its own: a shared one ends with whoever owns it."""
    return ["ssh", "-F", str(ssh_config), "-n", "-T", "-o", "ControlMaster=no", "-o", "ControlPath=none", "--",
            host.name, shlex.join(argv)]


def becomes(host: Host, user: str, uid: int) -> bool:
    """Whether sudo is needed there, given who runs this here."""
    return uid != 0 if host.connection == "local" else (host.user or user) != "root"


class Follower:
    """One host, followed in a thread until ``end``. ``hear`` is called in that thread, for each line in order.

    ``command`` gives the argument vector of each new attempt: it knows how far the last one came. A line that was cut
    off by the end of a connection is never heard: the next attempt brings it whole.
    """

    def __init__(self, ssh_config: Path, host: Host, command: Callable[[], Sequence[str]],
                 hear: Callable[[Heard], None], pauses_s: Sequence[float] = PAUSES_S) -> None:
        self._ssh_config = ssh_config
        self._host = host
        self._command = command
        self._hear = hear
        self._pauses_s = pauses_s
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._gone = ""
        self._thread = threading.Thread(target=self._run, name=f"follow-{host.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Ends the child and its children; one that became root by sudo goes with its pipe."""
        self._stopped.set()
        if self._process is not None and self._process.returncode is None:
            _kill_group(self._process)

    def join(self, patience_s: float = 2.0) -> None:
        """Waits a moment for the thread of a follower that was ended."""
        self._thread.join(patience_s)

    def _run(self) -> None:
        failures = 0
        while not self._stopped.is_set():
            connected, why = self._attempt()
            if self._stopped.is_set():
                return
            failures = 0 if connected else failures + 1
            if why and why != self._gone:
                self._gone = why
                self._hear(Heard(self._host.name, Kind.GONE, why))
            self._stopped.wait(self._pauses_s[min(failures, len(self._pauses_s) - 1)])

    def _attempt(self) -> tuple[bool, str]:
        """Follows once: whether the host was there, and why it ended; empty when only its time was up."""
        become = becomes(self._host, getpass.getuser(), os.geteuid())
        argv = wrapped(self._command(), become=become)
        if self._host.connection != "local":
            argv = ssh_arguments(self._ssh_config, self._host, argv)
        connected = False
        with tempfile.TemporaryFile() as stderr:
            try:
                process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
                                           start_new_session=True,
                                           preexec_fn=die_with_parent)  # noqa: PLW1509 - one prctl call
            except OSError as error:
                return False, f"{argv[0]}: {error.strerror}"
            self._process = process
            if self._stopped.is_set():  # end() came before it could see the child
                _kill_group(process)
            with process:
                for raw in process.stdout or ():
                    if not raw.endswith(b"\n"):
                        break
                    line = raw[:-1].decode("utf-8", "replace")
                    if not connected and line == CONNECTED:
                        connected = True
                        self._back()
                    elif connected:
                        self._hear(Heard(self._host.name, Kind.LINE, line))
            stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - STDERR_LIMIT))
            said = stderr.read().decode("utf-8", "replace").strip().splitlines()
        if process.returncode == TIME_IS_UP and connected:
            return connected, ""
        return connected, said[-1] if said else f"it ended with exit code {process.returncode}"

    def _back(self) -> None:
        if self._gone:
            self._gone = ""
            self._hear(Heard(self._host.name, Kind.BACK))


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(PermissionError, ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
