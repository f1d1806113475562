"""A machine of a lab with opsctl on it and nobody else: it is the whole fleet, without SSH."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (".venv", "opsctl", "playbooks", "roles", "templates", "inventory.example", "services.example",
           "tests/acceptance")
NOT_NEEDED = ("xllamacpp*", "numpy*", "mypy*", "ansiblelint", "__pycache__", "ruff", "*/bin/ruff")  # 250 MB less
HOME = "/srv/project"  # where it lies: the path that it has here may be below /tmp there, which no boot outlives
FLEET = "/root/fleet"


class Workstation:
    """``fleet``: its directory as it was made here, with a bundle."""

    def __init__(self, lab: Any, host: str, fleet: Path) -> None:
        self._lab = lab
        self._host = host
        self._send(ROOT, HOME, PROJECT, without=NOT_NEEDED)
        self._send(fleet, FLEET, (".",))
        # the virtual environment works under the path that it was made for, after each boot
        self.sh(f"echo 'L+ {ROOT} - - - - {HOME}' >/etc/tmpfiles.d/project.conf && "
                "systemd-tmpfiles --create /etc/tmpfiles.d/project.conf")
        self._adopt_python()

    def opsctl(self, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        return self.run(["env", "-C", FLEET, f"{ROOT}/.venv/bin/opsctl", *arguments], timeout_s=timeout_s)

    def succeeds(self, *arguments: str, timeout_s: float = 300) -> Any:
        done = self.opsctl(*arguments, "--json", timeout_s=timeout_s)
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A verb that goes on while something else is done."""
        words = shlex.join(["env", "-C", FLEET, f"{ROOT}/.venv/bin/opsctl", *arguments])
        return subprocess.Popen(["ssh", "-F", self._lab.directory / ".opsctl/ssh_config", self._host, words],
                                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def sh(self, line: str, timeout_s: float = 60) -> str:
        done = self.run(["sh", "-c", line], timeout_s=timeout_s)
        assert done.returncode == 0, f"{line}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def run(self, argv: list[str], *, stdin: str = "", timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = self._lab.run(self._host, argv, stdin=stdin, timeout_s=timeout_s)
        return done

    def write(self, name: str, text: str) -> None:
        """``name``: in the fleet's directory, or a whole path."""
        assert self.run(["tee", str(Path(FLEET) / name)], stdin=text).returncode == 0

    def _send(self, folder: Path, there: str, names: tuple[str, ...], without: tuple[str, ...] = ()) -> None:
        self.sh(f"mkdir -p {there}")
        excluded = [f"--exclude={pattern}" for pattern in without]
        with subprocess.Popen(["tar", "-C", folder, "-cf", "-", *excluded, *names], stdout=subprocess.PIPE) as tar:
            subprocess.run(["ssh", "-F", self._lab.directory / ".opsctl/ssh_config", self._host, "tar", "-C", there,
                            "-xf", "-"], stdin=tar.stdout, check=True, timeout=300)
        assert tar.returncode == 0

    def _adopt_python(self) -> None:
        """The environment's Python becomes the machine's own, of the same version: ours may lie where only we are."""
        venv, python = f"{ROOT}/.venv", "/usr/bin/python3"
        self.sh(f"test $({python} -c 'import sys; print(*sys.version_info[:2])' | tr ' ' .) = "
                f"{sys.version_info.major}.{sys.version_info.minor} && "
                f"sed -i 's|^home = .*|home = /usr/bin|' {venv}/pyvenv.cfg && "
                f"for name in python python3 python{sys.version_info.major}.{sys.version_info.minor}; do "
                f"ln -sf {python} {venv}/bin/$name; done")
