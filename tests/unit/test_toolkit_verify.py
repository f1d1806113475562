"""What ``opsctl verify`` asks of the container toolkit and CUDA, with a host that is played; and nvidia-ctk."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from opsctl.fleet.model import Fleet, Host
from opsctl.lab.vendor.programs import nvidia_ctk
from opsctl.planning import first_changes, marks, roles_for
from opsctl.resources import resource
from opsctl.verifying import Wrong

VERSIONS = {"nvidia_container_toolkit_version": "1.19.0"}
RECORD = {"versions": VERSIONS,
          "packages": {"nvidia-container-toolkit": "1.19.0-1", "libnvidia-container1": "1.19.0-1"}}
HELD = "nvidia-container-toolkit hold installed 1.19.0-1\nlibnvidia-container1 hold installed 1.19.0-1\n"
ROWS = "0, GPU-a, 580.126.09\n1, GPU-b, 580.126.09\n"


@pytest.fixture(scope="module")
def tests(request: pytest.FixtureRequest) -> ModuleType:
    """The tests that ship; their mark is known where conftest.py of theirs is at work."""
    request.config.addinivalue_line("markers", "of(kind, sentence): whom the test asks, and what it says of each")
    spec = importlib.util.spec_from_file_location("toolkit_tests", resource("tests/acceptance") / "test_toolkit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Played:
    """A host as ``conftest.Asked`` is; ``cdi`` is what the role's program answers there."""

    variables: dict[str, Any] = field(default_factory=lambda: dict(VERSIONS))
    record: dict[str, Any] | None = field(default_factory=lambda: dict(RECORD))
    packages: str = HELD
    cdi: dict[str, Any] = field(default_factory=lambda: {"loaded": "580.126.09", "gpus": ["GPU-a"], "stale": ""})

    @property
    def host(self) -> Host:
        return Host("gpu-1", "192.0.2.11", ("gpu",), variables=self.variables)

    @property
    def machine(self) -> Any:
        return SimpleNamespace(file=lambda _: SimpleNamespace(exists=self.record is not None,
                                                              content_string=json.dumps(self.record)))

    def run(self, argv: list[str]) -> Any:
        return SimpleNamespace(rc=0, stdout=self.packages if argv[0] == "dpkg-query" else json.dumps(self.cdi))


def test_a_host_that_is_well(tests: ModuleType) -> None:
    tests.test_container_toolkit(Played())
    tests.test_cdi(Played())


@pytest.mark.parametrize("name", ["test_container_toolkit", "test_cuda", "test_cdi"])
def test_a_host_that_names_none_is_left_alone(tests: ModuleType, name: str) -> None:
    with pytest.raises(pytest.skip.Exception, match="names no"):
        getattr(tests, name)(Played({}))


@pytest.mark.parametrize(("name", "played", "found"), [
    ("test_container_toolkit", Played(record=None), "never given"),
    ("test_container_toolkit", Played({"nvidia_container_toolkit_version": "1.18.2"}), "of the last provision"),
    ("test_container_toolkit", Played(packages=HELD.replace("container1 hold", "container1 install")),
     "not so: libnvidia-container1"),
    ("test_container_toolkit", Played(packages=HELD.replace("1.19.0-1\nlib", "1.18.2-1\nlib")),
     "nvidia-container-toolkit 1.18.2-1"),
    ("test_cdi", Played(cdi={"loaded": "595.71.05", "gpus": [], "stale": "it is of driver 580.126.09"}), "580.126.09"),
    ("test_cdi", Played(cdi={"loaded": "", "gpus": [], "stale": ""}), "no driver in the kernel")])
def test_what_is_wrong_is_told(tests: ModuleType, name: str, played: Played, found: str) -> None:
    with pytest.raises(Wrong) as caught:
        getattr(tests, name)(played)
    assert found in caught.value.found
    assert caught.value.hint == "opsctl provision"


def test_the_plan_knows_the_roles_after_the_driver() -> None:
    host = Host("gpu-1", "192.0.2.11", ("gpu", "gateway"), variables={
        **VERSIONS, "nvidia_driver_version": "580.126.09", "cuda_toolkit_version": "13.0.2"})
    fleet = Fleet(Path("/f"), Path("/f/inventory.ini"), (host,), ())
    assert roles_for(fleet, host) == ("base", "gateway", "nvidia_driver", "container_toolkit", "cuda", "agent",
                                      "inference")
    assert "/etc/opsctl/container_toolkit.json" in marks(fleet, host)["container_toolkit"]
    told = [change.what for change in first_changes(fleet, host, ("container_toolkit", "cuda"), "root")]
    assert told[0] == ("nvidia-container-toolkit=1.19.0", "nvidia-container-toolkit-base=1.19.0",
                       "libnvidia-container-tools=1.19.0", "libnvidia-container1=1.19.0")
    assert ("cuda-toolkit-13-0=13.0.2",) in told


def test_the_labs_specification_has_the_real_ones_form() -> None:
    found = yaml.safe_load(nvidia_ctk.specification(ROWS))
    assert found["kind"] == "nvidia.com/gpu"
    assert [device["name"] for device in found["devices"]] == ["0", "GPU-a", "1", "GPU-b", "all"]
    nodes = [node["path"] for node in found["devices"][-1]["containerEdits"]["deviceNodes"]]
    assert nodes == ["/dev/nvidia0", "/dev/nvidia1"]
    (mount,) = found["containerEdits"]["mounts"]
    assert mount["hostPath"].endswith("libnvidia-ml.so.580.126.09")


def test_without_a_driver_the_lab_writes_none(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, nvidia_ctk.__file__, "cdi", "generate", "--output", tmp_path / "x.yaml"],
                          env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "failed to initialize NVML" in done.stderr
    assert not (tmp_path / "x.yaml").exists()
