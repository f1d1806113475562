"""What the role nvidia_driver runs on hosts, on recorded outputs and on a real apt that only simulates."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from rendering import render

from opsctl.resources import resource
from opsctl.stack.__main__ import answer
from opsctl.stack.driver import PIN

FILES = resource("roles") / "nvidia_driver" / "files"
ROLE = {key: value for file in ("defaults", "vars")
        for key, value in yaml.safe_load((FILES.parent / file / "main.yml").read_text()).items()}
# What look.yml passes besides where the packages come from.
ASKED = [name for key in ("patterns", "exact", "open", "proprietary", "fabric", "own")
         for name in ROLE[f"nvidia_driver_{key}"]]
VERSION = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.126.09  Release Build  (dvs-builder@U22)
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14+deb12u1)
"""


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FILES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pci(root: Path, address: str, vendor: str, kind: str, device: str) -> None:
    (root / address).mkdir(parents=True)
    for name, value in (("vendor", vendor), ("class", kind), ("device", device)):
        (root / address / name).write_text(f"{value}\n")


class TestFacts:
    facts = program("driver_facts")

    def test_gpus_in_pci_order_and_switches(self, tmp_path: Path) -> None:
        for bus in ("3b", "1a", "9c", "5d", "bb", "4f"):
            pci(tmp_path, f"0000:{bus}:00.0", "0x10de", "0x030200", f"0x20{bus}")
        pci(tmp_path, "0000:0a:00.0", "0x10de", "0x068000", "0x22a3")
        pci(tmp_path, "0000:3b:00.1", "0x10de", "0x040300", "0x22ba")  # a GPU's audio device is none
        pci(tmp_path, "0000:00:02.0", "0x8086", "0x030000", "0x46a6")
        assert self.facts.pci_devices(tmp_path) == (["201a", "203b", "204f", "205d", "209c", "20bb"], 1)
        assert self.facts.pci_devices(tmp_path / "none") == ([], 0)

    def test_packages_by_their_states(self) -> None:
        listed = ("nvidia-driver-cuda\t580.126.09-1+lab\thold\tinstalled\n"
                  "nvidia-old\t550.1.1-1\tdeinstall\tconfig-files\n"
                  "nvidia-kernel-open-dkms\t580.126.09-1+lab\thold\thalf-configured\nlibcuda1\t\tunknown\tnot-installed\n")
        assert self.facts.packages(listed) == (
            {"nvidia-driver-cuda": "580.126.09-1+lab", "nvidia-kernel-open-dkms": "580.126.09-1+lab"},
            {"nvidia-kernel-open-dkms": "half-configured"}, ["nvidia-driver-cuda", "nvidia-kernel-open-dkms"])

    @pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="not a Debian")
    def test_a_hosts_own_dpkg_is_asked_for_all_of_the_driver(self, tmp_path: Path) -> None:
        """Real dpkg-query: what has no "nvidia" in its name counts, and so does what comes with the driver."""
        of_driver = ["libnvsdm", "libnvcuvid1", "libnvoptix1", "libxnvctrl0", "libegl-nvidia0", "nvidia-modprobe",
                     PIN + "580.126.09"]
        states = {"nvidia-kernel-open-dkms": "half-configured", "nvlsm": "half-installed"}
        own = [f"linux-headers-{os.uname().release}", "linux-headers-amd64", "nvlsm"]
        status = [f"Package: {name}\nStatus: hold ok {states.get(name, 'installed')}\nMaintainer: x\nDescription: x\n"
                  f"Architecture: amd64\nVersion: 580.126.09-1\n" for name in
                  (*of_driver, *own, *states, "cuda-compat-13-0", "haproxy")]
        (tmp_path / "status").write_text("\n".join(dict.fromkeys(status)))
        (tmp_path / "info").mkdir()
        done = subprocess.run([sys.executable, "-", "gateway", *ASKED, "nvlsm"], text=True, capture_output=True,
                              check=True, input=(FILES / "driver_facts.py").read_text(),
                              env={**os.environ, "DPKG_ADMINDIR": str(tmp_path)})
        seen = json.loads(done.stdout)["seen"]
        assert set(seen["installed"]) == {*of_driver, *own, *states}
        assert seen["installed"]["nvidia-kernel-open-dkms"] == "580.126.09-1"
        assert seen["states"] == states

    @pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="not a Debian")
    def test_a_module_that_is_there_by_half_is_told_from_its_version(self, tmp_path: Path) -> None:
        """Both programs, as the role asks them: the other flavour's module is named, so that apt may remove it."""
        names = ("nvidia-driver-cuda", "nvidia-modprobe", "nvidia-persistenced", "nvidia-kernel-dkms")
        (tmp_path / "Packages").write_text("\n".join(f"Package: {name}\nVersion: 580.126.09-1\n"
                                                     for name in (*names, PIN + "580.126.09")))
        (tmp_path / "status").write_text("Package: nvidia-kernel-open-dkms\nStatus: hold ok half-configured\n"
                                         "Maintainer: x\nDescription: x\nArchitecture: amd64\nVersion: 580.126.09-1\n")
        (tmp_path / "info").mkdir()
        done = subprocess.run([sys.executable, "-", "gateway", *ASKED], text=True, capture_output=True, check=True,
                              input=(FILES / "driver_facts.py").read_text(),
                              env={**os.environ, "DPKG_ADMINDIR": str(tmp_path)})
        seen = {**json.loads(done.stdout)["seen"], "gpus": ["26b9"], "headers": True, "dpkg": ""}
        wish = {"host": "here", "version": "580.126.09", "flavour": "proprietary", "fabric_manager": "auto",
                "gpu_model": ""}
        found = answer({"wish": wish, "seen": seen, "index": tmp_path / "Packages",
                        "names": {key: ROLE[f"nvidia_driver_{key}"] for key in
                                  ("exact", "open", "proprietary", "fabric", "own")}})
        assert found["error"] == ""
        assert found["course"]["transactions"][1]["remove"] == ("nvidia-kernel-open-dkms",)

    @pytest.mark.parametrize(("recorded", "is_this_one"), [
        ("6f1c\n", True), ("07aa\n", False), ("", False), (None, False)])
    def test_whether_packages_were_changed_in_this_boot(self, tmp_path: Path, recorded: str | None, is_this_one: bool
                                                        ) -> None:
        (tmp_path / "boot_id").write_text("6f1c\n")
        if recorded is not None:
            (tmp_path / "changed").write_text(recorded)
        assert self.facts.is_of_this_boot(tmp_path / "changed", tmp_path / "boot_id") is is_this_one

    @pytest.mark.parametrize(("text", "version"), [
        (VERSION, "580.126.09"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.309.01  Mon Aug 3\n", "535.309.01"),
        ("", "")])
    def test_the_loaded_version(self, text: str, version: str) -> None:
        assert self.facts.loaded_version(text) == version

    def test_who_holds_dpkgs_lock_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lock = tmp_path / "lock"
        lock.touch()
        monkeypatch.setattr(self.facts, "LOCKS", (str(lock),))
        assert self.facts.dpkg_holder() == ""
        holding = ("import fcntl, struct, sys; file = open(sys.argv[1], 'r+b'); "
                   "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()")
        with subprocess.Popen([sys.executable, "-c", holding, lock], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as other:
            assert other.stdout is not None and other.stdout.readline() == b"held\n"
            said = self.facts.dpkg_holder()
            other.communicate()
        assert f"(pid {other.pid}" in said

    @pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="not a Debian")
    def test_a_question_the_decision_understands(self) -> None:
        """Both programs for real, on this machine, which has no GPU or one: an answer in any case."""
        done = subprocess.run([sys.executable, "-", "gateway", *ASKED], text=True, capture_output=True, check=True,
                              input=(FILES / "driver_facts.py").read_text())
        names = {"exact": ["a"], "open": ["b"], "proprietary": ["c"], "fabric": ["d"], "own": []}
        wish = {"host": "here", "version": "580.126.09", "flavour": "", "fabric_manager": "auto", "gpu_model": ""}
        asked = {"wish": wish, "names": names, "index": "/nowhere", **json.loads(done.stdout)}
        answered = subprocess.run([sys.executable, "-m", "opsctl.stack"], input=json.dumps(asked), text=True,
                                  capture_output=True, check=True)
        assert json.loads(answered.stdout)["code"].startswith("driver.no_")


SIMULATED = """\
Reading package lists...
Remv nvidia-driver-pinning-595.71.05 [595.71.05-1+lab]
Inst nvidia-driver-pinning-580.126.09 (580.126.09-1+lab opsctl:bookworm [amd64])
Conf nvidia-driver-pinning-580.126.09 (580.126.09-1+lab opsctl:bookworm [amd64])
"""
DRIVER = {"what": "driver", "install": ["nvidia-driver-cuda=580.126.09-1", "linux-headers-amd64"], "remove": ["old1"]}


class TestTransaction:
    transaction = program("driver_transaction")

    def test_the_swap_of_pins_is_what_was_asked_for(self) -> None:
        swap = {"what": "pin", "install": ["nvidia-driver-pinning-580.126.09"],
                "remove": ["nvidia-driver-pinning-595.71.05"]}
        assert self.transaction.refusal(swap, SIMULATED) == ""
        assert self.transaction.packages_of(swap) == ["nvidia-driver-pinning-580.126.09",
                                                      "nvidia-driver-pinning-595.71.05-"]

    @pytest.mark.parametrize(("output", "named"), [
        ("Remv haproxy [2.6]\n", "remove haproxy"),
        ("Purg haproxy [2.6]\n", "remove haproxy"),
        ("Inst linux-image-6.1.0-56-amd64 (6.1.1 x [amd64])\n", "linux-image-6.1.0-56-amd64"),
        ("Inst firmware-misc-nonfree [1] (2 x [all])\n", "firmware-misc-nonfree"),
        ("Inst grub-common:amd64 [1] (2 x [all])\n", "grub-common")])
    def test_more_than_was_asked_for_is_refused(self, output: str, named: str) -> None:
        assert named in self.transaction.refusal(DRIVER, output)

    @pytest.mark.parametrize("output", [
        "Inst nvidia-driver-cuda (580.126.09-1 x [amd64])\nInst linux-headers-6.1.0-56-amd64 (6 x [amd64])\n",
        "Remv old1 [1]\n", "Inst dkms (3 x [all])\nInst gcc-12 (12 x [amd64])\n", ""])
    def test_what_a_driver_needs_is_let_in(self, output: str) -> None:
        assert self.transaction.refusal(DRIVER, output) == ""

    def test_what_goes_to_come_back_in_another_version_is_not_removed(self) -> None:
        output = "Remv libcuda1 [595.71.05-1]\nInst libcuda1 [595.71.05-1] (580.126.09-1 x [amd64])\n"
        assert self.transaction.simulated(output) == ({"libcuda1"}, set())

    def test_nothing_comes_with_a_pin(self) -> None:
        swap = {"what": "pin", "install": ["pin"], "remove": []}
        output = "Inst pin (1 x [all])\nInst nvidia-driver-cuda (1)\n"
        assert "nvidia-driver-cuda" in self.transaction.refusal(swap, output)

    def test_what_the_last_of_them_would_take_is_refused_before_the_first(self, tmp_path: Path) -> None:
        """The pin alone takes nothing along: it would be done, and the driver refused after it."""
        pin = {"what": "pin", "install": ["pin-new"], "remove": ["pin-old"]}
        done, called = self.play(tmp_path, 'case "$*" in *-cuda*) echo "Remv gpu-tool [1]";; esac', [pin, DRIVER])
        assert done.returncode == 1
        assert "apt would remove gpu-tool" in done.stdout
        assert called == ["dpkg --configure", "apt-get -s"]
        assert not (tmp_path / "opsctl/driver-changed").exists()

    def test_that_apt_cannot_do_all_at_once_says_nothing(self, tmp_path: Path) -> None:
        pin = {"what": "pin", "install": ["pin-new"], "remove": ["pin-old"]}
        done, called = self.play(tmp_path, 'case "$*" in *-s*pin-new*-cuda*) exit 100;; esac', [pin, DRIVER])
        assert done.returncode == 0
        assert called == ["dpkg --configure", "apt-get -s", *["apt-get -s", "apt-get -y"] * 2, "apt-mark hold"]

    def test_modules_go_before_those_they_rest_on(self) -> None:
        text = "nvidia 1 2 nvidia_uvm, Live\nnvidia_uvm 1 0 - Live\nnvidia_wmi_ec_backlight 1 0\next4 1 0\n"
        assert self.transaction.loaded_modules(text) == ["nvidia_uvm", "nvidia"]

    def test_the_module_in_the_kernel_is_compared_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "version").write_text(VERSION)
        monkeypatch.setattr(self.transaction, "LOADED", tmp_path / "version")
        assert self.transaction.is_loaded("580.126.09")
        assert not self.transaction.is_loaded("580.126")
        monkeypatch.setattr(self.transaction, "LOADED", tmp_path / "none")
        assert not self.transaction.is_loaded("580.126.09")

    @pytest.mark.parametrize(("apt", "status", "said", "called"), [
        ("echo 'Remv haproxy [2.6]'", 1, "driver: apt would remove haproxy", ["dpkg --configure", "apt-get -s"]),
        ("[ $1 = -s ] || exit 100", 1, "apt-get failed with exit status 100",
         ["dpkg --configure", "apt-get -s", "apt-get -y", "apt-mark hold"]),
        ("exit 100", 1, "driver: apt cannot do it", ["dpkg --configure", "apt-get -s"]),
        ("", 0, "", ["dpkg --configure", "apt-get -s", "apt-get -y", "apt-mark hold"])])
    def test_what_is_run(self, tmp_path: Path, apt: str, status: int, said: str, called: list[str]) -> None:
        done, log = self.play(tmp_path, apt, [DRIVER])
        assert done.returncode == status
        assert said in done.stdout
        assert (tmp_path / "opsctl/driver-changed").exists() is ("apt-get -y" in called), "a refusal changes nothing"
        assert log == called

    def play(self, folder: Path, apt: str, transactions: list[dict[str, object]]
             ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """The program itself, with stand-ins for the system's own; how it ended, and what it called."""
        for name, body in (("dpkg", ""), ("apt-mark", ""), ("apt-get", apt)):
            (folder / name).write_text(f"#!/bin/sh\necho {name} \"$@\" >> {folder}/log\n{body}\n")
            (folder / name).chmod(0o755)
        asked = {"transactions": transactions, "hold": ["nvidia-driver-cuda"], "load": ""}
        text = (FILES / "driver_transaction.py").read_text().replace("/var/lib/opsctl", f"{folder}/opsctl")
        (folder / "program.py").write_text(text)
        done = subprocess.run([sys.executable, folder / "program.py", json.dumps(asked)], text=True,
                              capture_output=True, check=False, env={"PATH": f"{folder}:/usr/bin:/bin"})
        return done, [" ".join(line.split()[:2]) for line in (folder / "log").read_text().splitlines()]


@pytest.fixture
def reloading(tmp_path: Path) -> Path:
    """The program with its paths below a folder, and a host whose GPUs two services and a module hold."""
    text = (FILES / "driver_transaction.py").read_text()
    for path, name in (("/proc/driver/nvidia/version", "loaded"), ("/proc/modules", "modules"),
                       ("/run/opsctl-driver.stopped", "stopped")):
        text = text.replace(path, str(tmp_path / name))
    (tmp_path / "program").write_text(text)
    (tmp_path / "loaded").write_text("NVRM version: NVIDIA UNIX Open Kernel Module  570.1.1  Release\n")
    (tmp_path / "modules").write_text("nvidia 1 2 - Live\n")
    stand_in(tmp_path, "systemctl", f"""
case "$*" in
    is-active*agent*|is-active*dcgm.service) [ ! -e {tmp_path}/down ] ;;
    is-active*) exit 3 ;;
    stop*dcgm*) exit 1 ;;
esac""")
    for name in ("modprobe", "nvidia-modprobe"):
        stand_in(tmp_path, name, "")
    return tmp_path


def stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\necho {name} \"$@\" >> {folder}/log\n{body}\n")
    (folder / name).chmod(0o755)


def change(folder: Path, **asked: object) -> subprocess.CompletedProcess[str]:
    asked = {"transactions": [], "hold": [], "load": "", **asked}
    return subprocess.run([sys.executable, folder / "program", json.dumps(asked)], text=True, capture_output=True,
                          check=False, env={"PATH": f"{folder}:/usr/bin:/bin"})


def started(folder: Path) -> list[str]:
    log = (folder / "log").read_text().splitlines()
    return [line.removeprefix("systemctl start ") for line in log if line.startswith("systemctl start ")]


class TestReload:
    def test_a_service_that_does_not_stop_leaves_no_other_down(self, reloading: Path) -> None:
        done = change(reloading, load="580.126.09")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "it takes a reboot" in done.stdout
        assert started(reloading) == ["nvidia-dcgm.service", "opsctl-agent.service"]
        assert not (reloading / "stopped").exists()

    def test_what_a_killed_run_stopped_is_started_by_the_next(self, reloading: Path) -> None:
        stand_in(reloading, "modprobe", "kill -9 $PPID")
        assert change(reloading, load="580.126.09").returncode == -9
        assert started(reloading) == []
        (reloading / "down").touch()
        done = change(reloading)  # nothing else is left to be done
        assert done.returncode == 0, done.stdout + done.stderr
        assert started(reloading) == ["nvidia-dcgm.service", "opsctl-agent.service"]
        assert change(reloading).returncode == 0
        assert len(started(reloading)) == 2

    def test_a_second_reload_forgets_nothing_that_the_first_stopped(self, reloading: Path) -> None:
        stand_in(reloading, "modprobe", "kill -9 $PPID")
        change(reloading, load="580.126.09")
        (reloading / "down").touch()
        change(reloading, load="580.126.09")
        stand_in(reloading, "modprobe", "")
        change(reloading, load="580.126.09")
        assert started(reloading) == ["nvidia-dcgm.service", "opsctl-agent.service"]

    @pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="not a Debian")
    def test_the_facts_tell_of_it(self, reloading: Path) -> None:
        """Else the role would see nothing to be done, and would not run the program."""
        text = (FILES / "driver_facts.py").read_text().replace("/run/opsctl-driver.stopped", f"{reloading}/stopped")
        for stopped in (False, True):
            done = subprocess.run([sys.executable, "-"], input=text, text=True, capture_output=True, check=True)
            assert json.loads(done.stdout)["stopped"] is stopped
            (reloading / "stopped").touch()
        assert "nvidia_driver_facts.stopped" in ROLE["nvidia_driver_pending"]


WANTED = {"version": "580.126.09", "fabric_manager": True, "gpu_uuids": ["GPU-a", "GPU-b"]}
RIGHT = {"loaded": "580.126.09", "module": "580.126.09", "library": "580.126.09", "fabric_manager": "580.126.09",
         "fabric_unit": "active"}


class TestLayers:
    layers = program("driver_layers")

    def test_all_is_well(self) -> None:
        assert self.layers.judge(WANTED, RIGHT, ["GPU-a", "GPU-b", "GPU-c"]) == []
        pcie = {**WANTED, "fabric_manager": False}
        none = {**RIGHT, "fabric_manager": "", "fabric_unit": "inactive"}
        assert self.layers.judge(pcie, none, ["GPU-a", "GPU-b"]) == []

    @pytest.mark.parametrize(("differs", "uuids", "named"), [
        ({"loaded": "595.71.05"}, None, "the module in the kernel is 595.71.05"),
        ({"module": ""}, None, "the module on disk is not there"),
        ({"library": "595.71.05"}, None, "the library is 595.71.05"),
        ({"fabric_manager": "580.159.04"}, None, "the fabric manager is 580.159.04"),
        ({"fabric_unit": "failed"}, None, "nvidia-fabricmanager.service is failed"),
        ({}, ["GPU-b"], "1 of the 2 GPUs in gpu_uuids are missing: GPU-a")])
    def test_each_layer_is_named(self, differs: dict[str, str], uuids: list[str] | None, named: str) -> None:
        wrong = self.layers.judge(WANTED, {**RIGHT, **differs}, uuids or ["GPU-a", "GPU-b"])
        assert len(wrong) == 1
        assert named in wrong[0]

    def test_a_fabric_manager_where_there_is_no_fabric(self) -> None:
        assert "no NVSwitches" in self.layers.judge({**WANTED, "fabric_manager": False}, RIGHT, ["GPU-a", "GPU-b"])[0]

    def test_gpus_in_pci_order(self) -> None:
        csv = "580.126.09, 00000000:3B:00.0, GPU-a\n580.126.09, 00000000:1A:00.0, GPU-b\n"
        assert [uuid for _, _, uuid in self.layers.gpus_of(csv)] == ["GPU-b", "GPU-a"]

    @pytest.mark.parametrize("uuids", [[f"GPU-{index}" for index in range(8)], []])
    def test_a_lost_gpu_is_named_and_the_library_is_not_blamed(self, tmp_path: Path, uuids: list[str]) -> None:
        """nvidia-smi prints the healthy ones and exits 15."""
        rows = "".join(f"580.126.09, 00000000:{bus:02X}:00.0, GPU-{bus}\n" for bus in (7, 6, 5, 4, 2, 1, 0))
        words = "Unable to determine the device handle for GPU3: 00000000:03:00.0: GPU is lost.  Reboot the system"
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{rows}{words}'\nexit 15\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        done = subprocess.run([sys.executable, "-", json.dumps({**WANTED, "gpu_uuids": uuids})], text=True, check=True,
                              capture_output=True, input=(FILES / "driver_layers.py").read_text(),
                              env={"PATH": str(tmp_path)})
        found = json.loads(done.stdout)
        assert found["layers"]["library"] == "580.126.09"
        assert found["gpus"] == [f"GPU-{bus}" for bus in (0, 1, 2, 4, 5, 6, 7)]
        assert not [sentence for sentence in found["wrong"] if "the library" in sentence]
        assert ("1 of the 8 GPUs in gpu_uuids are missing: GPU-3" in found["wrong"]) == bool(uuids)
        assert found["wrong"][-1].startswith("nvidia-smi says: Unable to determine the device handle for GPU3")

    def test_a_sentence_with_commas_is_no_gpu(self) -> None:
        assert self.layers.gpus_of("NVRM: one, two, three\n[GPU is lost], 00000000:03:00.0, [GPU is lost]\n") == []

    def test_a_machine_without_any_of_it_is_told_in_full(self) -> None:
        done = subprocess.run([sys.executable, "-", json.dumps(WANTED)], text=True, capture_output=True, check=True,
                              input=(FILES / "driver_layers.py").read_text(), env={"PATH": "/nowhere"})
        wrong = json.loads(done.stdout)["wrong"]
        assert "the library is not there where 580.126.09 is wanted" in wrong
        assert wrong[-1] == "no GPU answers; nvidia-smi says: nothing"

    def test_a_library_that_has_no_gpu_to_ask_is_known_by_its_file(self, tmp_path: Path) -> None:
        """Debian's links go by way of /etc/alternatives; nvidia-smi of 535 says this and 9 without a module."""
        (tmp_path / "libnvidia-ml.so.535.309.01").touch()
        (tmp_path / "libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.535.309.01")
        says = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho \"{says}\"\nexit 9\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        text = (FILES / "driver_layers.py").read_text().replace("/usr/lib/x86_64-linux-gnu/", f"{tmp_path}/")
        wanted = {"version": "535.309.01", "fabric_manager": False, "gpu_uuids": ["GPU-a"]}
        done = subprocess.run([sys.executable, "-", json.dumps(wanted)], text=True, capture_output=True, check=True,
                              input=text, env={"PATH": str(tmp_path)})
        assert json.loads(done.stdout)["wrong"] == [
            "the module in the kernel is not there where 535.309.01 is wanted",
            "the module on disk is not there where 535.309.01 is wanted",
            f"the driver 535.309.01 is installed, and no GPU answers; nvidia-smi says: {says}"]


def test_unattended_upgrades_are_kept_away() -> None:
    known = yaml.safe_load((FILES.parent / "vars/main.yml").read_text())["nvidia_driver_not_unattended"]
    text = render("roles/nvidia_driver/templates/51opsctl-nvidia.j2", nvidia_driver_not_unattended=known)
    assert '  "nvidia-";\n  "libnvidia-";\n' in text
    if shutil.which("apt-config"):
        done = subprocess.run(["apt-config", "-c", "/dev/stdin", "dump", "Unattended-Upgrade"], input=text, text=True,
                              capture_output=True, check=True)
        assert done.stdout.count("Package-Blacklist:: ") == len(known)
