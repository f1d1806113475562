"""nvidia-smi, the fabric manager and the persistence daemon of the lab's packages, run as a machine runs them.

The library is a placeholder of two GPUs; what nvidia-smi prints is compared as a whole.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from vendor_kit import OLD, compiled

from opsctl.lab.vendor.catalogue import fill
from opsctl.lab.vendor.debs import HERE
from opsctl.lab.vendor.programs import fabricmanager, persistenced

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="not on this machine: cc")

# Two H200s; the second has no memory sensor, and is lost when LOST is set. INIT is what nvmlInit answers.
LIBRARY = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int number(const char *name) { const char *set = getenv(name); return set ? atoi(set) : 0; }
#define INDEX(d) ((int)(long)(d) - 1)
#define GPU(d) if (INDEX(d) == 1 && number("LOST")) return 15
int nvmlInit_v2(void) { return number("INIT"); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int r) { return r == 18 ? "Driver/library version mismatch" : r == 4 ?
    "Insufficient Permissions" : r == 15 ? "GPU is lost" : "Unknown Error"; }
int nvmlSystemGetDriverVersion(char *o, unsigned n) { snprintf(o, n, "580.126.09"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *v) { *v = 13000; return 0; }
int nvmlDeviceGetCount_v2(unsigned *v) { *v = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) { *d = (void *)(long)(i + 1); return 0; }
int nvmlDeviceGetName(void *d, char *o, unsigned n) { snprintf(o, n, "NVIDIA H200"); return 0; }
int nvmlDeviceGetUUID(void *d, char *o, unsigned n) { snprintf(o, n, "GPU-%d", INDEX(d)); return 0; }
struct pci { char old[16]; unsigned numbers[5]; char bus[32]; };
int nvmlDeviceGetPciInfo_v3(void *d, struct pci *p) { sprintf(p->bus, "00000000:%02X:00.0", 26 + INDEX(d)); return 0; }
int nvmlDeviceGetTemperature(void *d, int s, unsigned *v) { GPU(d); *v = 41 + INDEX(d); return 0; }
struct field { unsigned id, scope; long long at, took; unsigned type; int status; unsigned value, more; };
int nvmlDeviceGetFieldValues(void *d, int n, struct field *f) {
    f->status = f->id == 82 && INDEX(d) == 0 ? 0 : 3; f->value = 47; return 0; }
struct memory { unsigned version; unsigned long long total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo_v2(void *d, struct memory *m) { if (m->version != (sizeof *m | 2 << 24)) return 25;
    m->total = 143771ull << 20; m->used = 512ull << 20; return 0; }
int nvmlDeviceGetUtilizationRates(void *d, unsigned *v) { v[0] = 7; v[1] = 3; return 0; }
int nvmlDeviceGetPowerUsage(void *d, unsigned *v) { *v = 120500; return 0; }
int nvmlDeviceGetEnforcedPowerLimit(void *d, unsigned *v) { *v = 700000; return 0; }
int nvmlDeviceGetPersistenceMode(void *d, unsigned *v) { *v = 1; return 0; }
int nvmlDeviceSetPersistenceMode(void *d, unsigned v) { return number("SET"); }
int nvmlDeviceGetPerformanceState(void *d, unsigned *v) { *v = 0; return 0; }
int nvmlDeviceGetTotalEccErrors(void *d, int t, int c, unsigned long long *v) { *v = 0; return 0; }
int nvmlDeviceGetClockInfo(void *d, unsigned t, unsigned *v) { *v = t == 1 ? 1980 : 3201; return 0; }
int nvmlDeviceGetCurrentClocksEventReasons(void *d, unsigned long long *v) { *v = 0x48; return 0; }
"""
FIELDS = "index,name,uuid,temperature.gpu,temperature.memory,memory.used,power.draw,clocks.sm,vbios_version"
HEADER = ("index, name, uuid, temperature.gpu, temperature.memory, memory.used [MiB], power.draw [W], "
          "clocks.current.sm [MHz], vbios_version\n")
ROWS = ("0, NVIDIA H200, GPU-0, 41, 47, 512 MiB, 120.50 W, 1980 MHz, [N/A]\n"
        "1, NVIDIA H200, GPU-1, 42, [N/A], 512 MiB, 120.50 W, 1980 MHz, [N/A]\n")
BARE = ("0, NVIDIA H200, GPU-0, 41, 47, 512, 120.50, 1980, [N/A]\n"
        "1, NVIDIA H200, GPU-1, 42, [N/A], 512, 120.50, 1980, [N/A]\n")
SET = ("Enabled persistence mode for GPU 00000000:1A:00.0.\nEnabled persistence mode for GPU 00000000:1B:00.0.\n"
       "All done.\n")
REFUSED = ("Unable to set persistence mode for GPU 00000000:1A:00.0: Insufficient Permissions\n"
           "Terminating early due to previous error.\n")
NO_DRIVER = ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
             "NVIDIA driver is installed and running.\n\n")
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.126\n"
LIST = "GPU 0: NVIDIA H200 (UUID: GPU-0)\nGPU 1: NVIDIA H200 (UUID: GPU-1)\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs as they are installed, and the library."""
    directory = tmp_path_factory.mktemp("programs")
    for name in ("nvidia_smi", "fabricmanager", "persistenced"):
        path = directory / name
        path.write_text(fill((HERE / f"programs/{name}.py").read_text(), {"UPSTREAM": OLD}))
        path.chmod(0o755)
    compiled(LIBRARY, directory / "libnvidia-ml.so.1", "-w", "-shared", "-fPIC")
    return directory


def nvidia_smi(place: Path, *arguments: str, library: bool = True, **environment: str) -> tuple[int, str]:
    path = str(place if library else place / "none")
    done = subprocess.run([sys.executable, place / "nvidia_smi", *arguments], capture_output=True, text=True,
                          env={**environment, "LD_LIBRARY_PATH": path}, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize(("arguments", "environment", "expected"), [
    (("-L",), {}, (0, LIST)),
    (("-L", "-i", "1"), {}, (0, LIST.splitlines(keepends=True)[1])),
    (("-L", "--id=GPU-1"), {}, (0, LIST.splitlines(keepends=True)[1])),
    (("-L", "-i", "7"), {}, (6, "No devices were found\n")),
    ((f"--query-gpu={FIELDS}", "--format=csv"), {}, (0, HEADER + ROWS)),
    ((f"--query-gpu={FIELDS}", "--format=csv,noheader"), {}, (0, ROWS)),
    ((f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"), {}, (0, BARE)),
    (("--query-gpu=clocks_event_reasons.active", "--format=csv,noheader", "-i", "0"), {}, (0, "0x0000000000000048\n")),
    (("--query-gpu=nonsense", "--format=csv"), {}, (2, 'Field "nonsense" is not a valid field to query.\n\n')),
    (("-pm", "1"), {}, (0, SET)),
    (("-pm", "1"), {"SET": "4"}, (4, REFUSED)),
    ((), {"INIT": "9"}, (9, NO_DRIVER)),
    ((), {"INIT": "18"}, (18, MISMATCH)),
    (("-L",), {"LOST": "1"}, (15, "Unable to determine the device handle for GPU1: GPU is lost\n"
                                  + LIST.splitlines(keepends=True)[0])),
])
def test_nvidia_smi(place: Path, arguments: tuple[str, ...], environment: dict[str, str],
                    expected: tuple[int, str]) -> None:
    assert nvidia_smi(place, *arguments, **environment) == expected


def test_nvidia_smi_shows_a_table_and_the_long_list(place: Path) -> None:
    status, shown = nvidia_smi(place)
    lines = shown.splitlines()
    assert status == 0
    assert {len(line) for line in lines[1:]} == {91}, shown
    assert "Driver Version: 580.126.09" in lines[2]
    assert "CUDA Version: 13.0" in lines[2]
    assert "41C    P0             120W / 700W |     512MiB / 143771MiB |      7%" in shown
    status, shown = nvidia_smi(place, "-q")
    assert status == 0
    assert "Attached GPUs                             : 2" in shown


def test_nvidia_smi_without_a_library(place: Path) -> None:
    status, shown = nvidia_smi(place, library=False)
    assert (status, shown.partition(" library")[0]) == (12, "NVIDIA-SMI couldn't find libnvidia-ml.so")


OPEN_MODULE = ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.126.09  Release Build  (root@gpu-1)  \n"
               "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n")
PROPRIETARY_MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n"


@pytest.mark.parametrize(("text", "version"), [
    (OPEN_MODULE, "580.126.09"), (PROPRIETARY_MODULE, "580.95.05"), ("", ""), ("GCC version: 12.2.0\n", "")])
def test_the_loaded_version_is_read_as_the_driver_writes_it(text: str, version: str) -> None:
    assert fabricmanager.loaded_version(text) == version


@pytest.mark.parametrize(("loaded", "switches", "says"), [
    (OLD, 4, ""), ("595.71.05", 4, f"version {OLD} don't match with driver version 595.71.05"),
    ("", 4, "no NVIDIA driver loaded"), (OLD, 0, "NV_WARN_NOTHING_TO_DO")])
def test_the_fabric_manager_serves_its_own_driver_on_boards_with_switches(loaded: str, switches: int,
                                                                          says: str) -> None:
    refused = fabricmanager.refusal(loaded, OLD, switches)
    assert says in refused
    assert bool(refused) == bool(says)


def test_nvswitches_are_bridges_of_nvidia(tmp_path: Path) -> None:
    for address, vendor, kind in (("0000:1a:00.0", "0x10de", "0x030200"), ("0000:05:00.0", "0x10de", "0x068000"),
                                  ("0000:06:00.0", "0x10de", "0x068000"), ("0000:07:00.0", "0x8086", "0x068000")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "vendor").write_text(f"{vendor}\n")
        (tmp_path / address / "class").write_text(f"{kind}\n")
    assert fabricmanager.switches(tmp_path) == 2


def test_the_persistence_daemon_opens_the_gpus_only(tmp_path: Path) -> None:
    for name in ("nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "nvidia0", "null"):
        (tmp_path / name).touch()
    assert [node.name for node in persistenced.device_nodes(tmp_path)] == ["nvidia0", "nvidia2", "nvidia10"]


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_the_persistence_daemon_refuses_where_there_is_no_gpu(place: Path) -> None:
    done = subprocess.run([sys.executable, place / "persistenced", "--verbose"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 1
    assert "Failed to query NVIDIA devices" in done.stderr


def test_a_daemon_tells_systemd_that_it_is_ready_and_ends_when_told(place: Path, tmp_path: Path) -> None:
    program = tmp_path / "fabricmanager"
    (tmp_path / "version").write_text(OPEN_MODULE)
    (tmp_path / "devices/0000:05:00.0").mkdir(parents=True)
    (tmp_path / "devices/0000:05:00.0/vendor").write_text("0x10de\n")
    (tmp_path / "devices/0000:05:00.0/class").write_text("0x068000\n")
    program.write_text((place / "fabricmanager").read_text()
                       .replace("/proc/driver/nvidia/version", str(tmp_path / "version"))
                       .replace("/sys/bus/pci/devices", str(tmp_path / "devices")))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)
        with subprocess.Popen([sys.executable, program], stderr=subprocess.DEVNULL,
                              env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}) as daemon:
            try:
                assert systemd.recv(100) == b"READY=1"
                daemon.send_signal(signal.SIGTERM)
                assert daemon.wait(20) == 0
            finally:
                daemon.kill()
