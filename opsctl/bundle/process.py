"""Runs the programs a bundle needs (apt, gpg, pip), so that none outlives the build that started it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from opsctl.engines.child import die_with_parent, stop_group
from opsctl.errors import RefusedError

LOG_LINES = 8


def require_program(name: str, debian_package: str, why: str) -> str:
    """The path of a program.

    Raises:
        RefusedError: it is not on this machine; the hint names the Debian package that brings it.
    """
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        raise RefusedError("bundle.no_program", f"{name} is not on this machine, and {why}.",
                           hint=f"apt-get install {debian_package}, or work on a Debian machine")
    return found


def plain_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with messages in English, so that they can be read by a program."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": ""}
    environment.pop("GNUPGHOME", None)  # homes are always named, never inherited
    return {**environment, **(extra or {})}


def run(argv: Sequence[str], *, stdin: bytes = b"", cwd: Path | None = None,
        environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """Runs to the end and captures; the caller interprets the exit status."""
    return subprocess.run(argv, input=stdin, capture_output=True, cwd=cwd, check=False,
                          env=plain_environment(environment), preexec_fn=die_with_parent)


@contextmanager
def started(argv: Sequence[str], *, stdout: int | None = subprocess.PIPE,
            environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A running program with stderr joined to stdout; ended, if it still runs, when the block is left."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.STDOUT,
                               env=plain_environment(environment), start_new_session=True,
                               preexec_fn=die_with_parent)  # noqa: PLW1509 - builds start no threads before this
    try:
        yield process
    finally:
        stop_group(process, signal.SIGINT)
        if process.stdout is not None:
            process.stdout.close()


def last_lines(output: bytes, count: int = LOG_LINES) -> tuple[str, ...]:
    """The last lines that say something: what an error shows as its log."""
    lines = [line.rstrip() for line in output.decode("utf-8", "replace").splitlines() if line.strip()]
    return tuple(lines[-count:])

