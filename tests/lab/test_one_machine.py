"""One workstation that is the whole fleet, without SSH: one instance is an outage and refused, two are lossless."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import succeeds

from opsctl.lab.model import write_model

pytestmark = [pytest.mark.lab, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (".venv", "opsctl", "playbooks", "roles", "templates", "inventory.example", "services.example")
NOT_NEEDED = ("xllamacpp*", "numpy*", "mypy*", "ansiblelint", "__pycache__", "ruff", "*/bin/ruff")  # 250 MB less
FLEET = "/root/fleet"
HOST = "ops-1"
INVENTORY = "".join(f"[{group}]\nthis ansible_connection=local\n" for group in ("gpu", "lb", "gateway"))
SERVICES = "chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n  first_release: v1\n  instances_per_host: {count}\n"


class Workstation:
    """A bare machine with opsctl on it, and nobody else."""

    def __init__(self, lab: Any) -> None:
        self._lab = lab

    def opsctl(self, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = self._lab.run(
            HOST, ["env", "-C", FLEET, f"{ROOT}/.venv/bin/opsctl", *arguments], timeout_s=timeout_s)
        return done

    def succeeds(self, *arguments: str) -> Any:
        done = self.opsctl(*arguments, "--json")
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def write(self, name: str, text: str) -> None:
        assert self._lab.run(HOST, ["tee", f"{FLEET}/{name}"], stdin=text).returncode == 0


@pytest.fixture
def workstation(own_lab: Any, tmp_path: Path) -> Iterator[Workstation]:
    fleet = tmp_path / "workstation"
    fleet.mkdir()
    (fleet / "inventory.ini").write_text(INVENTORY)
    (fleet / "services.yml").write_text(SERVICES.format(count=1))
    succeeds("init", fleet)
    succeeds("bundle", "build", inventory=fleet / "inventory.ini")
    write_model(tmp_path / "small.gguf", "small")
    for version, slots in (("v1", 4), ("v2", 5)):
        succeeds("model", "import", tmp_path / "small.gguf", "--service", "chat", "--version", version,
                 "--set", f"parallel={slots}", "--set", "drain_timeout_s=0", inventory=fleet / "inventory.ini")
    _send(own_lab, ROOT, str(ROOT), PROJECT, without=NOT_NEEDED)
    _send(own_lab, fleet, FLEET, (".",))
    _adopt_python(own_lab)
    yield Workstation(own_lab)


def _send(lab: Any, folder: Path, there: str, names: tuple[str, ...], without: tuple[str, ...] = ()) -> None:
    """A copy under the same path, so that the virtual environment works there."""
    assert lab.run(HOST, ["mkdir", "-p", there]).returncode == 0
    excluded = [f"--exclude={pattern}" for pattern in without]
    with subprocess.Popen(["tar", "-C", folder, "-cf", "-", *excluded, *names], stdout=subprocess.PIPE) as tar:
        subprocess.run(["ssh", "-F", lab.directory / ".opsctl/ssh_config", HOST, "tar", "-C", there, "-xf", "-"],
                       stdin=tar.stdout, check=True, timeout=300)
    assert tar.returncode == 0


def _adopt_python(lab: Any) -> None:
    """The environment's Python becomes the machine's own, of the same version: ours may lie where only we have it."""
    venv, python = f"{ROOT}/.venv", "/usr/bin/python3"
    script = (f"test $({python} -c 'import sys; print(*sys.version_info[:2])' | tr ' ' .) = "
              f"{sys.version_info.major}.{sys.version_info.minor} && "
              f"sed -i 's|^home = .*|home = /usr/bin|' {venv}/pyvenv.cfg && "
              f"for name in python python3 python{sys.version_info.major}.{sys.version_info.minor}; do "
              f"ln -sf {python} {venv}/bin/$name; done")
    done = lab.run(HOST, ["sh", "-c", script])
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_instance_is_refused_and_two_lose_nothing(workstation: Workstation) -> None:
    workstation.succeeds("provision")
    refused = workstation.opsctl("update-model", "--version", "v2", "--yes", "--json")
    assert refused.returncode == 5, refused.stderr
    error = json.loads(refused.stdout)["error"]
    assert error["code"] == "update.outage"
    assert " s by the last change" in error["message"]  # its first start was measured
    assert "--allow-outage" in error["hint"]

    forced = workstation.succeeds("update-model", "--version", "v2", "--yes", "--allow-outage")
    assert forced["instances"][0]["out_of_rotation_s"] > 0
    assert workstation.succeeds("rollback", "--yes", "--allow-outage")["to"] == "v1"

    workstation.write("services.yml", SERVICES.format(count=2))
    workstation.succeeds("provision")
    ended: list[subprocess.CompletedProcess[str]] = []
    load = threading.Thread(target=lambda: ended.append(workstation.opsctl(
        "lab", "load", "--clients", "8", "--seconds", "45", "--tokens", "400", "--json")))
    load.start()
    try:
        done = workstation.succeeds("update-model", "--version", "v2", "--yes", "--allow-bad")
        assert [row["state"] for row in done["instances"]] == ["moved", "moved"]
    finally:
        load.join()
    assert ended[0].returncode == 0, ended[0].stdout + ended[0].stderr
    seen = json.loads(ended[0].stdout)
    assert seen["lost"] == 0
    assert seen["whole"] > 50
