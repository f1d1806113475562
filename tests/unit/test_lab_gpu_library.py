"""The library that a lab's machines load, through the real nvidia-ml-py, nvitop and gpustat."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest
from lab_gpu_kit import NEEDS_GCC, Simulated, built_library, simulated

from opsctl.errors import RefusedError, UsageError
from opsctl.lab.gpu import faults, layout, library, state_file
from opsctl.lab.gpu.profiles import known, named

pytestmark = NEEDS_GCC
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="setters need root")
MIB = 1024**2


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with built_library() as found:
        yield found


@pytest.fixture
def h200(folder: Path) -> Iterator[Simulated]:
    with simulated(folder, "H200") as gpus:
        yield gpus


READ_ALL = """
nvml.nvmlInit()
h = nvml.nvmlDeviceGetHandleByIndex(1)
fields = nvml.nvmlDeviceGetFieldValues(h, [82, 83, (138, 0xffffffff), 185, 186, 187, 188, 189, 192, 193, 194, 195, 196,
                                           197, 230, 269, 271, 12345])
gpm = nvml.nvmlGpmQueryDeviceSupport(h).isSupportedDevice
print(json.dumps({
    "versions": [nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetNVMLVersion(),
                 nvml.nvmlSystemGetCudaDriverVersion()],
    "count": nvml.nvmlDeviceGetCount(), "name": nvml.nvmlDeviceGetName(h), "uuid": nvml.nvmlDeviceGetUUID(h),
    "bus": nvml.nvmlDeviceGetPciInfo(h).busId, "device": nvml.nvmlDeviceGetPciInfo(h).pciDeviceId,
    "capability": nvml.nvmlDeviceGetCudaComputeCapability(h), "temperature": nvml.nvmlDeviceGetTemperatureV(h, 0),
    "power": nvml.nvmlDeviceGetPowerUsage(h), "memory": asked(lambda: nvml.nvmlDeviceGetMemoryInfo(
        h, nvml.nvmlMemory_v2).total), "utilization": nvml.nvmlDeviceGetUtilizationRates(h).gpu,
    "limits": nvml.nvmlDeviceGetPowerManagementLimitConstraints(h),
    "thresholds": [asked(nvml.nvmlDeviceGetTemperatureThreshold, h, kind) for kind in range(4)],
    "margin": asked(nvml.nvmlDeviceGetMarginTemperature, h), "gpm": gpm,
    "mig": asked(nvml.nvmlDeviceGetMigMode, h), "rows": asked(nvml.nvmlDeviceGetRemappedRows, h),
    "ecc": asked(nvml.nvmlDeviceGetTotalEccErrors, h, 1, 0), "fan": asked(nvml.nvmlDeviceGetFanSpeed, h),
    "fabric": asked(lambda: nvml.nvmlDeviceGetGpuFabricInfo(h, nvml.byref(info := nvml.c_nvmlGpuFabricInfo_t()))),
    "fields": {field.fieldId: field.value.siVal if field.valueType == 5 else field.value.ullVal
               for field in fields if not field.nvmlReturn},
    "missing": asked(nvml.nvmlDeviceGetDramEncryptionMode, h),
}))
"""


@pytest.mark.parametrize("model", known())
def test_every_profile_is_read(folder: Path, model: str) -> None:
    profile = named(model)
    with simulated(folder, model) as gpus:
        said = gpus.run(READ_ALL)
    assert said["versions"] == ["580.126.09", "13.580.126.09", 13000]
    assert (said["count"], said["name"], said["uuid"]) == (2, profile.nvml_name, gpus.uuids[1])
    assert (said["bus"], said["device"]) == ("00000000:3D:00.0", profile.pci_device_id << 16 | 0x10DE)
    assert said["capability"] == [int(digit) for digit in profile.compute_capability.split(".")]
    assert (said["temperature"], said["power"], said["utilization"]) == (61, 430_000, 87)
    assert said["memory"] == profile.memory_mib * MIB
    assert said["limits"] == [profile.power_min_w * 1000, profile.power_max_w * 1000]
    no = "NVMLError_NotSupported"
    sensor, fields = profile.memory_max_c is not None, said["fields"]
    assert said["thresholds"] == [profile.shutdown_c, profile.slowdown_c, profile.memory_max_c if sensor else no,
                                  profile.max_operating_c]
    assert said["margin"] == (26 if profile.t_limit else no)
    assert said["gpm"] == profile.gpm
    assert said["mig"] == ([0, 0] if profile.mig_slices else no)
    assert said["rows"] == ([0, 0, 0, 0] if profile.row_remapper else no)
    assert said["ecc"] == (0 if profile.ecc else no)
    assert said["fan"] == (0 if profile.fan else no)
    assert said["fabric"] == (0 if profile.fabric else no)
    assert said["missing"] == no
    assert ("82" in fields, "138" in fields) == (sensor, profile.nvlinks > 0)
    assert (fields["185"], fields["186"], fields["189"]) == (430_000, 431_000, profile.power_default_w * 1000)
    offsets = [profile.max_operating_c - profile.shutdown_c, profile.max_operating_c - profile.slowdown_c]
    assert [fields.get("193"), fields.get("194")] == (offsets if profile.t_limit else [None, None])
    assert ("195" in fields, "196" in fields) == (profile.t_limit and sensor, profile.t_limit)
    assert "12345" not in fields


def test_every_function_of_nvidia_ml_py_is_there(h200: Simulated, folder: Path) -> None:
    source = Path(pynvml.__file__).read_text()
    names = sorted(set(re.findall(r'_nvmlGetFunctionPointer\("(\w+)"', source)))
    absent = h200.run(f"""
import ctypes
library = ctypes.CDLL({str(folder / library.NAME)!r})
print(json.dumps([name for name in {names!r} if not hasattr(library, name)]))
""")
    assert len(names) > 400
    assert absent == []


def test_a_driver_without_newer_functions(tmp_path: Path, h200: Simulated) -> None:
    library.build("580.126.09", tmp_path / library.NAME, without=["nvmlDeviceGetMarginTemperature"])
    h200.environment["LD_LIBRARY_PATH"] = str(tmp_path)
    assert h200.run("""
nvml.nvmlInit()
h = nvml.nvmlDeviceGetHandleByIndex(0)
print(json.dumps([asked(nvml.nvmlDeviceGetMarginTemperature, h), nvml.nvmlDeviceGetPowerUsage(h)]))
""") == ["NVMLError_FunctionNotFound", 430_000]


INIT = "print(json.dumps(asked(nvml.nvmlInit)))"


@pytest.mark.parametrize(("loaded", "said"), [
    (b"580.126.09", None), (b"", "NVMLError_DriverNotLoaded"), (b"580.159.04", "NVMLError_LibRmVersionMismatch"),
])
def test_library_and_driver(h200: Simulated, loaded: bytes, said: str | None) -> None:
    h200.state.machine.module_version = loaded
    assert h200.run(INIT) == said


def test_device_nodes_decide_what_is_seen(h200: Simulated) -> None:
    count = "nvml.nvmlInit(); print(json.dumps([nvml.nvmlDeviceGetCount(), nvml.nvmlDeviceGetUUID(" \
            "nvml.nvmlDeviceGetHandleByIndex(0))]))"
    (h200.folder / "nvidia0").unlink()
    assert h200.run(count) == [1, h200.uuids[1]]
    (h200.folder / "nvidiactl").unlink()
    assert h200.run(INIT) == "NVMLError_DriverNotLoaded"


@NEEDS_ROOT
def test_a_node_that_may_not_be_opened(h200: Simulated) -> None:
    (h200.folder / "nvidiactl").chmod(0o600)
    assert h200.run("os.setuid(65534)\n" + INIT) == "NVMLError_NoPermission"


SETTERS = """
nvml.nvmlInit()
h = nvml.nvmlDeviceGetHandleByIndex(1)
print(json.dumps([asked(nvml.nvmlDeviceSetPowerManagementLimit, h, limit) for limit in (450_000, 199_000, 701_000)]
    + [asked(nvml.nvmlDeviceSetGpuLockedClocks, h, *clocks) for clocks in ((345, 990), (990, 345), (345, 100))]
    + [asked(nvml.nvmlDeviceSetPersistenceMode, h, 1), nvml.nvmlDeviceGetEnforcedPowerLimit(h)]))
"""


@NEEDS_ROOT
def test_root_sets_limits_that_the_silicon_sees(h200: Simulated) -> None:
    wrong = "NVMLError_InvalidArgument"
    assert h200.run(SETTERS) == [None, wrong, wrong, None, wrong, wrong, None, 450_000]
    settings = h200.state.machine.gpus[1].settings
    assert (settings.power_limit_mw, settings.locked_min_mhz, settings.locked_max_mhz, settings.persistence) == (
        450_000, 345, 990, 1)
    h200.state.boot()
    assert (settings.power_limit_mw, settings.locked_max_mhz, settings.persistence) == (700_000, 0, 0)


def test_nobody_else_sets_anything(h200: Simulated) -> None:
    said = h200.run("if os.geteuid() == 0: os.setuid(65534)\n" + SETTERS)
    assert said == ["NVMLError_NoPermission"] * 7 + [700_000]


def test_a_lost_gpu_leaves_the_others(h200: Simulated) -> None:
    h200.state.machine.gpus[0].lost = 1
    assert h200.run("""
nvml.nvmlInit()
print(json.dumps([nvml.nvmlDeviceGetCount(), asked(nvml.nvmlDeviceGetHandleByIndex, 0),
                  nvml.nvmlDeviceGetPowerUsage(nvml.nvmlDeviceGetHandleByIndex(1))]))
""") == [2, "NVMLError_GpuIsLost", 430_000]


def test_a_hanging_driver_hears_no_signal_until_it_is_mended(h200: Simulated) -> None:
    reader = h200.start("""
nvml.nvmlInit()
h = nvml.nvmlDeviceGetHandleByIndex(0)
print("ready", flush=True); sys.stdin.readline(); print("asking", flush=True)
print(nvml.nvmlDeviceGetTemperature(h, 0), flush=True)
""")
    assert reader.stdin is not None
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    h200.state.machine.gpus[0].hang_until_ns = faults.monotonic_ns() + 3600 * 10**9
    reader.stdin.write("\n")
    reader.stdin.flush()
    assert reader.stdout.readline() == "asking\n"
    try:
        until_blocked(reader.pid, 1)
    except AssertionError:
        reader.kill()
        reader.communicate()
        raise
    reader.terminate()
    assert reader.poll() is None
    h200.state.machine.gpus[0].hang_until_ns = 0
    assert reader.communicate(timeout=30)[0] in ("61\n", "")
    assert reader.returncode == -15


def until_blocked(pid: int, threads: int) -> None:
    """Waits until so many threads of a process block signals, as those do that wait for a hanging driver."""
    deadline = time.monotonic() + 20
    while sum("SigBlk:\t0000000000000000" not in path.read_text()
              for path in Path(f"/proc/{pid}/task").glob("*/status")) < threads:
        assert time.monotonic() < deadline, "the calls block no signals, or do not block"


@pytest.mark.parametrize("gpu_only", [False, True])
def test_a_shutdown_while_a_call_hangs(h200: Simulated, gpu_only: bool) -> None:
    """It hangs too when the driver does, and takes nothing away from the call that waits for one GPU."""
    reader = h200.start("""
import threading
nvml.nvmlInit()
h = nvml.nvmlDeviceGetHandleByIndex(0)
call = threading.Thread(target=lambda: print(asked(nvml.nvmlDeviceGetTemperature, h, 0), flush=True))
stop = threading.Thread(target=lambda: print(asked(nvml.nvmlShutdown), "stopped", flush=True))
print("ready", flush=True); sys.stdin.readline()
call.start()
print("asking", flush=True); sys.stdin.readline()
stop.start()
call.join(); stop.join()
print(asked(nvml.nvmlDeviceGetCount), asked(nvml.nvmlInit), nvml.nvmlDeviceGetCount())
""")
    assert reader.stdin is not None
    assert reader.stdout is not None
    hanging = h200.state.machine.gpus[0] if gpu_only else h200.state.machine
    try:
        assert reader.stdout.readline() == "ready\n"
        hanging.hang_until_ns = faults.monotonic_ns() + 3600 * 10**9
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "asking\n"
        until_blocked(reader.pid, 1)
        reader.stdin.write("\n")
        reader.stdin.flush()
        if gpu_only:  # the library itself does not hang
            assert reader.stdout.readline() == "None stopped\n"
        else:
            until_blocked(reader.pid, 2)
        hanging.hang_until_ns = 0
        said, complained = reader.communicate(timeout=30)
    finally:
        reader.kill()
        reader.communicate()
    lines = said.splitlines()
    assert reader.returncode == 0, complained
    assert lines[-1] == "NVMLError_Uninitialized None 2"
    assert "61" in lines or not gpu_only


def test_a_machine_that_is_made_anew_is_seen_after_the_next_init(h200: Simulated) -> None:
    reader = h200.start("""
def count():
    nvml.nvmlInit()
    print(nvml.nvmlDeviceGetCount(), flush=True)
    nvml.nvmlShutdown()
count(); sys.stdin.readline(); count()
""")
    assert reader.stdin is not None
    assert reader.stdout is not None
    assert reader.stdout.readline() == "2\n"
    state_file.create(h200.folder / "lab-state", h200.uuids[:1], named("H200"))
    with state_file.StateFile(h200.folder / "lab-state") as state:
        state.machine.module_version = b"580.126.09"
    assert reader.communicate("\n", timeout=30)[0] == "1\n"


@NEEDS_ROOT
def test_a_state_that_may_only_be_read_is_not_set(h200: Simulated) -> None:
    """As in a unit that has it read-only: who opens it here is nobody, and root again when it comes to setting."""
    said = h200.run("os.seteuid(65534); nvml.nvmlInit(); os.seteuid(0)\n" + SETTERS)
    assert said == ["NVMLError_NoPermission"] * 7 + [700_000]


XIDS = """
nvml.nvmlInit()
events = nvml.nvmlEventSetCreate()
for index in range(2):
    nvml.nvmlDeviceRegisterEvents(nvml.nvmlDeviceGetHandleByIndex(index), nvml.nvmlEventTypeXidCriticalError, events)
print("ready", flush=True); sys.stdin.readline()
told = []
while (event := asked(nvml.nvmlEventSetWait_v2, events, 100)) != "NVMLError_Timeout":
    told.append([nvml.nvmlDeviceGetIndex(event.device), event.eventType, event.eventData])
print(json.dumps(told))
"""


def test_every_process_is_told_each_xid_once_and_repeats_too(h200: Simulated) -> None:
    h200.state.happened(0, 31)  # before anyone listened
    readers = [h200.start(XIDS) for _ in range(2)]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    for gpu, xid in ((0, 79), (0, 79), (1, 48)):
        h200.state.happened(gpu, xid)
    for reader in readers:
        said, complained = reader.communicate("\n", timeout=60)
        assert json.loads(said) == [[0, 8, 79], [0, 8, 79], [1, 8, 48]], complained


def test_no_reader_sees_half_a_tick(h200: Simulated) -> None:
    gpu = h200.state.machine.gpus[0]

    def tick(number: int) -> None:
        """As the silicon does, but slowly: field by field."""
        gpu.sequence += 1
        gpu.now.energy_mj = gpu.now.power_mean_mw = number
        gpu.now.power_mw = gpu.now.pcie_tx_bytes = gpu.now.sw_thermal_ns = number
        gpu.sequence += 1

    tick(0)
    reader = h200.start("""
nvml.nvmlInit()
h = nvml.nvmlDeviceGetHandleByIndex(0)
print("ready", flush=True)
seen, torn = set(), 0
while len(seen) < 300:
    first, *rest = [field.value.ullVal for field in nvml.nvmlDeviceGetFieldValues(h, [83, 185, 186, 197, 269])]
    seen.add(first)
    torn += rest != [first] * 4
print(json.dumps(torn))
""")
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    number = 0
    while reader.poll() is None:
        number += 1
        tick(number)
    assert json.loads(reader.stdout.read()) == 0


def test_a_silicon_that_died_in_a_tick_blocks_nobody(h200: Simulated) -> None:
    h200.state.machine.gpus[0].sequence += 1
    assert h200.run("""
nvml.nvmlInit(); print(json.dumps(nvml.nvmlDeviceGetPowerUsage(nvml.nvmlDeviceGetHandleByIndex(0))))
""") == 430_000


def test_gpm_is_what_happened_between_two_samples(h200: Simulated) -> None:
    program = h200.start("""
nvml.nvmlInit()
h = nvml.nvmlDeviceGetHandleByIndex(0)
samples = [nvml.nvmlGpmSampleAlloc() for _ in range(2)]
for sample in samples:
    nvml.nvmlGpmSampleGet(h, sample)
    print("taken", flush=True); sys.stdin.readline()
wanted = nvml.c_nvmlGpmMetricsGet_t(version=1, numMetrics=3, sample1=samples[0], sample2=samples[1])
for index, metric in enumerate((1, 20, 200)):
    wanted.metrics[index].metricId = metric
nvml.nvmlGpmMetricsGet(wanted)
print(json.dumps([[metric.nvmlReturn, round(metric.value, 3)] for metric in wanted.metrics[:3]]))
""")
    assert program.stdout is not None
    assert program.stdin is not None
    assert program.stdout.readline() == "taken\n"
    h200.shows(0, time_us=3_000_000, busy_ns=500_000_000, pcie_tx_bytes=64 * MIB)
    program.stdin.write("\n")
    program.stdin.flush()
    said, complained = program.communicate("\n", timeout=30)
    assert json.loads(said.removeprefix("taken\n")) == [[0, 25.0], [0, 32.0], [3, 0.0]], complained


def test_mig_devices(folder: Path) -> None:
    with simulated(folder, "H100", count=1, mig=2) as gpus:
        said: dict[str, Any] = gpus.run("""
nvml.nvmlInit()
h = nvml.nvmlDeviceGetHandleByIndex(0)
parts = [nvml.nvmlDeviceGetMigDeviceHandleByIndex(h, index) for index in range(2)]
print(json.dumps({
    "mode": nvml.nvmlDeviceGetMigMode(h), "most": nvml.nvmlDeviceGetMaxMigDeviceCount(h),
    "third": asked(nvml.nvmlDeviceGetMigDeviceHandleByIndex, h, 2),
    "whole": asked(nvml.nvmlDeviceGetUtilizationRates, h),
    "instances": [nvml.nvmlDeviceGetGpuInstanceId(part) for part in parts],
    "names": [nvml.nvmlDeviceGetName(part) for part in parts], "uuid": nvml.nvmlDeviceGetUUID(parts[0])[:4],
    "parent": nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(parts[1])),
    "is_mig": [nvml.nvmlDeviceIsMigDeviceHandle(device).value for device in (h, parts[0])]}))
""")
        assert said == {"mode": [1, 1], "most": 7, "third": "NVMLError_NotFound", "whole": "NVMLError_NotSupported",
                        "instances": [7, 8], "names": ["NVIDIA H100 80GB HBM3 MIG 1g.10gb"] * 2, "uuid": "MIG-",
                        "parent": gpus.uuids[0], "is_mig": [0, 1]}


OTHERS = """
nvml.nvmlInit()
ours, theirs, more = [], [], []
for index in range(2):
    h = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(h, nvml.nvmlMemory_v2)
    ours.append([nvml.nvmlDeviceGetName(h), nvml.nvmlDeviceGetUUID(h), nvml.nvmlDeviceGetTemperature(h, 0),
                 nvml.nvmlDeviceGetUtilizationRates(h).gpu, nvml.nvmlDeviceGetPowerUsage(h), memory.used, memory.total])
import gpustat, nvitop  # now: gpustat changes functions of nvidia-ml-py
for device in nvitop.Device.all():
    more.append([device.name(), device.uuid(), device.temperature(), device.gpu_utilization(), device.power_usage(),
                 device.memory_used(), device.memory_total()])
for gpu in gpustat.new_query():
    theirs.append([gpu.name, gpu.uuid, gpu.temperature, gpu.utilization, gpu.power_draw * 1000,
                   gpu.memory_used * 1024**2, gpu.memory_total * 1024**2])
print(json.dumps([ours, more, theirs, len(nvitop.Device(1).processes())]))
"""


@pytest.mark.parametrize("model", ["H200", "L40S", "V100"])
def test_nvitop_and_gpustat_read_the_same_numbers(folder: Path, model: str) -> None:
    with simulated(folder, model) as gpus:
        now = layout.Now(time_us=1, temperature_c=74, utilization_percent=93, power_mw=250_000, power_mean_mw=250_000,
                         memory_used_bytes=3 * 1024 * MIB, process_count=1)
        now.processes[0].pid, now.processes[0].memory_bytes = os.getpid(), 1024 * MIB
        gpus.state.publish(1, now)
        ours, nvitop, gpustat, processes = gpus.run(OTHERS)
    assert ours[1][:5] == [named(model).nvml_name, gpus.uuids[1], 74, 93, 250_000]
    assert nvitop == ours
    assert gpustat == ours
    assert processes == 1


@pytest.mark.parametrize("version", ["", "580", "580.126.9a", "123.45.06", "580.126.09-1"])
def test_versions_that_cannot_be_built(tmp_path: Path, version: str) -> None:
    with pytest.raises(UsageError) as caught:
        library.build(version, tmp_path / "library")
    assert caught.value.code == "lab.driver_version"


def test_without_a_compiler_it_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    with pytest.raises(RefusedError) as caught:
        library.build("580.126.09", tmp_path / "library")
    assert caught.value.hint == "apt-get install gcc libc6-dev"
