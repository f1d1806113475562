"""An NVML that is played: what nvidia-ml-py gives for each question stands in a dict. Also the process that asks it.

``python played_nvml.py ORDERS LOCK`` runs the real reader on it; ORDERS is a JSON file, read at every call:
``{"hang": "nvmlDeviceGetPowerUsage", "lost": [1], "xids": [[0, 79], ...], "answers": {...}, "init": 9, "gpus": 2}``.
``"unknown": [1]``: a GPU that answers every question, or those of ``unknown_names``, with NVML_ERROR_UNKNOWN.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NOT_SUPPORTED, GPU_IS_LOST, TIMEOUT, FUNCTION_NOT_FOUND, UNKNOWN = 3, 15, 10, 13, 999
MIB = 1024 * 1024
H200: dict[str, Any] = {
    "nvmlDeviceGetName": "NVIDIA H200", "nvmlDeviceGetSerial": "165000", "nvmlDeviceGetVbiosVersion": "96.00.B7",
    "nvmlDeviceGetPowerManagementLimitConstraints": (200_000, 700_000),
    "nvmlDeviceGetPowerManagementDefaultLimit": 700_000, "nvmlDeviceGetEnforcedPowerLimit": 650_000,
    "nvmlDeviceGetTemperatureThreshold": {0: 95, 1: 89, 2: 95, 3: 87}, "nvmlDeviceGetTemperatureV": 71,
    "nvmlDeviceGetMarginTemperature": 16, "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetClockInfo": {1: 1830, 2: 3201},
    "nvmlDeviceGetPowerUsage": 412_000, "nvmlDeviceGetTotalEnergyConsumption": 123_456,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x4, "nvmlDeviceGetPcieReplayCounter": 0,
    "nvmlDeviceGetUtilizationRates": {"gpu": 93, "memory": 41}, "nvmlDeviceGetEncoderUtilization": (0, 167_000),
    "nvmlDeviceGetDecoderUtilization": (0, 167_000), "nvmlDeviceGetRemappedRows": (0, 0, 0, 0),
    "nvmlDeviceGetMemoryInfo": {"total": 143_771 * MIB, "reserved": 600 * MIB, "used": 120_000 * MIB,
                                "free": 23_171 * MIB},
    "fields": {3: 0, 4: 0, 5: 2, 6: 0, 74: 5, 75: 0, 76: 0, 77: 0, 78: 0, 79: 0, 82: 76, 138: 1000, 139: 234, 193: -8,
               194: -2, 195: 0, 196: 0, 230: 0, 269: 7, 270: 0, 271: 0},
    "gpm": {1: 91.0, 2: 80.0, 3: 30.0, 5: 55.0, 10: 44.0, 11: 0.0, 12: 3.0, 13: 1.0, 20: 2.0, 21: 4.0,
            60: 8.0, 61: 8.0},
}
SIGNED = {193, 194, 195, 196}


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return {3: "Not Supported", 9: "Driver Not Loaded", 15: "GPU is lost", 18: "Driver/library version mismatch",
                999: "Unknown Error"}.get(self.value, f"code {self.value}")


class Played:
    """Takes the place of the module pynvml. ``answers`` changes what an H200 says; None there: NOT_SUPPORTED."""

    NVMLError = NVMLError
    NVML_GPM_METRICS_GET_VERSION = 1
    nvmlMemory_v2 = 0x02000028  # noqa: N815

    def __init__(self, orders: Mapping[str, Any] | Path | None = None) -> None:
        self._orders = orders or {}
        self._told = 0
        self.asked: list[str] = []

    @property
    def orders(self) -> Mapping[str, Any]:
        return json.loads(self._orders.read_text()) if isinstance(self._orders, Path) else self._orders

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        return lambda *arguments: self._answer(name, arguments)

    def c_nvmlGpmMetricsGet_t(self) -> Any:  # noqa: N802
        return SimpleNamespace(metrics=[SimpleNamespace(metricId=0, nvmlReturn=0, value=0.0) for _ in range(32)])

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> Any:  # noqa: PLR0911, PLR0912
        self.asked.append(name)
        while self.orders.get("hang") == name:
            time.sleep(0.02)
        gpu = arguments[0].value - 1 if arguments and isinstance(arguments[0], ctypes.c_void_p) else None
        if gpu is not None and gpu in self.orders.get("lost", ()):
            raise NVMLError(GPU_IS_LOST)
        about = arguments[0] if name == "nvmlDeviceGetHandleByIndex" else gpu
        names = self.orders.get("unknown_names", [])
        if (name == "nvmlDeviceGetCount" and name in names) or (
                about in self.orders.get("unknown", ()) and (name in names or (gpu is not None and not names))):
            raise NVMLError(UNKNOWN)
        known = {**H200, **self.orders.get("answers", {})}
        if known.get(name, 0) in ("missing", None):
            raise NVMLError(FUNCTION_NOT_FOUND if known[name] == "missing" else NOT_SUPPORTED)
        if name in ("nvmlInit", "nvmlDeviceRegisterEvents"):
            if name == "nvmlInit" and self.orders.get("init"):
                raise NVMLError(self.orders["init"])
            return None
        if name == "nvmlDeviceGetCount":
            return self.orders.get("gpus", 2)
        if name == "nvmlDeviceGetHandleByIndex":
            return ctypes.c_void_p(arguments[0] + 1)
        if name == "nvmlDeviceGetUUID":
            return f"GPU-{gpu}"
        if name == "nvmlDeviceGetMinorNumber":
            return gpu
        if name == "nvmlDeviceGetPciInfo":
            return SimpleNamespace(busId=f"00000000:{0x1a + (gpu or 0):02x}:00.0")
        if name == "nvmlSystemGetDriverVersion":
            return "580.126.09"
        if name == "nvmlSystemGetCudaDriverVersion_v2":
            return 13000
        if name == "nvmlDeviceGetComputeRunningProcesses_v3":
            return [SimpleNamespace(pid=pid) for pid in known.get("pids", (4711,))]
        if name == "nvmlDeviceGetFieldValues":
            return [field(number[0] if isinstance(number, tuple) else number, known["fields"])
                    for number in arguments[1]]
        if name == "nvmlEventSetWait_v2":
            return self._event()
        if name in ("nvmlGpmQueryDeviceSupport", "nvmlGpmSampleAlloc", "nvmlGpmSampleGet", "nvmlEventSetCreate"):
            return known["gpm"] and SimpleNamespace(isSupportedDevice=1)
        if name == "nvmlGpmMetricsGet":
            for one in arguments[0].metrics:
                one.value, one.nvmlReturn = known["gpm"].get(one.metricId, 0.0), 0 if one.metricId else 3
            return arguments[0]
        if name not in known:
            raise NVMLError(NOT_SUPPORTED)
        value = known[name]
        if isinstance(value, dict):
            if "free" in value or "gpu" in value:
                return SimpleNamespace(**value)
            return value[arguments[1]] if arguments[1] in value else value[str(arguments[1])]
        return value

    def _event(self) -> Any:
        for _ in range(20):
            xids = self.orders.get("xids", [])
            if len(xids) > self._told:
                gpu, xid = xids[self._told]
                self._told += 1
                return SimpleNamespace(device=ctypes.c_void_p(gpu + 1), eventType=8, eventData=xid)
            time.sleep(0.01)
        raise NVMLError(TIMEOUT)


def field(number: int, fields: Mapping[Any, int]) -> Any:
    value = fields.get(number, fields.get(str(number)))
    return SimpleNamespace(fieldId=number, nvmlReturn=0 if value is not None else NOT_SUPPORTED,
                           valueType=5 if number in SIGNED else 3 if number != 82 else 0,
                           value=SimpleNamespace(siVal=value, ullVal=value, uiVal=value, dVal=0.0))


if __name__ == "__main__":
    import os

    from opsctl.agent.gpu import child

    sys.modules["pynvml"] = Played(Path(sys.argv[1]))  # type: ignore[assignment]
    child.EVERY_S, child.SLOW_S = 0.1, 0.1
    status = child.main(sys.argv[2:])
    sys.stdout.flush()
    os._exit(status)
