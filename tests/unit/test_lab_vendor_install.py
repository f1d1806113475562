"""The vendor's packages installed for real: apt and dpkg in a throw-away root, an overlay over a base that a lab built.

Needs root, and a base (any lab on this computer has made one); nothing of this computer is touched, and all mounts are
in a mount namespace that ends with each command.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from vendor_kit import NEWEST, OLD, OPEN, PROPRIETARY, build, needs_tools, of

from opsctl.lab.state import CACHE_ROOT
from opsctl.lab.vendor.repository import Repository, sources_file

BASES = sorted((CACHE_ROOT / "base").glob("*/usr/bin/dpkg"))
pytestmark = [needs_tools, pytest.mark.skipif(os.geteuid() != 0 or not BASES or shutil.which("unshare") is None,
                                              reason="needs root and a base root: opsctl lab up makes one")]

# $1 base, $2 the machine's folder, $3 the repository; the rest runs inside.
ENTER = """
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
mkdir -p "$2/root/srv/vendor"
mount --bind "$3" "$2/root/srv/vendor"
cd "$2/root"
shift 3
exec chroot . "$@"
"""
PIN_FILE = "etc/apt/preferences.d/nvidia-driver-pin"
MODULE = "lib/modules/lab/nvidia.version"
FAILS = "etc/opsctl-lab-dkms-fails"
DRIVER = ("nvidia-driver-cuda", OPEN, "nvidia-modprobe", "nvidia-persistenced")


@dataclass
class Throwaway:
    """A root of its own. ``upper`` holds what differs from the base."""

    directory: Path
    repository: Repository

    @property
    def upper(self) -> Path:
        return self.directory / "upper"

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-ec", ENTER, "enter", BASES[0].parents[2],
             self.directory, self.repository.path.parent, *argv], capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8",
                                           "DEBIAN_FRONTEND": "noninteractive"})

    def apt(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return self.run("apt-get", "-q", "-y", *argv)

    def does(self, *argv: str) -> str:
        done = self.run(*argv)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def write(self, name: str, text: str = "") -> None:
        path = self.upper / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def packages(self) -> dict[str, str]:
        """Status and version of NVIDIA's packages: ``ii 580.126.09``."""
        lines = self.does("dpkg-query", "-W", "-f", "${Package} ${db:Status-Abbrev}${Version}\n").splitlines()
        words = (line.split() for line in lines if "+lab" in line)
        return {name: f"{status} {version.removesuffix('-1+lab')}" for name, status, version in words}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return build(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def machine(tmp_path: Path, repository: Repository) -> Throwaway:
    made = Throwaway(tmp_path, repository)
    for name in ("upper", "work", "root"):
        (tmp_path / name).mkdir()
    made.write("etc/apt/sources.list.d/vendor.sources", sources_file("file:/srv/vendor/apt", "/srv/vendor/key.asc",
                                                                          ["bookworm"]))
    probe = made.run("true")
    if probe.returncode:
        pytest.skip(f"no overlay here: {probe.stderr.strip()}")
    made.does("apt-get", "-q", "update")
    return made


def test_nothing_is_installed_outside_a_lab(machine: Throwaway) -> None:
    done = machine.apt("install", "nvidia-driver-pinning-580")
    assert done.returncode == 100
    assert "installs only on a machine of opsctl's lab" in done.stdout + done.stderr
    assert not (machine.upper / PIN_FILE).exists()
    assert not machine.packages()


def test_from_one_branch_to_the_other_and_back(machine: Throwaway) -> None:
    machine.write("etc/opsctl-lab")
    machine.does("apt-get", "-qy", "install", f"nvidia-driver-pinning-{OLD}")
    assert f"Pin: version {OLD}-*" in (machine.upper / PIN_FILE).read_text()
    machine.does("apt-get", "-qy", "install", *DRIVER, "nvidia-fabricmanager")
    assert (machine.upper / f"usr/{MODULE}").read_text() == f"{OLD}\n"
    assert f"libnvidia-ml.so.{OLD}" in machine.does("readlink", "-f", "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1")
    assert "libnvidia-ml.so.1" in machine.does("ldconfig", "-p")
    assert machine.does("stat", "-c", "%a %U", "/usr/bin/nvidia-modprobe").split() == ["4755", "root"]
    units = {name: machine.run("systemctl", "is-enabled", name).stdout.strip() for name in (
        "nvidia-persistenced", "nvidia-fabricmanager", "opsctl-lab-nvidia-load")}
    assert units == {"nvidia-persistenced": "enabled", "nvidia-fabricmanager": "disabled",
                     "opsctl-lab-nvidia-load": "enabled"}

    machine.does("apt-get", "-qy", "install", "nvidia-driver-pinning-595")
    machine.does("apt-get", "-qy", "install", *DRIVER)
    seen = machine.packages()
    assert {seen[name] for name in (*DRIVER, "libnvidia-ml1", "nvidia-fabricmanager")} == {f"ii {NEWEST}"}
    assert (machine.upper / f"usr/{MODULE}").read_text() == f"{NEWEST}\n"

    machine.does("apt-get", "-qy", "install", f"nvidia-driver-pinning-{OLD}")
    assert machine.apt("install", *DRIVER).returncode == 100, "a downgrade asks to be allowed"
    machine.does("apt-get", "-qy", "--allow-downgrades", "install", *DRIVER)
    assert {machine.packages()[name] for name in (*DRIVER, "nvidia-fabricmanager")} == {f"ii {OLD}"}
    machine.does("dpkg", "--purge", "nvidia-driver-pinning-595")
    assert f"Pin: version {OLD}-*" in (machine.upper / PIN_FILE).read_text()
    machine.does("apt-get", "-qy", "remove", f"nvidia-driver-pinning-{OLD}")
    assert (machine.upper / PIN_FILE).exists(), "a configuration file stays until its package is purged"


def test_a_module_that_does_not_build_leaves_none_until_it_does(machine: Throwaway) -> None:
    machine.write("etc/opsctl-lab")
    machine.does("apt-get", "-qy", "install", *of(OLD))
    machine.write(FAILS)
    done = machine.apt("install", *of(NEWEST))
    assert done.returncode == 100
    assert "Bad return status for module build" in done.stdout + done.stderr
    assert machine.packages()[OPEN] == f"iF {NEWEST}"
    assert machine.run("test", "-e", f"/{MODULE}").returncode == 1
    machine.does("rm", f"/{FAILS}")
    machine.does("dpkg", "--configure", "-a")
    assert {status[:2] for status in machine.packages().values()} == {"ii"}
    assert machine.does("cat", f"/{MODULE}") == f"{NEWEST}\n"


def test_the_flavour_is_that_of_the_package(machine: Throwaway) -> None:
    machine.write("etc/opsctl-lab")
    machine.does("apt-get", "-qy", "install", *of(NEWEST))
    assert machine.does("cat", "/lib/modules/lab/nvidia.flavour") == "open\n"
    machine.does("apt-get", "-qy", "install", PROPRIETARY)
    assert machine.does("cat", f"/{MODULE}", "/lib/modules/lab/nvidia.flavour") == f"{NEWEST}\nproprietary\n"
    machine.does("apt-get", "-qy", "purge", "nvidia-driver-cuda", PROPRIETARY, "nvidia-persistenced")
    assert machine.run("test", "-e", f"/{MODULE}").returncode == 1
    wants = "/etc/systemd/system/multi-user.target.wants/nvidia-persistenced.service"
    assert machine.run("test", "-L", wants).returncode == 1
