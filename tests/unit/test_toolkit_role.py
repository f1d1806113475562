"""The roles container_toolkit and cuda under a real Ansible, with a host's paths and programs stood in for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opsctl.lab.vendor.catalogue import fill
from opsctl.lab.vendor.debs import HERE
from opsctl.resources import resource

PLAY = """\
- hosts: here
  gather_facts: false
  tasks:
    - ansible.builtin.setup: {{gather_subset: ["!all"]}}
    - ansible.builtin.include_role: {{name: {role}, tasks_from: {entry}}}
"""
FOUR = ("nvidia-container-toolkit", "nvidia-container-toolkit-base", "libnvidia-container-tools",
        "libnvidia-container1")
INDEX = "\n".join(f"Package: {name}\nVersion: {version}\n" for name, versions in (
    *((name, ("1.18.2-1", "1.19.0-1")) for name in FOUR), ("cuda-toolkit-13-0", ("13.0.2-1",)),
    ("libnccl2", ("2.28.9-1+cuda13.0",)), ("libnccl-dev", ("2.28.9-1+cuda13.0",))) for version in versions)
DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build\n"
# What is installed stands in a file, which apt-get writes; the hold goes where apt-mark puts it.
FAKES = {
    "systemctl": 'case "$*" in *ActiveState*) echo inactive;; esac',
    "systemd-run": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "journalctl": "cat {root}/log",
    "dpkg": "",
    "apt-get": """case "$1" in -s) [ ! -e {root}/trap ] || echo "Inst cuda-drivers (580)"; exit 0;; esac
for word; do case "$word" in *=*[0-9]) case "$word" in *::*) ;; *)
  sed -i "/^${word%%=*}\t/d" {root}/installed
  printf '%s\\t%s\\tinstall\\tinstalled\\n' "${word%%=*}" "${word#*=}" >> {root}/installed;; esac;;
esac; done""",
    "apt-mark": "sed -i 's/\tinstall\t/\thold\t/' {root}/installed",
    "dpkg-query": "cat {root}/installed",
    "nvidia-smi": """[ -e {root}/loaded ] || exit 9
version=$(sed 's/.*x86_64  //; s/ .*//' {root}/loaded)
case "$*" in *index*) sed "s/.*/0, &, $version/" {root}/gpus;; *) cat {root}/gpus;; esac""",
}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The roles with every path of a host below a folder, a bundle's index, and stand-ins that write a log."""
    shutil.copytree(resource("roles"), tmp_path / "roles")
    for path in (tmp_path / "roles").rglob("*.*"):
        if path.is_file() and path.suffix in (".yml", ".py"):
            text = path.read_text()
            for place in ("/etc/opsctl", "/usr/local/lib/opsctl", "/etc/apt", "/etc/cdi", "/var/lib/opsctl"):
                text = text.replace(place, f"{tmp_path}/host{place}")
            path.write_text(text.replace("/proc/driver/nvidia/version", f"{tmp_path}/loaded")
                            .replace("    owner: root\n    group: root\n", ""))
    for place in ("etc/opsctl", "usr/local/lib", "etc/apt/apt.conf.d", "etc/apt/preferences.d", "var/lib/opsctl"):
        (tmp_path / "host" / place).mkdir(parents=True)
    (tmp_path / "apt/dists/s/main/binary-amd64").mkdir(parents=True)
    (tmp_path / "apt/dists/s/main/binary-amd64/Packages").write_text(INDEX)
    (tmp_path / "inventory.ini").write_text("here ansible_connection=local\n")
    (tmp_path / "ansible.cfg").write_text(f"[defaults]\nroles_path=roles\ninterpreter_python={sys.executable}\n")
    (tmp_path / "bin").mkdir()
    fakes = {name: f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/log\n' + body.replace("{root}", str(tmp_path)) + "\n"
             for name, body in FAKES.items()}
    fakes["nvidia-ctk"] = fill((HERE / "programs/nvidia_ctk.py").read_text(), {"UPSTREAM": "1.19.0"})
    for name, text in fakes.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "installed").touch()
    (tmp_path / "log").touch()
    (tmp_path / "gpus").write_text("GPU-a\n")
    (tmp_path / "loaded").write_text(DRIVER.format(version="580.126.09"))
    return tmp_path


def play(machine: Path, role: str, entry: str, given: dict[str, str], *options: str
         ) -> subprocess.CompletedProcess[str]:
    (machine / "play.yml").write_text(PLAY.format(role=role, entry=entry))
    (machine / "log").write_text("")
    known = {"base_package_source": "gateway", "base_bundle": str(machine), "base_suite": "s", **given}
    environment = {**os.environ, "ANSIBLE_HOME": str(machine / "home"), "LC_ALL": "C.UTF-8", "ANSIBLE_NOCOLOR": "1",
                   "PATH": f"{machine}/bin:{os.environ['PATH']}"}
    return subprocess.run([Path(sys.executable).parent / "ansible-playbook", "-i", "inventory.ini", "play.yml",
                           "--extra-vars", json.dumps(known), *options], cwd=machine, text=True, capture_output=True,
                          check=False, env=environment)


def toolkit(machine: Path, *options: str, version: str = "1.19.0", driver: str = "", entry: str = "main"
            ) -> subprocess.CompletedProcess[str]:
    given = {"container_toolkit_version": version, "container_toolkit_driver_version": driver}
    return play(machine, "container_toolkit", entry, given, *options)


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_toolkit_comes_is_held_and_a_second_run_changes_nothing(machine: Path) -> None:
    good(toolkit(machine))
    log = (machine / "log").read_text()
    assert "--unit=opsctl-container-toolkit.service --wait" in log
    assert f"--setenv=APT_CONFIG={machine}/host/etc/opsctl/apt.conf" in log
    rows = [line.split("\t") for line in (machine / "installed").read_text().splitlines()]
    assert sorted(rows) == sorted([name, "1.19.0-1", "hold", "installed"] for name in FOUR)
    preferences = (machine / "host/etc/apt/preferences.d/opsctl-container-toolkit").read_text()
    assert preferences.count("Pin: version 1.19.0-1\nPin-Priority: 990\n") == 4
    blacklist = (machine / "host/etc/apt/apt.conf.d/51opsctl-container-toolkit").read_text()
    assert '  "libnvidia-container1$";\n' in blacklist
    record = json.loads((machine / "host/etc/opsctl/container_toolkit.json").read_text())
    assert record["packages"] == dict.fromkeys(FOUR, "1.19.0-1")
    specification = (machine / "host/etc/cdi/nvidia.yaml").read_text()
    assert "libnvidia-ml.so.580.126.09" in specification
    assert "name: GPU-a\n" in specification
    assert "kind: nvidia.com/gpu\n" in specification
    assert "changed=0" in good(toolkit(machine))
    assert "apt-get" not in (machine / "log").read_text()
    assert "changed=0" in good(toolkit(machine, "--check"))


@pytest.mark.slow
def test_another_driver_or_gpu_makes_the_specification_anew(machine: Path) -> None:
    good(toolkit(machine))
    (machine / "loaded").write_text(DRIVER.format(version="595.71.05"))
    assert "is of driver 580.126.09, and the host has 595.71.05" in good(toolkit(machine, "--check"))
    assert "changed=1" in good(toolkit(machine, driver="595.71.05"))
    assert "libnvidia-ml.so.595.71.05" in (machine / "host/etc/cdi/nvidia.yaml").read_text()
    (machine / "gpus").write_text("GPU-b\n")
    assert "changed=1" in good(toolkit(machine))
    assert "GPU-b" in (machine / "host/etc/cdi/nvidia.yaml").read_text()
    (machine / "host/etc/cdi/nvidia.yaml").write_text("by hand\n")
    assert "is not as opsctl wrote it" in good(toolkit(machine, "--check"))
    assert "changed=1" in good(toolkit(machine))
    assert not list((machine / "host/etc/cdi/.opsctl").iterdir())


@pytest.mark.slow
def test_a_driver_that_is_to_come_is_seen_in_check_mode(machine: Path) -> None:
    good(toolkit(machine))
    told = good(toolkit(machine, "--check", driver="595.71.05"))
    assert "is of driver 580.126.09, and the host has 595.71.05" in told


@pytest.mark.slow
def test_down_again(machine: Path) -> None:
    good(toolkit(machine))
    told = good(toolkit(machine, "--check", version="1.18.2"))
    assert "nvidia-container-toolkit=1.18.2-1" in told
    assert "1.19.0-1" in (machine / "installed").read_text(), "check mode changes nothing"
    good(toolkit(machine, version="1.18.2"))
    assert "1.19.0" not in (machine / "installed").read_text()
    assert "1.18.2-1" in (machine / "host/etc/apt/preferences.d/opsctl-container-toolkit").read_text()


@pytest.mark.slow
def test_a_driver_that_apt_would_pull_ends_it_and_why_is_shown(machine: Path) -> None:
    (machine / "trap").touch()
    done = toolkit(machine)
    assert done.returncode == 2
    assert "the packages of container_toolkit on here were not changed" in done.stdout
    assert (machine / "installed").read_text() == ""
    assert not (machine / "host/etc/opsctl/container_toolkit.json").exists()


def test_the_preflight_names_the_nearest_versions(machine: Path) -> None:
    done = toolkit(machine, version="1.19.1", entry="preflight")
    assert done.returncode == 2
    assert "here names nvidia_container_toolkit_version=1.19.1" in done.stdout
    assert "the nearest that it has: 1.19.0, 1.18.2" in done.stdout
    good(toolkit(machine, entry="preflight"))


@pytest.mark.slow
def test_containers_need_a_driver(machine: Path) -> None:
    (machine / "loaded").unlink()
    done = toolkit(machine, entry="preflight")
    assert done.returncode == 2
    assert "has nvidia_container_toolkit_version=1.19.0 and no NVIDIA driver" in done.stdout
    good(toolkit(machine, driver="580.126.09", entry="preflight"))
    done = toolkit(machine)
    assert done.returncode == 2
    assert "nvidia.yaml was not written: no driver is loaded" in done.stdout + done.stderr


@pytest.mark.slow
def test_cuda_comes_as_its_own_packages_and_once(machine: Path) -> None:
    given = {"cuda_toolkit_version": "13.0.2", "cuda_nccl_version": "2.28.9"}
    good(play(machine, "cuda", "preflight", given))
    good(play(machine, "cuda", "main", given))
    rows = [line.split("\t")[:3] for line in (machine / "installed").read_text().splitlines()]
    assert sorted(rows) == [["cuda-toolkit-13-0", "13.0.2-1", "hold"], ["libnccl-dev", "2.28.9-1+cuda13.0", "hold"],
                            ["libnccl2", "2.28.9-1+cuda13.0", "hold"]]
    assert "changed=0" in good(play(machine, "cuda", "main", given))
    done = play(machine, "cuda", "preflight", {**given, "cuda_cudnn_version": "9.20.0.48"})
    assert done.returncode == 2
    assert "no libcudnn9-cuda-13 9.20.0.48; and no other version of it" in done.stdout
