#!/usr/bin/python3
"""nvidia-smi of opsctl's lab: the table, -L, -q, -pm and --query-gpu of the real one, read through libnvidia-ml.so.1.

Exit statuses are NVML's: 9 no driver, 18 library and driver differ, 4 not permitted, 12 no library; 2 bad arguments.
One file, for it is installed as one.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

VERSION = "@UPSTREAM@"
NO_DRIVER, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, NO_LIBRARY, NO_FUNCTION, LOST, MISMATCH = 9, 3, 4, 6, 12, 13, 15, 18
BAD_ARGUMENTS = 2
ABSENT = "[N/A]"
MEMORY_TEMPERATURE = 82  # NVML_FI_DEV_MEMORY_TEMP, nvml.h
MODPROBE = "/usr/bin/nvidia-modprobe"
MIB = 1024 * 1024


class NvmlError(Exception):
    """An NVML call that did not answer 0."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Memory(ctypes.Structure):  # nvmlMemory_v2_t
    _fields_ = [("version", ctypes.c_uint), ("total", ctypes.c_ulonglong), ("reserved", ctypes.c_ulonglong),
                ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Utilization(ctypes.Structure):  # nvmlUtilization_t
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class Pci(ctypes.Structure):  # nvmlPciInfo_t
    _fields_ = [("legacy", ctypes.c_char * 16), ("domain", ctypes.c_uint), ("bus", ctypes.c_uint),
                ("device", ctypes.c_uint), ("id", ctypes.c_uint), ("subsystem", ctypes.c_uint),
                ("bus_id", ctypes.c_char * 32)]


class Margin(ctypes.Structure):  # nvmlMarginTemperature_t
    _fields_ = [("version", ctypes.c_uint), ("celsius", ctypes.c_int)]


class FieldValue(ctypes.Structure):  # nvmlFieldValue_t; the value is a union of 8 bytes
    _fields_ = [("field", ctypes.c_uint), ("scope", ctypes.c_uint), ("timestamp", ctypes.c_longlong),
                ("latency", ctypes.c_longlong), ("type", ctypes.c_uint), ("status", ctypes.c_int),
                ("value", ctypes.c_uint), ("more", ctypes.c_uint)]


class Nvml:
    """The library, with every status but 0 an ``NvmlError``."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def call(self, name: str, *arguments: object) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise NvmlError(NO_FUNCTION) from None
        status = function(*arguments)
        if status:
            raise NvmlError(status)

    def text(self, name: str, *arguments: object) -> str:
        buffer = ctypes.create_string_buffer(96)
        self.call(name, *arguments, buffer, ctypes.c_uint(96))
        return buffer.value.decode()

    def number(self, name: str, *arguments: object) -> int:
        value = ctypes.c_ulonglong()  # the widest: smaller results fill its low bytes
        self.call(name, *arguments, ctypes.byref(value))
        return value.value

    def pair(self, name: str, device: object) -> tuple[int, int]:
        first, second = ctypes.c_uint(), ctypes.c_uint()
        self.call(name, device, ctypes.byref(first), ctypes.byref(second))
        return first.value, second.value

    def struct(self, name: str, device: object, into: ctypes.Structure) -> ctypes.Structure:
        if hasattr(into, "version"):
            into.version = ctypes.sizeof(into) | (2 if isinstance(into, Memory) else 1) << 24
        self.call(name, device, ctypes.byref(into))
        return into

    def words(self, status: int) -> str:
        self._library.nvmlErrorString.restype = ctypes.c_char_p
        said: bytes = self._library.nvmlErrorString(status)
        return said.decode()


@dataclass(frozen=True)
class Gpu:
    nvml: Nvml
    index: int
    handle: ctypes.c_void_p

    def text(self, name: str) -> str:
        return self.nvml.text(name, self.handle)

    def number(self, name: str, *arguments: object) -> int:
        return self.nvml.number(name, self.handle, *arguments)

    def memory(self, part: str) -> int:
        found = self.nvml.struct("nvmlDeviceGetMemoryInfo_v2", self.handle, Memory())
        return int(getattr(found, part)) // MIB

    def utilization(self, part: str) -> int:
        return int(getattr(self.nvml.struct("nvmlDeviceGetUtilizationRates", self.handle, Utilization()), part))

    def bus_id(self) -> str:
        found = self.nvml.struct("nvmlDeviceGetPciInfo_v3", self.handle, Pci())
        return bytes(found.bus_id).decode()

    def margin(self) -> int:
        return int(self.nvml.struct("nvmlDeviceGetMarginTemperature", self.handle, Margin()).celsius)

    def memory_temperature(self) -> int:
        value = FieldValue(field=MEMORY_TEMPERATURE)
        self.nvml.call("nvmlDeviceGetFieldValues", self.handle, 1, ctypes.byref(value))
        if value.status:
            raise NvmlError(value.status)
        return int(value.value)

    def watts(self, name: str) -> str:
        return f"{self.number(name) / 1000:.2f}"

    def power_bound(self, which: int) -> str:
        return f"{self.nvml.pair('nvmlDeviceGetPowerManagementLimitConstraints', self.handle)[which] / 1000:.2f}"

    def switch(self, name: str) -> str:
        return "Enabled" if self.number(name) else "Disabled"

    def current(self, name: str) -> str:
        return "Enabled" if self.nvml.pair(name, self.handle)[0] else "Disabled"

    def compute_capability(self) -> str:
        return "{}.{}".format(*self.nvml.pair("nvmlDeviceGetCudaComputeCapability", self.handle))


@dataclass(frozen=True)
class Field:
    read: Callable[[Gpu], object]
    unit: str = ""
    header: str = ""  # where it is not the name asked for


def _clock(which: int, header: str) -> Field:
    return Field(lambda gpu: gpu.number("nvmlDeviceGetClockInfo", which), "MHz", header)


def _reasons() -> Field:
    return Field(lambda gpu: f"0x{gpu.number('nvmlDeviceGetCurrentClocksEventReasons'):016x}")


FIELDS: dict[str, Field] = {
    "timestamp": Field(lambda _: time.strftime("%Y/%m/%d %H:%M:%S.000")),
    "driver_version": Field(lambda gpu: gpu.nvml.text("nvmlSystemGetDriverVersion")),
    "count": Field(lambda gpu: gpu.nvml.number("nvmlDeviceGetCount_v2")),
    "index": Field(lambda gpu: gpu.index),
    "name": Field(lambda gpu: gpu.text("nvmlDeviceGetName")),
    "uuid": Field(lambda gpu: gpu.text("nvmlDeviceGetUUID")),
    "serial": Field(lambda gpu: gpu.text("nvmlDeviceGetSerial")),
    "vbios_version": Field(lambda gpu: gpu.text("nvmlDeviceGetVbiosVersion")),
    "pci.bus_id": Field(Gpu.bus_id),
    "compute_cap": Field(Gpu.compute_capability),
    "persistence_mode": Field(lambda gpu: gpu.switch("nvmlDeviceGetPersistenceMode")),
    "pstate": Field(lambda gpu: f"P{gpu.number('nvmlDeviceGetPerformanceState')}"),
    "fan.speed": Field(lambda gpu: gpu.number("nvmlDeviceGetFanSpeed"), "%"),
    "temperature.gpu": Field(lambda gpu: gpu.number("nvmlDeviceGetTemperature", 0)),
    "temperature.gpu.tlimit": Field(Gpu.margin),
    "temperature.memory": Field(Gpu.memory_temperature),
    "utilization.gpu": Field(lambda gpu: gpu.utilization("gpu"), "%"),
    "utilization.memory": Field(lambda gpu: gpu.utilization("memory"), "%"),
    "memory.total": Field(lambda gpu: gpu.memory("total"), "MiB"),
    "memory.reserved": Field(lambda gpu: gpu.memory("reserved"), "MiB"),
    "memory.used": Field(lambda gpu: gpu.memory("used"), "MiB"),
    "memory.free": Field(lambda gpu: gpu.memory("free"), "MiB"),
    "power.draw": Field(lambda gpu: gpu.watts("nvmlDeviceGetPowerUsage"), "W"),
    "power.limit": Field(lambda gpu: gpu.watts("nvmlDeviceGetPowerManagementLimit"), "W"),
    "enforced.power.limit": Field(lambda gpu: gpu.watts("nvmlDeviceGetEnforcedPowerLimit"), "W"),
    "power.default_limit": Field(lambda gpu: gpu.watts("nvmlDeviceGetPowerManagementDefaultLimit"), "W"),
    "power.min_limit": Field(lambda gpu: gpu.power_bound(0), "W"),
    "power.max_limit": Field(lambda gpu: gpu.power_bound(1), "W"),
    "clocks.gr": _clock(0, "clocks.current.graphics"),
    "clocks.sm": _clock(1, "clocks.current.sm"),
    "clocks.mem": _clock(2, "clocks.current.memory"),
    "clocks.max.sm": Field(lambda gpu: gpu.number("nvmlDeviceGetMaxClockInfo", 1), "MHz"),
    "clocks.max.mem": Field(lambda gpu: gpu.number("nvmlDeviceGetMaxClockInfo", 2), "MHz", "clocks.max.memory"),
    "clocks_event_reasons.active": _reasons(),
    "clocks_throttle_reasons.active": _reasons(),
    "ecc.mode.current": Field(lambda gpu: gpu.current("nvmlDeviceGetEccMode")),
    "ecc.errors.uncorrected.volatile.total": Field(lambda gpu: gpu.number("nvmlDeviceGetTotalEccErrors", 1, 0)),
    "mig.mode.current": Field(lambda gpu: gpu.current("nvmlDeviceGetMigMode")),
    "pcie.link.gen.current": Field(lambda gpu: gpu.number("nvmlDeviceGetCurrPcieLinkGeneration")),
    "pcie.link.width.current": Field(lambda gpu: gpu.number("nvmlDeviceGetCurrPcieLinkWidth")),
}
ALIASES = {"gpu_name": "name", "gpu_uuid": "uuid", "gpu_bus_id": "pci.bus_id", "gpu_serial": "serial",
           "clocks.current.sm": "clocks.sm", "clocks.current.graphics": "clocks.gr",
           "clocks.current.memory": "clocks.mem", "clocks.max.memory": "clocks.max.mem"}
ABOUT = ("name", "uuid", "serial", "vbios_version", "pci.bus_id", "persistence_mode", "pstate", "mig.mode.current",
         "ecc.mode.current", "memory.total", "memory.used", "utilization.gpu", "temperature.gpu",
         "temperature.gpu.tlimit", "temperature.memory", "power.draw", "enforced.power.limit", "clocks.sm",
         "clocks_event_reasons.active")


def value(gpu: Gpu, name: str, *, units: bool = True) -> str:
    """One field as nvidia-smi prints it; ``[N/A]`` where this GPU has no such thing."""
    field = FIELDS[ALIASES.get(name, name)]
    try:
        read = field.read(gpu)
    except NvmlError as error:
        if error.status in (NOT_SUPPORTED, NO_FUNCTION, NOT_FOUND):
            return ABSENT
        raise
    return f"{read} {field.unit}" if units and field.unit else f"{read}"


def header(name: str, *, units: bool = True) -> str:
    """A column's heading: ``memory.used [MiB]``."""
    field = FIELDS[ALIASES.get(name, name)]
    shown = field.header or name
    return f"{shown} [{field.unit}]" if units and field.unit else shown


def csv(gpus: list[Gpu], names: list[str], options: list[str]) -> list[str]:
    """The lines of --query-gpu."""
    units = "nounits" not in options
    lines = [] if "noheader" in options else [", ".join(header(name, units=units) for name in names)]
    return lines + [", ".join(value(gpu, name, units=units) for name in names) for gpu in gpus]


def versions(nvml: Nvml) -> tuple[str, str]:
    """Of the driver and of CUDA."""
    cuda = nvml.number("nvmlSystemGetCudaDriverVersion_v2")
    return nvml.text("nvmlSystemGetDriverVersion"), f"{cuda // 1000}.{cuda % 1000 // 10}"


def table(nvml: Nvml, gpus: list[Gpu]) -> list[str]:
    """What nvidia-smi without arguments shows, in the real one's columns."""
    driver, cuda = versions(nvml)
    rule = "+-----------------------------------------+------------------------+----------------------+"
    title = f"NVIDIA-SMI {VERSION:<22} Driver Version: {driver:<14} CUDA Version: {cuda}"
    lines = [time.strftime("%a %b %e %H:%M:%S %Y"), "+" + "-" * (len(rule) - 2) + "+", f"| {title:<{len(rule) - 4}} |",
             rule, "| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |",
             "| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |",
             rule.replace("-", "=")]
    for gpu in gpus:
        power = f"{_short(gpu, 'power.draw')}W / {_short(gpu, 'enforced.power.limit')}W"
        memory = f"{value(gpu, 'memory.used').replace(' ', '')} / {value(gpu, 'memory.total').replace(' ', '')}"
        persistence = "On" if value(gpu, "persistence_mode") == "Enabled" else "Off"
        fan = value(gpu, "fan.speed", units=False)
        ecc = value(gpu, "ecc.errors.uncorrected.volatile.total").strip("[]")
        busy = value(gpu, "utilization.gpu", units=False)
        lines += [f"|{gpu.index:>4}  {value(gpu, 'name'):<26}{persistence:>7}  |   {value(gpu, 'pci.bus_id')} Off |"
                  f" {ecc:>20} |",
                  f"| {'N/A' if fan == ABSENT else fan + '%'}  {_short(gpu, 'temperature.gpu'):>3}C    "
                  f"{value(gpu, 'pstate'):<3}{power:>23} | {memory:>22} | {busy:>6}%      Default |", rule]
    return lines


def _short(gpu: Gpu, name: str) -> str:
    shown = value(gpu, name, units=False)
    return "N/A" if shown == ABSENT else shown.partition(".")[0]


def about(nvml: Nvml, gpus: list[Gpu]) -> list[str]:
    """-q, the fields that people look for."""
    driver, cuda = versions(nvml)
    lines = ["", "==============NVSMI LOG==============", "", f"{'Driver Version':<42}: {driver}",
             f"{'CUDA Version':<42}: {cuda}", "", f"{'Attached GPUs':<42}: {nvml.number('nvmlDeviceGetCount_v2')}"]
    for gpu in gpus:
        lines += [f"GPU {value(gpu, 'pci.bus_id')}", *(f"    {name:<38}: {value(gpu, name)}" for name in ABOUT), ""]
    return lines


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nvidia-smi", description="NVIDIA System Management Interface (opsctl lab)",
                                     allow_abbrev=False)
    parser.add_argument("-L", "--list-gpus", action="store_true")
    parser.add_argument("-q", "--query", action="store_true")
    parser.add_argument("-i", "--id", metavar="INDEX|UUID|BUS_ID")
    parser.add_argument("-pm", "--persistence-mode", choices=("0", "1"))
    parser.add_argument("--query-gpu", metavar="FIELD,...")
    parser.add_argument("--format", metavar="csv[,noheader][,nounits]", default="")
    parser.add_argument("--version", action="store_true")
    return parser


def run(nvml: Nvml, asked: argparse.Namespace, say: Callable[[str], object]) -> int:
    """Does what was asked; returns the exit status.

    Raises:
        NvmlError: a call failed that is not about one GPU.
    """
    names = [name.strip() for name in (asked.query_gpu or "").split(",") if name.strip()]
    for name in names:
        if ALIASES.get(name, name) not in FIELDS:
            say(f'Field "{name}" is not a valid field to query.\n')
            return BAD_ARGUMENTS
    if names and not asked.format.startswith("csv"):
        say('"--format=" switch is missing. List of supported formats: csv[,noheader][,nounits]')
        return BAD_ARGUMENTS
    gpus, status = attached(nvml, say)
    if asked.id is not None:
        gpus = [gpu for gpu in gpus if asked.id in (str(gpu.index), value(gpu, "uuid"), value(gpu, "pci.bus_id"))]
        if not gpus:
            say("No devices were found")
            return NOT_FOUND
    if asked.persistence_mode is not None:
        return status or set_persistence(nvml, gpus, int(asked.persistence_mode), say)
    if names:
        lines = csv(gpus, names, asked.format.split(","))
    elif asked.list_gpus:
        lines = [f"GPU {gpu.index}: {value(gpu, 'name')} (UUID: {value(gpu, 'uuid')})" for gpu in gpus]
    else:
        lines = about(nvml, gpus) if asked.query else table(nvml, gpus)
    for line in lines:
        say(line)
    return status


def attached(nvml: Nvml, say: Callable[[str], object]) -> tuple[list[Gpu], int]:
    """The GPUs that answer, and the status of the last that does not."""
    gpus, status = [], 0
    for index in range(nvml.number("nvmlDeviceGetCount_v2")):
        gpu = Gpu(nvml, index, ctypes.c_void_p())
        try:
            nvml.call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(gpu.handle))
            value(gpu, "temperature.gpu")  # a lost GPU still has a handle
            gpus.append(gpu)
        except NvmlError as error:
            say(f"Unable to determine the device handle for GPU{index}: {nvml.words(error.status)}")
            status = error.status
    return gpus, status


def set_persistence(nvml: Nvml, gpus: list[Gpu], mode: int, say: Callable[[str], object]) -> int:
    for gpu in gpus:
        where = value(gpu, "pci.bus_id")
        try:
            nvml.call("nvmlDeviceSetPersistenceMode", gpu.handle, mode)
        except NvmlError as error:
            say(f"Unable to set persistence mode for GPU {where}: {nvml.words(error.status)}\n"
                "Terminating early due to previous error.")
            return error.status
        say(f"{'Enabled' if mode else 'Disabled'} persistence mode for GPU {where}.")
    say("All done.")
    return 0


def failure(status: int, words: str) -> str:
    """What nvidia-smi says when NVML does not start."""
    if status == NO_DRIVER:
        return ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the "
                "latest NVIDIA driver is installed and running.\n")
    own = f"\nNVML library version: {'.'.join(VERSION.split('.')[:2])}" if status == MISMATCH else ""
    return f"Failed to initialize NVML: {words}{own}"


def start(nvml: Nvml) -> None:
    """Starts NVML; where no driver is loaded yet, nvidia-modprobe loads it first, as NVIDIA's library has it done.

    Raises:
        NvmlError: it does not start.
    """
    try:
        nvml.call("nvmlInit_v2")
    except NvmlError as error:
        loading = error.status == NO_DRIVER and os.access(MODPROBE, os.X_OK)
        if not loading or subprocess.run([MODPROBE], stderr=subprocess.DEVNULL, check=False).returncode:
            raise
        nvml.call("nvmlInit_v2")


def main() -> int:
    asked = arguments().parse_args()

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")

    try:
        nvml = Nvml(ctypes.CDLL("libnvidia-ml.so.1"))
    except OSError:
        say("NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. Please make sure that the NVIDIA Display "
            "Driver is properly installed and present in your system.")
        return NO_LIBRARY
    if asked.version:
        say(f"NVIDIA-SMI version  : {VERSION}")
        return 0
    try:
        start(nvml)
    except NvmlError as error:
        say(failure(error.status, nvml.words(error.status)))
        return error.status
    try:
        return run(nvml, asked, say)
    except NvmlError as error:
        say(nvml.words(error.status))
        return error.status
    finally:
        nvml.call("nvmlShutdown")


if __name__ == "__main__":
    sys.exit(main())
