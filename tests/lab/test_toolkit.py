"""The container toolkit and CUDA on a host: brought, left as they are, refreshed after a driver, and back again."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from command import opsctl, refused, succeeds
from conftest import NAME, LabFleet, lab_of_a_module

from opsctl.errors import ExitCode
from opsctl.lab.model import write_model

pytestmark = [pytest.mark.lab, pytest.mark.slow]

LINES = """
[gpu:vars]
nvidia_container_toolkit_version="1.19.0"
nvidia_container_toolkit_bundle_versions=["1.18.2"]
cuda_toolkit_version="13.0.2"
cudnn_version="9.20.0.48"
nccl_version="2.28.9"
"""


@pytest.fixture(scope="module")
def fleet(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFleet]:
    directory = tmp_path_factory.mktemp("toolkit") / "fleet"
    with lab_of_a_module(f"{NAME}-toolkit", 1, directory, "gpu-1=2xH200") as made:
        made.inventory.write_text(made.inventory.read_text() + LINES)
        succeeds("bundle", "build", inventory=made.inventory)
        write_model(directory / "v1.gguf", "mid")
        succeeds("model", "import", directory / "v1.gguf", "--service", "chat", "--version", "v1", "--set", "threads=1",
                 inventory=made.inventory)
        succeeds("provision", inventory=made.inventory)
        yield made


def sh(fleet: LabFleet, line: str) -> str:
    done = fleet.run("gpu-1", ["sudo", "sh", "-c", line], timeout_s=60)
    assert done.returncode == 0, f"{line}: {done.returncode}\n{done.stdout}{done.stderr}"
    return str(done.stdout).strip()


def rewrite(fleet: LabFleet, key: str, version: str) -> None:
    text = fleet.inventory.read_text()
    fleet.inventory.write_text(re.sub(rf'^{key}="[^"]*"', f'{key}="{version}"', text, flags=re.MULTILINE))


def test_what_was_named_is_there_and_held_and_a_plan_is_empty(fleet: LabFleet) -> None:
    held = sh(fleet, "apt-mark showhold").split()
    assert {"nvidia-container-toolkit", "libnvidia-container1", "cuda-toolkit-13-0", "libcudnn9-cuda-13"} <= set(held)
    assert "libnvidia-ml.so.580.126.09" in sh(fleet, "cat /etc/cdi/nvidia.yaml")
    assert "cuda-drivers" not in sh(fleet, "dpkg-query --show --showformat='${Package} '")
    succeeds("verify", inventory=fleet.inventory)
    planned = succeeds("plan", "--json", inventory=fleet.inventory)
    assert planned.document["changed"] == 0, planned.stdout
    before = sh(fleet, "stat -c %Y /etc/cdi/nvidia.yaml /etc/opsctl/*.json")
    succeeds("provision", inventory=fleet.inventory)
    assert sh(fleet, "stat -c %Y /etc/cdi/nvidia.yaml /etc/opsctl/*.json") == before


def test_a_driver_and_an_older_toolkit(fleet: LabFleet) -> None:
    rewrite(fleet, "nvidia_driver_version", "595.71.05")
    rewrite(fleet, "nvidia_container_toolkit_version", "1.18.2")
    sh(fleet, "systemctl stop inference@chat.0")  # it holds the GPUs open
    succeeds("provision", inventory=fleet.inventory)
    assert "libnvidia-ml.so.595.71.05" in sh(fleet, "cat /etc/cdi/nvidia.yaml")
    assert "1.18.2" in sh(fleet, "nvidia-ctk --version")
    succeeds("verify", inventory=fleet.inventory)


def test_a_version_that_nobody_has_touches_nothing(fleet: LabFleet) -> None:
    rewrite(fleet, "nvidia_container_toolkit_version", "1.17.8")
    said = refused(opsctl("bundle", "build", "--json", inventory=fleet.inventory), ExitCode.REFUSED,
                   "bundle.no_such_version")
    assert "1.18.2" in said
    assert "1.18.2" in sh(fleet, "nvidia-ctk --version")
