"""``python -m opsctl.agent.gpu.probe``: what NVML answers on this host, as JSON, and how long it takes. Reads only.

For a GPU that nobody here has met: which fields and functions there are, of which types, what the reader makes of them.
``calls`` has every answer in order, so that a capture can be played to the reader later: tests/unit/replayed_nvml.py.
Serial numbers and UUIDs are made up in it, unless ``--names`` asks for them.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from opsctl.agent.drains import boot_clock
from opsctl.agent.gpu import sample as samples
from opsctl.agent.gpu.nvml import GoneError, LostError, Nvml, code_of

SCHEMA = "opsctl.gpu-probe/v1"
READS = ("nvmlInit", "nvmlDeviceGet", "nvmlSystemGet", "nvmlGpmQuery", "nvmlGpmSampleAlloc", "nvmlGpmSampleGet",
         "nvmlGpmMetricsGet")  # how the names begin that may be called at all
FIELDS_TO = 300  # ids of nvml.h end before
FIELDS_AT_ONCE = 50
TIMED = 50  # samples
LATE_S = 2.0
# Besides what the reader asks: what it might ask one day. Each takes a device handle and these numbers.
MORE: tuple[tuple[Any, ...], ...] = (
    ("nvmlDeviceGetArchitecture",), ("nvmlDeviceGetCudaComputeCapability",), ("nvmlDeviceGetNumGpuCores",),
    ("nvmlDeviceGetBoardPartNumber",), ("nvmlDeviceGetPersistenceMode",), ("nvmlDeviceGetPerformanceState",),
    ("nvmlDeviceGetEccMode",), ("nvmlDeviceGetTotalEccErrors", 1, 0), ("nvmlDeviceGetFanSpeed",),
    ("nvmlDeviceGetCurrPcieLinkGeneration",), ("nvmlDeviceGetCurrPcieLinkWidth",), ("nvmlDeviceGetTemperature", 0),
    ("nvmlDeviceGetPowerManagementLimit",), ("nvmlDeviceGetPowerManagementMode",), ("nvmlDeviceGetPowerState",),
    ("nvmlDeviceGetSupportedClocksEventReasons",), ("nvmlDeviceGetCurrentClocksThrottleReasons",),
    ("nvmlDeviceGetSupportedMemoryClocks",), ("nvmlDeviceGetClock", 1, 0), ("nvmlDeviceGetMaxClockInfo", 2),
    ("nvmlDeviceGetRetiredPagesPendingStatus",), ("nvmlDeviceGetMaxMigDeviceCount",), ("nvmlDeviceGetNumFans",),
)


class Recorder:
    """Takes the place of the module pynvml: asks it, and writes down each answer by name, GPU and arguments."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._known: dict[int, str] = {}  # handles and GPM samples, by address
        self.calls: dict[str, dict[str, list[Any]]] = {}
        self.took_ms: dict[str, list[float]] = {}
        self.recording = True

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._library, name)
        if not name.startswith("nvml") or not callable(found):
            return found
        if not name.startswith(READS):
            raise AttributeError(f"{name} is none of those that only read")
        return lambda *arguments: self._ask(name, found, arguments)

    def _ask(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        key = " ".join(str(self._plain(one)) for one in arguments if not _is_order(one))
        began = time.perf_counter()
        try:
            answer = function(*arguments)
        except self._library.NVMLError as error:
            self._note(name, key, began, {"error": code_of(error), "words": str(error)})
            raise
        if name.startswith("nvmlDeviceGetHandle") or name in ("nvmlDeviceGetMigDeviceHandleByIndex",
                                                               "nvmlGpmSampleAlloc"):
            self._known[_address(answer)] = f"<{key or 'sample'} {len(self._known)}>"
        self._note(name, key, began, self._plain(answer))
        return answer

    def _note(self, name: str, key: str, began: float, answer: Any) -> None:
        self.took_ms.setdefault(name, []).append((time.perf_counter() - began) * 1000)
        if self.recording:
            self.calls.setdefault(name, {}).setdefault(key, []).append(answer)

    def _plain(self, value: Any) -> Any:  # noqa: PLR0911 - one for each kind
        """As JSON has it. Structures become tables; what stands for a device or a GPM sample becomes its name."""
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, ctypes._Pointer | ctypes.c_void_p):
            return self._known.get(_address(value), "<pointer>")
        if isinstance(value, ctypes.Array | list | tuple):
            return [self._plain(one) for one in value]
        if _is_order(value):
            return {"metrics": [{"metricId": one.metricId, "nvmlReturn": one.nvmlReturn, "value": one.value}
                                for one in value.metrics[:value.numMetrics]]}
        if isinstance(value, ctypes.Structure | ctypes.Union):
            return {field[0]: self._plain(getattr(value, field[0])) for field in value._fields_}
        if hasattr(value, "__dict__"):
            return {key: self._plain(one) for key, one in vars(value).items()}
        return f"<{type(value).__name__}>"


def _is_order(value: Any) -> bool:
    return hasattr(value, "metrics") and hasattr(value, "numMetrics")


def _address(value: Any) -> int:
    return ctypes.cast(value, ctypes.c_void_p).value or 0


def probe(library: Any, names: bool = False) -> dict[str, Any]:
    """The document. Raises GoneError when NVML cannot be asked."""
    recorder = Recorder(library)
    nvml = Nvml(recorder)
    threading.Thread(target=_tell_of_waiting, args=(nvml,), daemon=True).start()
    nvml.start()
    facts = samples.host_facts(nvml)
    gpus = samples.open_gpus(nvml)
    for gpu in gpus:
        samples.sample(nvml, gpu)
    time.sleep(1.0)  # profiling counters are what lies between two samples
    found = []
    for gpu in gpus:
        found.append({"index": gpu.index, "sample": samples.sample(nvml, gpu), "thermal": samples.thermal(nvml, gpu)})
    recorder.recording = False
    document = {"schema": SCHEMA, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts,
                "nvidia_ml_py": str(getattr(library, "__version__", "")) or _version(), "gpus": found,
                "calls": recorder.calls, "cost": _cost(nvml, gpus, recorder)}
    for gpu, one in zip(gpus, found, strict=True):
        if gpu.handle is not None:
            one |= {"fields": _fields(nvml, recorder, gpu), "more": _more(nvml, recorder, gpu)}
    if not names:
        document = _without(document)
    return document


def _cost(nvml: Nvml, gpus: list[samples.Gpu], recorder: Recorder) -> dict[str, Any]:
    recorder.took_ms.clear()
    cost: dict[str, Any] = {"gpus": len(gpus)}
    for what, ask in (("sample", samples.sample), ("thermal", samples.thermal)):
        took = []
        for _ in range(TIMED):
            began = time.perf_counter()
            for gpu in gpus:
                ask(nvml, gpu)
            took.append((time.perf_counter() - began) * 1000)
        cost[f"{what}_ms"] = {"median": round(statistics.median(took), 3), "largest": round(max(took), 3)}
    cost["calls_ms"] = {name: round(statistics.median(took), 4) for name, took in sorted(recorder.took_ms.items())}
    return cost


def _fields(nvml: Nvml, recorder: Recorder, gpu: samples.Gpu) -> dict[str, Any]:
    """Every field that is answered: type, value, microseconds; of the others nothing."""
    found: dict[str, Any] = {}
    for first in range(1, FIELDS_TO, FIELDS_AT_ONCE):
        numbers = list(range(first, first + FIELDS_AT_ONCE))
        for one in nvml.ask(gpu.index, ("nvmlDeviceGetFieldValues", gpu.handle, numbers)) or ():
            if one.nvmlReturn == 0:
                kind = samples.VALUE_OF_TYPE[one.valueType] if one.valueType < len(samples.VALUE_OF_TYPE) else "uiVal"
                found[str(one.fieldId)] = {"type": one.valueType, "value": getattr(one.value, kind),
                                           "us": one.latencyUsec}
    return found


def _more(nvml: Nvml, recorder: Recorder, gpu: samples.Gpu) -> dict[str, Any]:
    """What else it answers, or NVML's words why not."""
    found: dict[str, Any] = {}
    for name, *arguments in MORE:
        function = getattr(nvml.library, name, None)
        if function is None:
            continue
        try:
            found[name] = recorder._plain(function(gpu.handle, *arguments))
        except recorder.NVMLError as error:
            found[name] = {"error": code_of(error), "words": str(error)}
    return found


def _without(document: dict[str, Any]) -> dict[str, Any]:
    """Without UUIDs and serial numbers, wherever they stand."""
    text = json.dumps(document)
    for number, gpu in enumerate(one["sample"] for one in document["gpus"]):
        made_up = [(gpu.get("uuid"), f"GPU-00000000-0000-0000-0000-{number:012}"), (gpu.get("serial"), f"{number:013}")]
        made_up += [(part.get("uuid"), f"MIG-00000000-0000-0000-{number:04}-{place:012}")
                    for place, part in enumerate(gpu.get("mig", ()))]
        for real, other in made_up:
            if real:
                text = text.replace(json.dumps(real), json.dumps(other))
    changed: dict[str, Any] = json.loads(text)
    return changed


def _version() -> str:
    from importlib import metadata  # noqa: PLC0415 - loaded by nobody else

    try:
        return metadata.version("nvidia-ml-py")
    except metadata.PackageNotFoundError:
        return ""


def _tell_of_waiting(nvml: Nvml) -> None:
    while True:
        time.sleep(LATE_S)
        call = nvml.call
        if call is not None and boot_clock() - call.since > LATE_S:
            sys.stderr.write(f"{call.name} of GPU {call.gpu} has not returned for {boot_clock() - call.since:.0f} s\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m opsctl.agent.gpu.probe", description=__doc__.partition("\n")[0])
    parser.add_argument("--names", action="store_true", help="with UUIDs and serial numbers as they are")
    words = parser.parse_args(argv)
    try:
        document = probe(importlib.import_module("pynvml"), words.names)
    except (ImportError, GoneError, LostError) as error:
        sys.stderr.write(f"NVML cannot be asked: {error}\n")
        return 1
    sys.stdout.write(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
