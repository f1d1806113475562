"""Everything worth knowing of one GPU, as plain data: ``open_gpus`` once, then ``sample`` each second, and ``thermal``
between two of these.

A key is there when the GPU has it. Units stand in the names; a margin is signed, in degrees to the temperature at which
the driver begins to slow the GPU down, and 0 or less is a value like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opsctl.agent.gpu.gpm import Gpm
from opsctl.agent.gpu.nvml import GoneError, LostError, Nvml

MIB = 1024 * 1024
ABSURD_C = 200  # DCGM takes nothing above for a temperature
CLOCK_SM, CLOCK_MEM = 1, 2
CORE = 0  # NVML_TEMPERATURE_GPU

SLOW_EVERY = 5  # samples

# Field ids of nvml.h. One call asks for all of them.
MEMORY_TEMPERATURE = 82
ECC = {"sbe_volatile": 3, "dbe_volatile": 4, "sbe_aggregate": 5, "dbe_aggregate": 6}
VIOLATIONS_NS = {"power": 74, "thermal": 75, "sync_boost": 76, "board_limit": 77, "low_utilisation": 78,
                 "reliability": 79}
SLOWDOWNS_NS = {"sw_thermal_slowdown": 269, "hw_thermal_slowdown": 270, "hw_power_brake": 271}
OFFSETS = {"shutdown": 193, "slowdown": 194, "memory_max": 195, "max_operating": 196}  # signed, on the margin's scale
RECOVERY_ACTION = 230
NVLINK_KIB = (138, 139)  # sent and received, of all links together
ALL_LINKS = 0xFFFFFFFF
FIELDS = (*((number, ALL_LINKS) for number in NVLINK_KIB), MEMORY_TEMPERATURE, *ECC.values(), *VIOLATIONS_NS.values(),
          *SLOWDOWNS_NS.values(), *OFFSETS.values(), RECOVERY_ACTION)
# NVML_TEMPERATURE_THRESHOLD_*
THRESHOLDS = {"shutdown": 0, "slowdown": 1, "memory_max": 2, "max_operating": 3}
PART = ("id", "profile", "uuid")  # who a part is, whatever cannot be measured of it
VALUE_OF_TYPE = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


@dataclass
class Gpu:
    """One GPU that NVML knows; ``identity`` and ``fixed`` do not change while the driver is loaded."""

    index: int
    handle: Any = None
    identity: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    gpm: Gpm | None = None
    words: str = ""  # why there is no handle
    slow: dict[str, Any] = field(default_factory=dict)  # what is not asked each second
    slow_troubles: list[str] = field(default_factory=list)
    offsets: dict[str, Any] = field(default_factory=dict)
    memory_sensor: bool = True
    turn: int = 0


def open_gpus(nvml: Nvml) -> list[Gpu]:
    """All GPUs, by index; one that is lost has no handle. Raises GoneError."""
    gpus = []
    nvml.troubles.clear()
    count = nvml.ask(-1, ("nvmlDeviceGetCount",))
    if count is None:  # none that is known, which is not the same as none
        raise GoneError("failed", _troubles(nvml) or "NVML does not say how many GPUs there are")
    for index in range(count):
        gpu = Gpu(index)
        nvml.troubles.clear()
        try:
            handle = nvml.ask(index, ("nvmlDeviceGetHandleByIndex", index))
            if handle is not None:
                gpu.identity = _identity(nvml, index, handle)
                gpu.fixed = _fixed(nvml, index, handle)
                gpu.gpm = Gpm.of(nvml, index, handle)
                gpu.handle = handle
            gpu.words = _troubles(nvml)
        except LostError as error:
            gpu.words = str(error)
        gpus.append(gpu)
    return gpus


def host_facts(nvml: Nvml) -> dict[str, Any]:
    """Versions of the driver and of the CUDA that it brings."""
    cuda = nvml.ask(-1, ("nvmlSystemGetCudaDriverVersion_v2",), ("nvmlSystemGetCudaDriverVersion",))
    return _there({"driver": nvml.ask(-1, ("nvmlSystemGetDriverVersion",)),
                   "cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}"})


def sample(nvml: Nvml, gpu: Gpu) -> dict[str, Any]:
    """One GPU now. ``state`` is ``ok``, ``lost`` or ``unreadable``, with words. Raises GoneError.

    ``unreadable``: NVML answers with errors, and does not even tell its temperature.
    """
    known = {"index": gpu.index, **gpu.identity, **gpu.fixed}
    nvml.troubles.clear()
    try:
        if gpu.handle is None:
            raise LostError(gpu.words or "NVML gives no handle for it")
        values = _values(nvml, gpu)
    except LostError as error:
        parts = parts_of(gpu.slow)
        return {**known, **({"mig": parts} if parts else {}), "state": "lost", "words": str(error)}
    return {**known, **values, **_state(nvml, values)}


def thermal(nvml: Nvml, gpu: Gpu) -> dict[str, Any]:
    """Of one GPU now what may not wait for the next sample, with the least questions. Raises GoneError."""
    known: dict[str, Any] = {"index": gpu.index}
    known |= {key: gpu.identity[key] for key in ("uuid", "pci") if key in gpu.identity}
    nvml.troubles.clear()
    try:
        if gpu.handle is None:
            raise LostError(gpu.words or "NVML gives no handle for it")
        values = _heat(nvml, gpu)
    except LostError as error:
        return {**known, "state": "lost", "words": str(error)}
    return {**known, **values, **_state(nvml, values)}


def margin(api: int | None, values: dict[str, Any], offsets: dict[str, Any], thresholds: dict[str, Any]
           ) -> dict[str, Any]:
    """``margin_c`` and where it comes from: ``margin_api``, ``fields`` or ``thresholds``; {} when nobody knows. Pure.

    The margin API takes the least over all sensors. The others only know those that can be read: with ``fields`` the
    highest operating temperature is the slowdown (or shutdown) threshold less its offset, with ``thresholds`` it is a
    threshold itself, or else the slowdown's.
    """
    if api is not None:
        return {"margin_c": api, "margin_source": "margin_api"}
    core = values.get("temperature_c")
    if core is None:
        return {}
    highest, source = None, "thresholds"
    for name in ("slowdown", "shutdown"):
        if highest is None and name in offsets and name in thresholds:
            highest, source = thresholds[name] + offsets[name], "fields"
    if highest is None:
        highest = thresholds.get("max_operating", thresholds.get("slowdown"))
    if highest is None:
        return {}
    margins = [highest - core]
    if "memory_temperature_c" in values and "memory_max" in thresholds:
        margins.append(thresholds["memory_max"] - values["memory_temperature_c"])
    return {"margin_c": min(margins), "margin_source": source}


def _state(nvml: Nvml, values: dict[str, Any]) -> dict[str, str]:
    words = _troubles(nvml)
    return {"state": "unreadable" if words and "temperature_c" not in values else "ok", "words": words}


def _heat(nvml: Nvml, gpu: Gpu) -> dict[str, Any]:
    """What the guard decides by."""
    handle = gpu.handle
    memory = [MEMORY_TEMPERATURE] if gpu.memory_sensor else []
    fields = _fields(nvml.ask(gpu.index, ("nvmlDeviceGetFieldValues", handle, memory)) if memory else None)
    values = _there({
        "temperature_c": _temperature(nvml.ask(gpu.index, ("nvmlDeviceGetTemperatureV", handle, CORE),
                                               ("nvmlDeviceGetTemperature", handle, CORE))),
        "memory_temperature_c": _temperature(fields.get(MEMORY_TEMPERATURE)),
        "reasons": nvml.ask(gpu.index, ("nvmlDeviceGetCurrentClocksEventReasons", handle),
                            ("nvmlDeviceGetCurrentClocksThrottleReasons", handle)),
    })
    api = nvml.ask(gpu.index, ("nvmlDeviceGetMarginTemperature", handle))
    return values | margin(api, values, gpu.offsets, gpu.fixed.get("thresholds_c", {}))


def _troubles(nvml: Nvml) -> str:
    """The first few, in NVML's words; the others say the same, mostly."""
    return "; ".join(nvml.troubles[:3])


def _identity(nvml: Nvml, index: int, handle: Any) -> dict[str, Any]:
    pci = nvml.ask(index, ("nvmlDeviceGetPciInfo", handle))
    return _there({
        "uuid": nvml.ask(index, ("nvmlDeviceGetUUID", handle)),
        "name": nvml.ask(index, ("nvmlDeviceGetName", handle)),
        "pci": str(pci.busId).upper() if pci is not None else None,
        "minor": nvml.ask(index, ("nvmlDeviceGetMinorNumber", handle)),
        "serial": nvml.ask(index, ("nvmlDeviceGetSerial", handle)),
        "vbios": nvml.ask(index, ("nvmlDeviceGetVbiosVersion", handle)),
    })


def _fixed(nvml: Nvml, index: int, handle: Any) -> dict[str, Any]:
    limits = nvml.ask(index, ("nvmlDeviceGetPowerManagementLimitConstraints", handle)) or (None, None)
    default = nvml.ask(index, ("nvmlDeviceGetPowerManagementDefaultLimit", handle))
    power = {"default": default, "min": limits[0], "max": limits[1]}
    thresholds = {name: nvml.ask(index, ("nvmlDeviceGetTemperatureThreshold", handle, number))
                  for name, number in THRESHOLDS.items()}
    return _there({
        "power_limits_w": _there({name: _scaled(value, 1000) for name, value in power.items()}),
        "thresholds_c": {name: value for name, value in thresholds.items() if value and value < ABSURD_C},
        "clock_sm_max_mhz": nvml.ask(index, ("nvmlDeviceGetMaxClockInfo", handle, CLOCK_SM)),
    })


def _values(nvml: Nvml, gpu: Gpu) -> dict[str, Any]:
    """What changes each second, and what was asked last of the rest."""
    if gpu.turn % SLOW_EVERY == 0:
        gpu.slow = _slow_values(nvml, gpu)
        gpu.slow_troubles, nvml.troubles = nvml.troubles, []
    gpu.turn += 1
    index, handle = gpu.index, gpu.handle

    def ask(*attempts: tuple[Any, ...]) -> Any:
        return nvml.ask(index, *((name, handle, *more) for name, *more in attempts))

    values = _heat(nvml, gpu) | _there({
        "clock_sm_mhz": ask(("nvmlDeviceGetClockInfo", CLOCK_SM)),
        "clock_memory_mhz": ask(("nvmlDeviceGetClockInfo", CLOCK_MEM)),
        "power_w": _scaled(ask(("nvmlDeviceGetPowerUsage",)), 1000),
        "energy_mj": ask(("nvmlDeviceGetTotalEnergyConsumption",)),
        "profile": gpu.gpm.metrics(nvml) if gpu.gpm else None,
    })
    used = ask(("nvmlDeviceGetUtilizationRates",))
    if used is not None:
        values |= {"utilisation_percent": used.gpu, "memory_utilisation_percent": used.memory}
    values |= _memory(nvml, index, handle)
    nvml.troubles += gpu.slow_troubles
    return {**gpu.slow, **values}


def _slow_values(nvml: Nvml, gpu: Gpu) -> dict[str, Any]:
    """Counters, limits, parts: nobody misses them for some seconds, and they are most of what there is to ask."""
    index, handle = gpu.index, gpu.handle

    def ask(*attempts: tuple[Any, ...]) -> Any:
        return nvml.ask(index, *((name, handle, *more) for name, *more in attempts))

    fields = _fields(ask(("nvmlDeviceGetFieldValues", list(FIELDS))))
    gpu.memory_sensor = MEMORY_TEMPERATURE in fields
    gpu.offsets = _named(OFFSETS, fields) or {}
    values = _there({
        "pcie_replays": ask(("nvmlDeviceGetPcieReplayCounter",)),
        "recovery_action": fields.get(RECOVERY_ACTION),
        "ecc": _named(ECC, fields),
        "violations_ns": _named(VIOLATIONS_NS, fields),
        "slowdowns_ns": _named(SLOWDOWNS_NS, fields),
        "offsets_c": gpu.offsets or None,
        "nvlink_kib": sum(fields[number] for number in NVLINK_KIB) if fields.keys() >= set(NVLINK_KIB) else None,
        "mig": _mig(nvml, gpu),
    })
    processes = ask(("nvmlDeviceGetComputeRunningProcesses_v3",))
    if processes is not None:
        values["pids"] = sorted(one.pid for one in processes)
    enforced = _scaled(ask(("nvmlDeviceGetEnforcedPowerLimit",)), 1000)
    if enforced is not None:
        values["power_limits_w"] = {**gpu.fixed.get("power_limits_w", {}), "enforced": enforced}
    for name, function in (("encoder", "nvmlDeviceGetEncoderUtilization"),
                           ("decoder", "nvmlDeviceGetDecoderUtilization")):
        pair = ask((function,))
        if pair is not None:
            values[f"{name}_percent"] = pair[0]
    rows = ask(("nvmlDeviceGetRemappedRows",))
    if rows is not None:
        values["remapped"] = dict(zip(("correctable", "uncorrectable", "pending", "failure"), map(int, rows),
                                      strict=True))
    return values


def _memory(nvml: Nvml, index: int, handle: Any) -> dict[str, Any]:
    version = getattr(nvml.library, "nvmlMemory_v2", 0x02000028)
    told = nvml.ask(index, ("nvmlDeviceGetMemoryInfo", handle, version), ("nvmlDeviceGetMemoryInfo", handle))
    if told is None:
        return {}
    reserved = getattr(told, "reserved", None)  # the first version counts it as used
    return _there({"memory_used_mib": told.used / MIB, "memory_free_mib": told.free / MIB,
                   "memory_total_mib": told.total / MIB, "memory_reserved_mib": _scaled(reserved, MIB)})


def parts_of(gpu: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A sample's parts of a GPU that is cut into some, without what was measured of them. Pure."""
    return [{key: part.get(key) for key in PART} for part in gpu.get("mig", ())]


def _mig(nvml: Nvml, gpu: Gpu) -> list[dict[str, Any]] | None:
    """The GPU instances of a GPU that is cut into parts: id, profile such as ``1g.10gb``, uuid, memory.

    An error is no "none": the parts known last are still there, and whoever serves on them is not lost.
    """
    troubles = len(nvml.troubles)
    found = _parts(nvml, gpu.index, gpu.handle)
    if len(nvml.troubles) > troubles and (known := parts_of(gpu.slow)):
        return known
    return None if found is None else [{**told, **_memory(nvml, gpu.index, part)} for part, told in found]


def _parts(nvml: Nvml, index: int, handle: Any) -> list[tuple[Any, dict[str, Any]]] | None:
    mode = nvml.ask(index, ("nvmlDeviceGetMigMode", handle))
    if not mode or not mode[0]:
        return None
    found = []
    for number in range(nvml.ask(index, ("nvmlDeviceGetMaxMigDeviceCount", handle)) or 0):
        part = nvml.ask(index, ("nvmlDeviceGetMigDeviceHandleByIndex", handle, number))
        if part is not None:
            name = str(nvml.ask(index, ("nvmlDeviceGetName", part)) or "")
            found.append((part, {"id": nvml.ask(index, ("nvmlDeviceGetGpuInstanceId", part)),
                                 "profile": name.rpartition("MIG ")[2],
                                 "uuid": nvml.ask(index, ("nvmlDeviceGetUUID", part))}))
    return found


def _fields(answer: Any) -> dict[int, int | float]:
    """By field id, those that this GPU answers."""
    found: dict[int, int | float] = {}
    for one in answer or ():
        if one.nvmlReturn == 0:
            # Drivers of branch 545 call the memory's temperature something else than what they write there.
            kind = 1 if one.fieldId == MEMORY_TEMPERATURE else one.valueType
            if kind < len(VALUE_OF_TYPE):
                found[one.fieldId] = getattr(one.value, VALUE_OF_TYPE[kind])
    return found


def _named(names: dict[str, int], fields: dict[int, int | float]) -> dict[str, int | float] | None:
    return {name: fields[number] for name, number in names.items() if number in fields} or None


def _temperature(value: Any) -> int | None:
    return None if value is None or value > ABSURD_C else int(value)


def _scaled(value: Any, divisor: int) -> float | None:
    return None if value is None else value / divisor


def _there(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
