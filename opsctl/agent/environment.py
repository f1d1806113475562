"""The engine's environment on a host: a venv built from the release's hashed lock out of the gateway's wheels."""

from __future__ import annotations

import re
import subprocess
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import Request

from opsctl.agent.durable import locked, make_directory, make_read_only, remove_tree, sync_tree, write_atomically
from opsctl.agent.fetch import open_directly, reason
from opsctl.agent.manifest import Engine
from opsctl.agent.paths import Paths
from opsctl.agent.systemd import ENVIRONMENT
from opsctl.errors import OpsctlError, RefusedError
from opsctl.serving import adapter

COMPLETE = ".complete"
# An estimate, so that what cannot fit is refused first: wheels are zip files, and code unpacks to two or three times
# its size (llama.cpp's 34 MB wheel makes 80 MB); beside them pip and the venv itself.
UNPACKED = 3
VENV_BYTES = 64 * 1024 * 1024
PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)
HREF = re.compile(r'href="([^"]+\.whl)(?:#[^"]*)?"', re.IGNORECASE)
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


def check_python(engine: Engine) -> None:
    """Raises RefusedError when this host's Python does not fit."""
    if not python_fits(engine.python, sys.version_info[:2]):
        raise RefusedError("engine.python", f"{engine.name} {engine.version} wants Python {engine.python}, this host "
                           f"has {sys.version_info[0]}.{sys.version_info[1]}.",
                           hint="import the model with a lock for this Python")


def wheels_of(lock: str, listing: str) -> list[list[str]]:
    """For each pinned package the wheels that ``listing``, an HTML index, has of it: hrefs. One of each is taken."""
    found: dict[tuple[str, str], list[str]] = {}
    for href in HREF.findall(listing):
        name, _, rest = unquote(href).rpartition("/")[2].partition("-")
        found.setdefault((_normal(name), rest.partition("-")[0].lower()), []).append(href)
    pinned = {(_normal(name), version.lower()) for name, version in PIN.findall(lock)}
    return [found[pin] for pin in sorted(pinned) if pin in found]


def needed_bytes(paths: Paths, engine: Engine, wheels_url: str) -> int:
    """What building the environment takes on the disk, estimated from its wheels on the gateway; 0 when it is there.

    Raises:
        OpsctlError: the gateway does not list its wheels.
    """
    if is_complete(paths, engine):
        return 0
    try:
        with open_directly(Request(wheels_url)) as response:  # noqa: S310 - the gateway's address
            choices = wheels_of(engine.lock, response.read().decode(errors="replace"))
        return VENV_BYTES + UNPACKED * sum(max(_size(urljoin(wheels_url, href)) for href in one) for one in choices)
    except (OSError, HTTPException) as error:
        raise OpsctlError("fetch.failed", f"{wheels_url} could not be asked for the wheels of {engine.name} "
                          f"{engine.version}: {reason(error, wheels_url)}.",
                          hint="is the gateway up, and its port open from this host?") from None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _size(url: str) -> int:
    with open_directly(Request(url, method="HEAD")) as response:  # noqa: S310 - the gateway's address
        return int(response.headers.get("Content-Length", 0))


def build(paths: Paths, engine: Engine, wheels_url: str) -> bool:
    """Builds the engine's environment if it is not there; True when it was built now. Safe beside another build.

    A venv cannot be moved, so it is built in its place and counts only with ``.complete``, which comes last.

    Raises:
        RefusedError: this host's Python does not fit.
        OpsctlError: venv or pip failed, or the engine does not import.
    """
    check_python(engine)
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
