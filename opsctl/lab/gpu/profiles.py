"""GPU models as data: ``profiles.toml``, read and checked. Pure but for the one read."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tomllib

from opsctl.errors import ConfigurationError, UsageError

FILE = Path(__file__).with_name("profiles.toml")
GPUS_PER_HOST = 16
COUNT = re.compile(r"(\d+)x(.+)")
ARCHITECTURES = {"volta": 5, "turing": 6, "ampere": 7, "ada": 8, "hopper": 9, "blackwell": 10}  # NVML_DEVICE_ARCH_*


@dataclass(frozen=True)
class Profile:
    """One GPU model. ``None`` means that the GPU has no such thing, and NVML says so (NOT_SUPPORTED).

    Temperatures in degrees Celsius, power in watts, clocks in MHz, memory in MiB, times in seconds.
    """

    model: str
    nvml_name: str
    architecture: str
    compute_capability: str
    form: str
    pci_device_id: int
    pci_subsystem_id: int
    vbios: str
    board_part_number: str
    memory_mib: int
    memory_reserved_mib: int
    bar1_mib: int
    power_idle_w: float
    power_min_w: float
    power_default_w: float
    power_max_w: float
    clock_sm_idle_mhz: int
    clock_sm_max_mhz: int
    clock_memory_mhz: int
    clock_video_mhz: int
    max_operating_c: int
    slowdown_c: int
    shutdown_c: int
    t_limit: bool  # tells its limits as distances (fields 193-196, margin)
    gpm: bool
    mig_slices: int  # 0: no MIG
    ecc: bool
    row_remapper: bool  # since Ampere; before, pages are retired
    fan: bool
    nvlinks: int
    fabric: bool  # GPUs are joined by NVSwitches: the host needs a fabric manager
    nvswitches: int  # how many of them are bridges on PCI
    pcie_generation: int
    thermal_resistance_c_per_w: float
    tau_s: float
    source: str
    memory_max_c: int | None = None  # None: no memory sensor
    memory_above_core_c: float = 0.0
    memory_tau_s: float = 30.0
    nvswitch_device_id: int = 0


def load(path: Path = FILE) -> dict[str, Profile]:
    """Every model of a file.

    Raises:
        ConfigurationError: ``lab.gpu_profile``, naming file, table and key.
    """
    try:
        document = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError("lab.gpu_profile", f"{path}: {error}.") from None
    return {model: parse(model, table, path) for model, table in document.items()}


@cache
def known() -> dict[str, Profile]:
    return load()


def parse(model: str, table: Any, path: Path) -> Profile:
    """One table as a profile.

    Raises:
        ConfigurationError: a key is missing, unknown, of the wrong type, or contradicts another.
    """
    if not isinstance(table, dict):
        raise _wrong(path, model, "the model", "is no table")
    fields = {field.name: field for field in dataclasses.fields(Profile) if field.name != "model"}
    kinds = typing.get_type_hints(Profile)
    for key in table:
        if key not in fields:
            raise _wrong(path, model, key, "is unknown")
    for name, field in fields.items():
        if name not in table and field.default is dataclasses.MISSING:
            raise _wrong(path, model, name, "is missing")
    values = {key: _typed(value, kinds[key], path, model, key) for key, value in table.items()}
    profile = Profile(model=model, **values)
    for key, reason in _contradictions(profile):
        raise _wrong(path, model, key, reason)
    return profile


def _typed(value: Any, kind: Any, path: Path, model: str, key: str) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    wanted = next(option for option in options if option is not type(None))
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise _wrong(path, model, key, f"is {value!r}, which is no {wanted.__name__}")
    return value


def _contradictions(profile: Profile) -> typing.Iterator[tuple[str, str]]:
    if profile.architecture not in ARCHITECTURES:
        yield "architecture", f"is {profile.architecture!r}; known: {', '.join(ARCHITECTURES)}"
    if not re.fullmatch(r"\d+\.\d", profile.compute_capability):
        yield "compute_capability", f"is {profile.compute_capability!r}, not like 9.0"
    if not profile.power_idle_w < profile.power_min_w <= profile.power_default_w <= profile.power_max_w:
        yield "power_min_w", "does not lie above power_idle_w and below the default and the maximum"
    if not profile.max_operating_c < profile.slowdown_c < profile.shutdown_c:
        yield "slowdown_c", "does not lie between max_operating_c and shutdown_c"
    if not 0 < profile.clock_sm_idle_mhz < profile.clock_sm_max_mhz:
        yield "clock_sm_idle_mhz", "does not lie between 0 and clock_sm_max_mhz"
    for key in ("tau_s", "memory_tau_s", "thermal_resistance_c_per_w", "memory_mib"):
        if getattr(profile, key) <= 0:
            yield key, "is not above 0"
    if profile.nvswitches and not (profile.nvswitch_device_id and profile.fabric):
        yield "nvswitches", "is not 0: that wants a nvswitch_device_id, and fabric = true"
    if not profile.source:
        yield "source", "is empty: where are the numbers from?"


def _wrong(path: Path, model: str, key: str, reason: str) -> ConfigurationError:
    return ConfigurationError("lab.gpu_profile", f"{path}: [{model}] {key} {reason}.")


def named(model: str) -> Profile:
    """The profile of a model, whatever the case of its letters; ``RTX4090`` and ``RTX 4090`` are one.

    Raises:
        UsageError: there is none.
    """
    for name, profile in known().items():
        if _plain(name) == _plain(model):
            return profile
    raise UsageError("lab.no_such_gpu", f"the lab knows no GPU {model!r}.", hint=f"models: {', '.join(known())}")


def _plain(model: str) -> str:
    return re.sub(r"[^a-z0-9]", "", model.lower())


@dataclass(frozen=True)
class Gpus:
    """What one machine has: ``count`` GPUs of a model (its catalogue name)."""

    model: str
    count: int


def parse_gpus(text: str, hosts: typing.Sequence[str]) -> dict[str, Gpus]:
    """``8xH200`` for every host, or ``gpu-1=8xH200,gpu-2=4xL40S`` for those named (the others have none).

    Raises:
        UsageError: not that, an unknown model or host, or more GPUs than a host can have.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    named_hosts = [word for word in words if "=" in word]
    if not words or (named_hosts and len(named_hosts) != len(words)) or (not named_hosts and len(words) > 1):
        raise _unclear(text)
    found: dict[str, Gpus] = {}
    for word in words:
        host, _, what = word.rpartition("=")
        match = COUNT.fullmatch(what.strip())
        if not match:
            raise _unclear(text)
        count = int(match[1])
        if not 1 <= count <= GPUS_PER_HOST:
            raise UsageError("lab.gpu_count", f"{what.strip()}: a host of the lab has 1 to {GPUS_PER_HOST} GPUs.")
        for name in (host.strip(),) if host else hosts:
            if name not in hosts:
                raise UsageError("lab.no_such_machine", f"--gpus names {name}, which is no GPU host of the lab.",
                                 hint=f"GPU hosts: {', '.join(hosts)}")
            found[name] = Gpus(named(match[2]).model, count)
    return found


def _unclear(text: str) -> UsageError:
    return UsageError("lab.gpus", f"--gpus {text!r} says no number of GPUs.",
                      hint="8xH200 for every GPU host, or gpu-1=8xH200,gpu-2=4xL40S; "
                           f"models: {', '.join(known())}")
