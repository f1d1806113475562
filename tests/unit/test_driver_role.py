"""The role nvidia_driver under a real Ansible, on this machine, with every path and program of a host stood in for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opsctl.resources import resource


def pci(root: Path, address: str, vendor: str, kind: str, device: str) -> None:
    (root / address).mkdir(parents=True)
    for name, value in (("vendor", vendor), ("class", kind), ("device", device)):
        (root / address / name).write_text(f"{value}\n")


PLAY = """\
- hosts: here
  gather_facts: false
  tasks:
    - ansible.builtin.setup: {{gather_subset: ["!all"]}}
    - ansible.builtin.include_role: {{name: nvidia_driver, tasks_from: {entry}}}
"""
INDEX = """\
Package: nvidia-driver-pinning-580.126.09
Version: 580.126.09-1

""" + "\n".join(f"Package: {name}\nVersion: 580.126.09-1\n" for name in (
    "nvidia-driver-cuda", "nvidia-modprobe", "nvidia-persistenced", "nvidia-kernel-open-dkms", "nvidia-fabricmanager"))


@pytest.fixture
def role(tmp_path: Path) -> Path:
    """The role beside a PCI bus of its own, a bundle's index, and a systemd that knows no unit."""
    shutil.copytree(resource("roles"), tmp_path / "roles")
    facts = tmp_path / "roles/nvidia_driver/files/driver_facts.py"
    text = facts.read_text().replace('"/sys/bus/pci/devices"', repr(str(tmp_path / "pci")))
    facts.write_text(text.replace("LOCKS = (", "LOCKS = () and ("))
    (tmp_path / "apt/dists/s/main/binary-amd64").mkdir(parents=True)
    (tmp_path / "apt/dists/s/main/binary-amd64/Packages").write_text(INDEX)
    (tmp_path / "inventory.ini").write_text("here ansible_connection=local nvidia_driver_version=580.126.09\n")
    (tmp_path / "ansible.cfg").write_text(f"[defaults]\nroles_path=roles\ninterpreter_python={sys.executable}\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/systemctl").write_text(
        "#!/bin/sh\ncase \"$*\" in *LoadState*) echo not-found;; *ActiveState*) echo inactive;; esac\n")
    (tmp_path / "bin/systemctl").chmod(0o755)
    return tmp_path


def play(role: Path, entry: str, *options: str) -> subprocess.CompletedProcess[str]:
    (role / "play.yml").write_text(PLAY.format(entry=entry))
    given = {"nvidia_driver_package_source": "gateway", "nvidia_driver_bundle": str(role), "nvidia_driver_suite": "s",
             "nvidia_driver_own": []}
    environment = {**os.environ, "ANSIBLE_HOME": str(role / "home"), "LC_ALL": "C.UTF-8", "ANSIBLE_NOCOLOR": "1",
                   "PATH": f"{role}/bin:{os.environ['PATH']}"}
    return subprocess.run([Path(sys.executable).parent / "ansible-playbook", "-i", "inventory.ini", "play.yml",
                           "--extra-vars", json.dumps(given), *options], cwd=role, text=True, capture_output=True,
                          check=False, env=environment)


def test_the_preflight_says_why_in_one_sentence(role: Path) -> None:
    done = play(role, "preflight")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "here has nvidia_driver_version=580.126.09, and there is no NVIDIA GPU on its PCI bus" in done.stdout


@pytest.mark.skipif(shutil.which("dpkg-query") is None or Path("/proc/driver/nvidia/version").exists(),
                    reason="not a Debian, or a machine with a driver of its own")
def test_check_mode_tells_the_course_and_touches_nothing(role: Path) -> None:
    pci(role / "pci", "0000:1a:00.0", "0x10de", "0x030200", "0x2335")
    done = play(role, "main", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"nvidia-fabricmanager=580.126.09-1"' in done.stdout
    assert "failed=0" in done.stdout
    assert not Path("/etc/opsctl/driver.json").exists()


@pytest.mark.parametrize("states", ["inactive\\n\\nactivating", "inactive\\n\\nfailed"])
def test_a_change_that_runs_by_itself_is_waited_for(role: Path, states: str) -> None:
    """That of a dead controller, and the one that goes on after a boot."""
    wait = role / "roles/nvidia_driver/tasks/wait.yml"
    wait.write_text(wait.read_text().replace("retries: 180", "retries: 1").replace("delay: 10", "delay: 0"))
    (role / "bin/systemctl").write_text(
        "#!/bin/sh\ncase \"$*\" in *driver.service*driver-continue.service*) "
        f"printf '{states}\\n';; *) echo inactive;; esac\n")
    assert play(role, "wait").returncode == (2 if "activating" in states else 0)


FAKES = {
    "systemctl": 'case "$*" in *ActiveState*) echo inactive;; is-active*) echo active;; esac',
    "systemd-run": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "journalctl": "cat {log}",
    "dpkg": "", "apt-mark": "", "apt-get": '[ ! -e {root}/refuse ] || echo "Remv haproxy [2.6]"',
    "apt-cache": "",
    # Before the change nothing is installed; who asks for one package asks after it.
    "dpkg-query": 'case "$*" in *Want*) [ ! -e {root}/settled ] || cat {root}/settled;; '
                  '*nvidia-fabricmanager) echo "installed 580.126.09-1";; esac',
    "modprobe": "", "modinfo": "echo 580.126.09",
    "nvidia-modprobe": 'echo "NVRM version: NVIDIA UNIX Open Kernel Module  580.126.09  Release" > {root}/loaded',
    "nvidia-smi": "echo 580.126.09, 00000000:1A:00.0, GPU-a",
}


BOOT_ID = "host/proc/sys/kernel/random/boot_id"
INSTALLED = "".join(f"{name}\\t580.126.09-1\\thold\\tinstalled\\n" for name in (
    "nvidia-driver-pinning-580.126.09", "nvidia-driver-cuda", "nvidia-modprobe", "nvidia-persistenced",
    "nvidia-kernel-open-dkms", "nvidia-fabricmanager"))


@pytest.fixture
def machine(role: Path) -> Path:
    """The role with every path of a host below a folder, and stand-ins for the host's programs that write a log."""
    for path in (role / "roles/nvidia_driver").rglob("*.*"):
        if path.is_file():
            text = path.read_text()
            for place in ("/etc/opsctl/driver.json", "/usr/local/lib/opsctl", "/etc/apt/apt.conf.d",
                          "/etc/apt/preferences.d", "/var/lib/opsctl", "/proc/sys/kernel/random/boot_id"):
                text = text.replace(place, f"{role}/host{place}")
            path.write_text(text.replace("/proc/driver/nvidia/version", f"{role}/loaded")
                            .replace("/run/opsctl-driver.stopped", f"{role}/stopped")
                            .replace("    owner: root\n    group: root\n", ""))
    for place in ("etc/opsctl", "usr/local/lib", "etc/apt/apt.conf.d", "etc/apt/preferences.d",
                  "proc/sys/kernel/random"):
        (role / "host" / place).mkdir(parents=True)
    (role / BOOT_ID).write_text("first\n")
    # The services' own tasks are base's, and tested there.
    (role / "roles/base/tasks/unit.yml").write_text("---\n- name: Nothing.\n  ansible.builtin.debug:\n")
    for name, body in FAKES.items():
        (role / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {role}/log\n'
                                         + body.replace("{log}", f"{role}/log").replace("{root}", str(role)) + "\n")
        (role / "bin" / name).chmod(0o755)
    pci(role / "pci", "0000:1a:00.0", "0x10de", "0x030200", "0x2335")
    return role


def test_the_role_brings_a_driver(machine: Path) -> None:
    done = play(machine, "main", "--extra-vars", json.dumps({"nvidia_driver_gpu_uuids": ["GPU-a"]}))
    assert done.returncode == 0, done.stdout + done.stderr
    log = (machine / "log").read_text().splitlines()
    run = next(line for line in log if line.startswith("systemd-run"))
    assert "--unit=opsctl-driver.service --wait" in run
    assert "--setenv=APT_CONFIG=/etc/opsctl/apt.conf" in run
    acts = [line.split()[0] for line in log if line.split()[0] in ("apt-get", "apt-mark", "nvidia-modprobe")]
    assert acts == [*["apt-get"] * 5, "apt-mark", "nvidia-modprobe"], "both are tried at once, then one by one"
    record = json.loads((machine / "host/etc/opsctl/driver.json").read_text())
    assert (record["version"], record["flavour"], record["fabric_manager"]) == ("580.126.09", "open", True)
    assert record["packages"]["nvidia-fabricmanager"] == "580.126.09-1"
    assert "libnvidia-" in (machine / "host/etc/apt/apt.conf.d/51opsctl-nvidia").read_text()


@pytest.mark.slow
def test_services_that_a_killed_change_left_stopped_are_started(machine: Path) -> None:
    """Nothing else is to be done there, and a run tells that it changed something."""
    names = ("nvidia-driver-pinning-580.126.09", "nvidia-driver-cuda", "nvidia-modprobe", "nvidia-persistenced",
             "nvidia-kernel-open-dkms", "nvidia-fabricmanager")
    (machine / "settled").write_text("".join(f"{name}\t580.126.09-1\thold\tinstalled\n" for name in names))
    (machine / "loaded").write_text("NVRM version: NVIDIA UNIX Open Kernel Module  580.126.09  Release\n")
    done = play(machine, "main")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "systemd-run" not in (machine / "log").read_text()
    (machine / "stopped").write_text("nvidia-dcgm.service\n")
    done = play(machine, "main")
    assert done.returncode == 0, done.stdout + done.stderr
    log = (machine / "log").read_text()
    assert "systemctl start nvidia-dcgm.service\n" in log
    assert "apt-get" not in log
    assert not (machine / "stopped").exists()


def test_a_gpu_that_is_missing_is_named(machine: Path) -> None:
    done = play(machine, "main", "--extra-vars", json.dumps({"nvidia_driver_gpu_uuids": ["GPU-a", "GPU-b"]}))
    assert done.returncode == 2
    assert "here: 1 of the 2 GPUs in gpu_uuids are missing: GPU-b." in done.stdout


def test_a_change_that_failed_shows_why(machine: Path) -> None:
    (machine / "refuse").touch()
    done = play(machine, "main")
    assert done.returncode == 2
    assert "the driver of here was not changed to 580.126.09" in done.stdout
    assert "apt-mark" not in (machine / "log").read_text()


def test_a_machine_that_opsctl_runs_on_is_not_rebooted(machine: Path) -> None:
    (machine / "bin/nvidia-modprobe").write_text("#!/bin/sh\nexit 1\n")
    done = play(machine, "main")
    assert done.returncode == 2
    assert "reboot that machine by hand, then opsctl provision again" in done.stdout


@pytest.mark.slow
def test_a_first_driver_that_was_cut_off_before_its_reboot_gets_it(machine: Path) -> None:
    """All packages are there, no module is loaded: the reboot is still to come, once, or it was in vain."""
    (machine / "bin/nvidia-modprobe").write_text("#!/bin/sh\nexit 1\n")
    assert "reboot that machine by hand" in play(machine, "main").stdout
    one, all_of_them = 'echo "installed 580.126.09-1"', f'printf "{INSTALLED}"'
    (machine / "bin/dpkg-query").write_text(
        f'#!/bin/sh\ncase "$*" in *nvidia-fabricmanager) {one};; *) {all_of_them};; esac\n')
    (machine / "log").unlink()
    again = play(machine, "main")
    assert "apt-get" not in (machine / "log").read_text(), "all is installed"
    assert "reboot that machine by hand, then opsctl provision again" in again.stdout
    (machine / BOOT_ID).write_text("second\n")
    rebooted = play(machine, "main")
    assert rebooted.returncode == 2
    assert "here: the module in the kernel is not there where 580.126.09 is wanted" in rebooted.stdout


@pytest.mark.slow
def test_debians_own_driver_where_no_gpu_answers(machine: Path) -> None:
    """Debian's own names, preferences in the place of a pin, and the truth about a module that is not there."""
    shutil.rmtree(machine / "pci")
    pci(machine / "pci", "0000:1a:00.0", "0x10de", "0x030200", "0x1db1")
    shutil.copy(Path(__file__).parent / "fixtures/driver/debian12-packages.txt",
                machine / "apt/dists/s/main/binary-amd64/Packages")
    (machine / "bin/nvidia-modprobe").write_text("#!/bin/sh\nexit 1\n")
    (machine / "bin/modinfo").write_text("#!/bin/sh\ncase \"$*\" in *-current) echo 535.309.01;; *) exit 1;; esac\n")
    (machine / "bin/nvidia-smi").write_text(
        "#!/bin/sh\necho \"NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\"; exit 9\n")
    given = ["--extra-vars", json.dumps({"nvidia_driver_source": "debian", "nvidia_driver_version": "535.309.01"})]
    preferences = machine / "host/etc/apt/preferences.d/opsctl-nvidia"
    done = play(machine, "main", *given)
    assert "reboot that machine by hand" in done.stdout, done.stdout + done.stderr
    asked = [line for line in (machine / "log").read_text().splitlines() if line.startswith("apt-get -y")]
    assert len(asked) == 1, "no transaction for a pin"
    assert " libcuda1=535.309.01-0+deb12u1 " in asked[0]
    assert " nvidia-persistenced=535.171.04-1~deb12u1" in asked[0]
    text = preferences.read_text()
    assert re.match("Explanation: .+\nExplanation: .+\nPackage: .*libcuda1.*\nPin: version 535.309.01-0", text), text
    record = json.loads((machine / "host/etc/opsctl/driver.json").read_text())
    assert (record["pin"], record["flavour"]) == ("", "proprietary")
    (machine / "settled").write_text("".join(f"{name}\t{version}\thold\tinstalled\n"
                                             for name, version in record["packages"].items()))
    (machine / BOOT_ID).write_text("second\n")
    rebooted = play(machine, "main", *given)
    assert rebooted.returncode == 2
    assert "here: the module in the kernel is not there where 535.309.01 is wanted" in rebooted.stdout
    assert "no GPU answers; nvidia-smi says: NVIDIA-SMI has failed" in rebooted.stdout
    assert "the module on disk" not in rebooted.stdout
    (machine / "apt/dists/s/main/binary-amd64/Packages").write_text(INDEX.replace("-open-", "-"))
    play(machine, "main")
    assert not preferences.exists(), "the vendor's pinning package does it"
