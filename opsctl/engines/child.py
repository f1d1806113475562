"""Child processes that die with the controller, and are stopped politely within a bound."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """For ``preexec_fn``: the kernel sends SIGTERM to this process when the thread that started it dies."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def stop_group(process: subprocess.Popen[bytes], first: signal.Signals, patience_s: float = 5.0) -> None:
    """Sends ``first``, then SIGTERM, then SIGKILL to the process group, waiting ``patience_s`` seconds for each."""
    for wanted in (first, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, wanted)
            process.wait(patience_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
