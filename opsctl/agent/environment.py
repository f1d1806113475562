"""The engine's environment on a host: a venv built from the release's hashed lock out of the gateway's wheels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from opsctl.agent.durable import locked, make_directory, make_read_only, remove_tree, sync_tree, write_atomically
from opsctl.agent.manifest import Engine
from opsctl.agent.paths import Paths
from opsctl.agent.systemd import ENVIRONMENT
from opsctl.errors import OpsctlError, RefusedError
from opsctl.serving import adapter

COMPLETE = ".complete"
TIMEOUT_S = 3600.0
LOG_LINES = 20


def python_fits(wanted: str, have: tuple[int, int]) -> bool:
    """``>=3.10`` or ``3.12`` against this host's Python."""
    minimum = wanted.startswith(">=")
    version = tuple(int(part) for part in wanted.removeprefix(">=").split("."))
    return have >= version if minimum else have == version


def install_arguments(python: Path, lock: Path, wheels_url: str) -> list[str]:
    """pip, from nowhere but the gateway, and nothing whose hash is not in the lock."""
    argv = [str(python), "-I", "-m", "pip", "--isolated", "--disable-pip-version-check", "--no-input", "install",
            "--quiet", "--no-cache-dir", "--only-binary", ":all:", "--require-hashes", "--no-index",
            "--find-links", wheels_url]
    host = urlsplit(wheels_url).hostname
    if host:  # plain HTTP: what counts are the hashes, which are signed
        argv += ["--trusted-host", host]
    return [*argv, "--requirement", str(lock)]


def is_complete(paths: Paths, engine: Engine) -> bool:
    return (paths.engines / engine.directory / COMPLETE).is_file()


def build(paths: Paths, engine: Engine, wheels_url: str) -> bool:
    """Builds the engine's environment if it is not there; True when it was built now. Safe beside another build.

    A venv cannot be moved, so it is built in its place and counts only with ``.complete``, which comes last.

    Raises:
        RefusedError: this host's Python does not fit.
        OpsctlError: venv or pip failed, or the engine does not import.
    """
    if not python_fits(engine.python, sys.version_info[:2]):
        raise RefusedError("engine.python", f"{engine.name} {engine.version} wants Python {engine.python}, this host "
                           f"has {sys.version_info[0]}.{sys.version_info[1]}.",
                           hint="import the model with a lock for this Python")
    module = adapter(engine.name).module
    directory = paths.engines / engine.directory
    make_directory(paths.engines)
    with locked(paths.engines / f".{engine.directory}.lock"):
        if is_complete(paths, engine):
            return False
        remove_tree(directory)
        _run([sys.executable, "-I", "-m", "venv", str(directory)], "python3 -m venv",
             "apt-get install python3-venv: opsctl provision does it")
        lock = directory / "lock.txt"
        write_atomically(lock, engine.lock.encode())
        python = directory / "bin" / "python"
        _run(install_arguments(python, lock, wheels_url), f"pip install of {engine.name} {engine.version}",
             "are its wheels on the gateway? opsctl bundle build, then opsctl provision")
        _run([str(python), "-I", "-c", f"import {module}"], f"import {module}",
             "a shared library is missing on this host; the last line names it")
        make_read_only(directory)
        directory.chmod(0o755)
        sync_tree(directory)
        write_atomically(directory / COMPLETE, b"")
    return True


def _run(argv: list[str], what: str, hint: str) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False,
                              stdin=subprocess.DEVNULL, env=ENVIRONMENT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OpsctlError("engine.not_built", f"{what} could not be run: {error}.", hint=hint) from None
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()[-LOG_LINES:]
        raise OpsctlError("engine.not_built", f"{what} failed with exit code {done.returncode}.", hint=hint,
                          log_tail=lines)
