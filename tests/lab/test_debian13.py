"""Hosts with Debian 13 (apt 3.0, Python 3.13), one with a GPU: from bare to serving, seen whole, and to another driver.

They install from the bundle's own suite for them; the lab's inventory says what they run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import fingerprint
import pytest
from command import opsctl, refused, succeeds
from conftest import NAME, LabFleet, lab_of_a_module

from opsctl.errors import ExitCode
from opsctl.lab.model import write_model

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(2400)]

FIRST, OTHER = "580.126.09", "595.71.05"
LONG_S = 1800.0


@pytest.fixture(scope="module")
def trixie(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFleet]:
    """gpu-1 has one H200; it serves, and ops-1 watches it."""
    directory = tmp_path_factory.mktemp("debian13") / "fleet"
    with lab_of_a_module(f"{NAME}-debian13", 1, directory, "gpu-1=1xH200", suite="trixie") as fleet:
        built = succeeds("bundle", "build", "--json", inventory=fleet.inventory).document
        assert built["suites"] == ["trixie"], built
        write_model(directory / "v1.gguf", "mid")
        succeeds("model", "import", directory / "v1.gguf", "--service", "chat", "--version", "v1",
                 inventory=fleet.inventory)
        provisioned(fleet)
        yield fleet


def provisioned(fleet: LabFleet, *options: str) -> int:
    """How many changes it took."""
    said = opsctl("provision", "--json", *options, inventory=fleet.inventory, timeout_s=LONG_S)
    assert said.returncode == ExitCode.DONE, said.stdout + said.stderr
    return int(said.document["changed"])


def sh(fleet: LabFleet, host: str, line: str) -> str:
    done = fleet.run(host, ["sudo", "sh", "-c", line], timeout_s=120)
    assert done.returncode == 0, f"{host}: {line}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def sound(fleet: LabFleet) -> None:
    """Nothing to do, nothing wrong, nothing drifted."""
    for verb in ("verify", "drift"):
        said = opsctl(verb, inventory=fleet.inventory)
        assert said.returncode == ExitCode.DONE, f"{verb}: {said.stdout}{said.stderr}"


def test_they_are_what_they_are_said_to_be(trixie: LabFleet) -> None:
    for host in trixie.hosts:
        assert "VERSION_CODENAME=trixie" in sh(trixie, host, "cat /etc/os-release")
        assert "Suites: trixie\n" in sh(trixie, host, "cat /etc/apt/sources.list.d/opsctl.sources")
    assert sh(trixie, "gpu-1", "/opt/opsctl/engines/llamacpp-*/bin/python --version").startswith("Python 3.13.")
    assert sh(trixie, "gpu-1", "cat /usr/share/doc/nvidia-driver-cuda/README").splitlines()[0].endswith("for trixie")


def test_a_second_run_changes_nothing_and_all_is_sound(trixie: LabFleet) -> None:
    before = fingerprint.of_fleet(trixie)
    assert provisioned(trixie) == 0
    assert fingerprint.of_fleet(trixie) == before
    sound(trixie)
    checked = opsctl("check", "--json", inventory=trixie.inventory)
    assert checked.returncode == ExitCode.DONE, checked.stdout + checked.stderr


def test_the_drivers_packages_are_held_and_pinned(trixie: LabFleet) -> None:
    held = set(sh(trixie, "gpu-1", "apt-mark showhold").split())
    assert {"libnvidia-ml1", "nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-modprobe"} <= held
    policy = sh(trixie, "gpu-1", "apt-cache policy libnvidia-ml1")
    assert f"Installed: {FIRST}-1+lab\n  Candidate: {FIRST}-1+lab" in policy
    assert f"{OTHER}-1+lab" in policy  # the bundle has it, and it is nobody's wish
    upgraded = sh(trixie, "gpu-1", "apt-get -s --ignore-hold upgrade")  # the pin alone keeps it
    assert not re.findall(r"^Inst \S*(?:nvidia|libcuda)\S*", upgraded, re.MULTILINE), upgraded


def test_the_driver_goes_up_and_back_by_the_inventory(trixie: LabFleet) -> None:
    text = trixie.inventory.read_text()
    trixie.inventory.write_text(text.replace(FIRST, OTHER))
    refused(opsctl("provision", "--json", inventory=trixie.inventory), 5, "provision.preflight")  # its GPU is in use
    for version, before in ((OTHER, FIRST), (FIRST, OTHER)):
        trixie.inventory.write_text(text.replace(FIRST, version))
        sh(trixie, "gpu-1", "systemctl stop inference@chat.0")
        lines = len(sh(trixie, "gpu-1", "cat /var/log/dpkg.log").splitlines())
        assert provisioned(trixie, "--limit", "gpu-1")
        new = "\n".join(sh(trixie, "gpu-1", "cat /var/log/dpkg.log").splitlines()[lines:])
        assert f"upgrade libnvidia-ml1:amd64 {before}-1+lab {version}-1+lab" in new, new
        assert sh(trixie, "gpu-1", "nvidia-smi --query-gpu=driver_version --format=csv,noheader") == version
        sound(trixie)
