"""Runs the system's tools: argument vectors, a deadline, and an error that shows what the tool said."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from opsctl.errors import OpsctlError

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LOG_LINES = 8


class CommandError(OpsctlError):
    """A tool of this computer failed where the lab needs it."""


def tool_environment() -> dict[str, str]:
    """This process's environment, with sbin on PATH (a user's sudo may lack it) and messages in English."""
    return {**os.environ, "PATH": os.environ.get("PATH", "") + ":" + SYSTEM_PATH, "LC_ALL": "C.UTF-8", "LANGUAGE": ""}


def run(argv: Sequence[str | os.PathLike[str]], *, stdin: str = "", timeout_s: float = 60.0) -> str:
    """Runs to the end and returns stdout.

    Raises:
        CommandError: the tool is not there, failed or did not end within ``timeout_s``.
    """
    words = [os.fspath(word) for word in argv]
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, errors="replace", check=False,
                              timeout=timeout_s, env=tool_environment())
    except FileNotFoundError:
        raise CommandError("lab.command_missing", f"{words[0]} is not on this computer.") from None
    except subprocess.TimeoutExpired:
        raise CommandError("lab.command_stuck", f"`{' '.join(words)}` did not end within {timeout_s:.0f} s.") from None
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = said[-1].strip() if said else f"exit status {done.returncode}"
        raise CommandError("lab.command_failed", f"`{' '.join(words)}` failed: {reason}", log_tail=said[-LOG_LINES:])
    return done.stdout
