"""Somebody swaps a library and takes a hold away: drift names both and who did it, provision mends, drift is silent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from command import opsctl, succeeds
from conftest import NAME, LabFleet, lab_of_a_module, unwatched

from opsctl.errors import ExitCode
from opsctl.lab.model import write_model

pytestmark = [pytest.mark.lab, pytest.mark.slow]

RIGHT, OTHER = "580.126.09-1+lab", "595.71.05-1+lab"
# As a person would: a package from elsewhere, and dpkg told not to ask.
SWAP = (f"cd /root && APT_CONFIG=/etc/opsctl/apt.conf apt-get -q download libnvidia-ml1={OTHER} && "
        "dpkg --force-depends -i libnvidia-ml1_*.deb && apt-mark hold libnvidia-ml1")


@pytest.fixture(scope="module")
def drifting(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFleet]:
    """gpu-1 has two H200 on a board with NVSwitches, and serves."""
    directory = tmp_path_factory.mktemp("drift") / "fleet"
    with lab_of_a_module(f"{NAME}-drift", 1, directory, "gpu-1=2xH200") as fleet:
        unwatched(directory)
        succeeds("bundle", "build", inventory=fleet.inventory)
        write_model(directory / "v1.gguf", "mid")
        succeeds("model", "import", directory / "v1.gguf", "--service", "chat", "--version", "v1",
                 inventory=fleet.inventory)
        succeeds("provision", inventory=fleet.inventory)
        yield fleet


def sh(fleet: LabFleet, host: str, line: str) -> None:
    done = fleet.run(host, ["sudo", "sh", "-c", line], timeout_s=120)
    assert done.returncode == 0, f"{host}: {line}: {done.returncode}\n{done.stdout}{done.stderr}"


def looked(fleet: LabFleet, exit_code: int) -> dict[tuple[str, str], dict[str, Any]]:
    """The differences of gpu-1, by layer and what differs; no other host has any."""
    said = opsctl("drift", "--json", inventory=fleet.inventory)
    assert said.returncode == exit_code, said.stdout + said.stderr
    hosts = {one["host"]: one["differences"] for one in said.document["hosts"]}
    assert not [name for name, differences in hosts.items() if name != "gpu-1" and differences], said.stdout
    return {(one["layer"], one["what"]): one for one in hosts["gpu-1"]}


def test_what_was_changed_behind_our_back_is_named_and_mended(drifting: LabFleet) -> None:
    assert looked(drifting, ExitCode.DONE) == {}
    sh(drifting, "gpu-1", "systemctl stop inference@chat.0")
    sh(drifting, "gpu-1", SWAP)
    sh(drifting, "gpu-1", "apt-mark unhold nvidia-modprobe")
    found = looked(drifting, ExitCode.PENDING)
    library = found["packages", "libnvidia-ml1"]
    assert (library["wanted"], library["found"], library["culprit"]["by"]) == (RIGHT, OTHER, "dpkg"), library
    assert ("library", "libnvidia-ml.so.1") in found, found
    hold = found["holds", "nvidia-modprobe"]
    assert "apt-mark unhold nvidia-modprobe" in hold["culprit"]["command"], hold
    assert library["fix"] == hold["fix"] == "opsctl provision --limit gpu-1"
    succeeds("provision", inventory=drifting.inventory)
    assert looked(drifting, ExitCode.DONE) == {}
