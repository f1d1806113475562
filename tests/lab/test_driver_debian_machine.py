"""Debian's own driver, NVIDIA's real packages of non-free, through the same role and bundle: installed, built, held.

There is no such card here, nor a kernel that its module fits: what is said must be that it is installed, and that no
GPU answers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import opsctl, refused, succeeds
from conftest import NAME, LabFleet, lab_of_a_module, unwatched

from opsctl.bundle.private_apt import _machine_sources
from opsctl.errors import ExitCode
from opsctl.fleet.systems import default_system
from opsctl.lab.model import write_model

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(3600)]  # modules are built

OLD, NEW = "535.261.03", "535.309.01"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SOURCE = "nvidia_driver_source=debian\n"
LINES = f"""\\1
nvidia_driver_version="{OLD}"
{SOURCE}nvidia_driver_bundle_versions=["{NEW}"]
"""
STATE = "dpkg-query --show --showformat='${db:Status-Abbrev}${Package} ${Version}\\n'"
NO_GPU = "is installed, and no GPU answers"


@pytest.fixture(scope="module")
def debian(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFleet]:
    if not KEYRING.exists():
        pytest.skip(f"no {KEYRING} here")
    directory = tmp_path_factory.mktemp("debian") / "fleet"
    with lab_of_a_module(f"{NAME}-debian", 1, directory, "gpu-1=1xV100", suite="bookworm") as fleet:
        unwatched(directory)
        text = re.sub(r"nvidia_driver_.*\n", "", fleet.inventory.read_text())
        fleet.inventory.write_text(re.sub(r"(\[gpu:vars\])\n", LINES, text))
        shutil.copy(KEYRING, directory / "sources.d/debian.gpg")
        (directory / "sources.d/debian.sources").write_text("\n".join(
            f"Types: deb\nURIs: {' '.join(source.addresses)}\nSuites: {' '.join(source.suites)}\n"
            "Components: contrib non-free non-free-firmware\nSigned-By: sources.d/debian.gpg\n"
            for source in _machine_sources(default_system())))
        succeeds("bundle", "build", inventory=fleet.inventory)  # with the headers of Debian's kernel
        with_headers(fleet)
        fleet.inventory.write_text(fleet.inventory.read_text().replace(SOURCE, f"{SOURCE}nvidia_driver_own=[]\n"))
        write_model(directory / "v1.gguf", "mid")
        succeeds("model", "import", directory / "v1.gguf", "--service", "chat", "--version", "v1",
                 inventory=fleet.inventory)
        yield fleet


def with_headers(fleet: LabFleet) -> None:
    """As an image of the site's has them, for a kernel of Debian's: the one that runs here is this computer's."""
    with subprocess.Popen(["tar", "-C", fleet.directory / "bundle", "-cf", "-", "apt"], stdout=subprocess.PIPE) as tar:
        subprocess.run(["ssh", "-F", fleet.directory / ".opsctl/ssh_config", "gpu-1", "sudo tar -C /root -xf -"],
                       stdin=tar.stdout, check=True, timeout=120)
    assert tar.returncode == 0
    apt = "apt-get -qq -y -o Dir::Etc::SourceList=/root/list -o Dir::Etc::SourceParts=/dev/null"
    sh(fleet, f"echo 'deb [trusted=yes] file:/root/apt bookworm main' >/root/list && {apt} update && "
              f"{apt} install --no-install-recommends linux-headers-amd64 && rm -r /root/apt /root/list")


def sh(fleet: LabFleet, line: str, status: int = 0) -> str:
    done = fleet.run("gpu-1", ["sudo", "sh", "-c", line], timeout_s=300)
    assert done.returncode == status, f"{line}: {done.returncode}\n{done.stdout}{done.stderr}"
    return str(done.stdout)


def provision(fleet: LabFleet) -> str:
    """Ends as one must that brings a driver to a card that does not answer; what it says."""
    said = opsctl("provision", "--json", inventory=fleet.inventory, timeout_s=1800)
    assert said.returncode == ExitCode.MIXED, said.stdout + said.stderr
    return str(said.document["error"]) + said.stderr


def is_there(fleet: LabFleet, version: str) -> None:
    """The libraries, nvidia-smi and the module's source at one version, on hold; and a module built from it."""
    installed = dict(line[3:].split() for line in sh(fleet, STATE).splitlines() if line.startswith(("ii", "hi")))
    for name in ("libnvidia-ml1", "libcuda1", "nvidia-smi", "nvidia-kernel-dkms"):
        assert installed[name].startswith(version), (name, installed[name])
    assert {"libnvidia-ml1", "libcuda1", "nvidia-smi", "nvidia-kernel-dkms"} <= set(
        sh(fleet, "apt-mark showhold").split())
    assert not [name for name in installed if name.startswith("nvidia-driver-pinning")]
    built = sh(fleet, "dkms status")
    assert re.search(rf"nvidia-current.{version}, \S+, x86_64: installed", built), built
    assert "couldn't communicate with the NVIDIA driver" in sh(fleet, "nvidia-smi", status=9)


def test_it_is_installed_and_said_truthfully(debian: LabFleet) -> None:
    said = provision(debian)
    assert f"the driver {OLD} {NO_GPU}" in said, said
    is_there(debian, OLD)
    verified = opsctl("verify", "--json", inventory=debian.inventory)
    assert verified.returncode == ExitCode.FOUND_WRONG, verified.stdout + verified.stderr
    assert f"the driver {OLD} {NO_GPU}" in verified.stdout, verified.stdout


def test_a_newer_one_and_an_ordinary_upgrade_that_moves_nothing(debian: LabFleet) -> None:
    text = debian.inventory.read_text().replace(f'version="{OLD}"', f'version="{NEW}"')
    debian.inventory.write_text(text.replace(f'["{NEW}"]', f'["{OLD}"]'))
    said = provision(debian)
    assert f"the driver {NEW} {NO_GPU}" in said, said
    is_there(debian, NEW)
    sh(debian, "APT_CONFIG=/etc/opsctl/apt.conf apt-get -qq update && APT_CONFIG=/etc/opsctl/apt.conf "
               "DEBIAN_FRONTEND=noninteractive apt-get -qq -y upgrade")
    is_there(debian, NEW)


def test_upgrade_driver_leaves_it_alone(debian: LabFleet) -> None:
    said = opsctl("upgrade-driver", "--to", NEW, "--yes", "--json", inventory=debian.inventory)
    refused(said, ExitCode.REFUSED, "driver.debian")
