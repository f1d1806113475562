"""The wheel that hosts run: opsctl-host, opsctl-launch and the agent, built from the installed sources.

It holds ``opsctl/__init__.py``, ``errors.py``, ``opsctl/agent`` and ``opsctl/serving``. opsctl-host and the load
balancer's voice need nothing but Python's standard library; the exporter needs the two packages of
``opsctl/agent/agent.lock``, which are fetched into the bundle as the engines' wheels are. The same content gives the
same file, byte for byte; its version carries the content's digest, so a host that has this version has this content.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import opsctl
from opsctl.bundle.engine_wheels import DEFAULT_TARGET, Target, WantedLock, wanted_lock
from opsctl.bundle.process import last_lines, run
from opsctl.errors import OpsctlError
from opsctl.resources import PACKAGE

NAME = "opsctl-agent"
PROJECT = "agent/pyproject.toml"
LOCK = "agent/agent.lock"
PARTS = ("__init__.py", "errors.py", "agent", "serving")
VERSION_VARIABLE = "OPSCTL_AGENT_VERSION"
SOURCE_DATE_EPOCH = "1735689600"  # 2025-01-01: any fixed date after 1980, the first that a zip archive knows


def agent_files(package: Path = PACKAGE) -> dict[str, bytes]:
    """What the wheel is made of, by path below the build tree; no compiled or hidden file."""
    files = {"pyproject.toml": (package / PROJECT).read_bytes()}
    for path in _walk(package):
        files[f"opsctl/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    return files


def agent_version(files: dict[str, bytes]) -> str:
    """``0.1.0+1a2b3c4d``: opsctl's version and the first eight digits of the content's digest."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path}\0{len(files[path])}\0".encode() + files[path])
    return f"{opsctl.__version__}+{digest.hexdigest()[:8]}"


def build_agent_wheel(out: Path) -> Path:
    """Builds the wheel into the folder ``out`` and returns its path.

    Raises:
        OpsctlError: hatchling failed (``bundle.agent_not_built``).
    """
    files = agent_files()
    version = agent_version(files)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="opsctl-") as temporary:
        tree, built = Path(temporary) / "tree", Path(temporary) / "built"
        for path, content in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(content)
        done = run([sys.executable, "-I", "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)], cwd=tree,
                   environment={VERSION_VARIABLE: version, "SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH})
        wheels = sorted(built.glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise OpsctlError("bundle.agent_not_built", f"hatchling could not build the wheel {NAME} {version}.",
                              hint="pip install hatchling into opsctl's environment, if it is missing there",
                              log_tail=last_lines(done.stdout + done.stderr))
        target = out / wheels[0].name
        shutil.copyfile(wheels[0], target)
    return target


def requirement_line(wheel: Path) -> str:
    """``opsctl-agent==0.1.0+1a2b3c4d --hash=sha256:...``: what pip installs on hosts with --require-hashes."""
    version = wheel.name.split("-")[1]
    return f"{NAME}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


def agent_lock(package: Path = PACKAGE, target: Target = DEFAULT_TARGET) -> WantedLock:
    """What the agent's wheel needs, locked. It holds wheels for any Python only, so one lock serves every host."""
    return wanted_lock("agent.lock", (package / LOCK).read_text(encoding="utf-8"), target)


def requirements(wheel: Path) -> str:
    """All that pip installs into the agent's environment on hosts."""
    return requirement_line(wheel) + agent_lock().text


def _walk(package: Path) -> Iterator[Path]:
    for part in PARTS:
        top = package / part
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            hidden = any(name.startswith((".", "__pycache__")) for name in path.relative_to(package).parts)
            if path.is_file() and not hidden and path.suffix != ".pyc" and path != package / PROJECT:
                yield path
