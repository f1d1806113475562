"""What is read from a GPU: new names before old ones, absent and not zero, and margins to the bitter end."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
from played_nvml import H200, Played

from opsctl.agent.gpu import reasons, sample
from opsctl.agent.gpu.nvml import GoneError, LostError, Nvml

FIXTURES = Path(__file__).parent / "fixtures" / "gpu"


def read(**orders: Any) -> dict[str, Any]:
    nvml = Nvml(Played(orders))
    return sample.sample(nvml, sample.open_gpus(nvml)[0])


def answers(**changes: Any) -> dict[str, Any]:
    return read(answers={f"nvmlDeviceGet{name}": value for name, value in changes.items()})


def test_an_h200_as_it_is() -> None:
    nvml = Nvml(Played())
    gpu = sample.open_gpus(nvml)[1]
    sample.sample(nvml, gpu)
    assert sample.sample(nvml, gpu) == json.loads((FIXTURES / "h200.json").read_text())


@pytest.mark.parametrize(("absent", "key"), [
    ("PowerUsage", "power_w"), ("TotalEnergyConsumption", "energy_mj"), ("RemappedRows", "remapped"),
    ("UtilizationRates", "utilisation_percent"), ("MemoryInfo", "memory_used_mib"),
    ("PcieReplayCounter", "pcie_replays"),
    ("EncoderUtilization", "encoder_percent"), ("CurrentClocksEventReasons", "reasons"), ("Serial", "serial"),
    ("EnforcedPowerLimit", "power_limits_w.enforced")])
def test_what_a_gpu_does_not_have_is_absent_and_not_zero(absent: str, key: str) -> None:
    def there(found: Any) -> bool:
        for part in key.split("."):
            if part not in found:
                return False
            found = found[part]
        return True

    assert there(answers())
    assert not there(answers(**{absent: None}))


def test_a_memory_sensor_that_is_not_there() -> None:
    fields = {number: value for number, value in H200["fields"].items() if number != 82}
    assert read(answers={"fields": fields}).get("memory_temperature_c") is None
    assert read()["memory_temperature_c"] == 76  # though the driver calls it another type


@pytest.mark.parametrize(("new", "old", "key", "value"), [
    ("TemperatureV", "Temperature", "temperature_c", 66),
    ("CurrentClocksEventReasons", "CurrentClocksThrottleReasons", "reasons", 0x20)])
def test_an_older_library_is_asked_by_the_older_name(new: str, old: str, key: str, value: int) -> None:
    assert answers(**{new: "missing", old: value})[key] == value
    assert key not in answers(**{new: None, old: value})  # not supported is an answer


@pytest.mark.parametrize("margin", [16, 0, -1, -8])
def test_a_margin_is_a_value_however_little_is_left(margin: int) -> None:
    found = answers(MarginTemperature=margin)
    assert (found["margin_c"], found["margin_source"]) == (margin, "margin_api")


@pytest.mark.parametrize(("api", "values", "offsets", "thresholds", "expected"), [
    (5, {"temperature_c": 40}, {}, {"max_operating": 87}, (5, "margin_api")),
    (None, {"temperature_c": 88}, {"slowdown": -2}, {"slowdown": 89}, (-1, "fields")),
    (None, {"temperature_c": 80}, {"shutdown": -8}, {"shutdown": 95}, (7, "fields")),
    (None, {"temperature_c": 80}, {"slowdown": -2}, {"max_operating": 85}, (5, "thresholds")),
    (None, {"temperature_c": 91}, {}, {"slowdown": 90}, (-1, "thresholds")),
    (None, {"temperature_c": 60, "memory_temperature_c": 94}, {}, {"max_operating": 87, "memory_max": 95},
     (1, "thresholds")),
    (None, {"temperature_c": 60}, {}, {}, (None, None)),
    (None, {}, {"slowdown": -2}, {"slowdown": 89}, (None, None)),
])
def test_where_a_margin_comes_from(api: int | None, values: dict[str, Any], offsets: dict[str, Any],
                                   thresholds: dict[str, Any], expected: tuple[Any, Any]) -> None:
    found = sample.margin(api, values, offsets, thresholds)
    assert (found.get("margin_c"), found.get("margin_source")) == expected


def test_a_gpu_that_is_lost_is_said_with_who_it_is() -> None:
    orders: dict[str, Any] = {}
    nvml = Nvml(Played(orders))
    nvml.library._orders = orders
    gpus = sample.open_gpus(nvml)
    orders["lost"] = [1]
    lost = sample.sample(nvml, gpus[1])
    assert (lost["state"], lost["uuid"], "temperature_c" in lost) == ("lost", "GPU-1", False)
    assert "fell off the bus" in lost["words"]
    assert sample.sample(nvml, gpus[0])["state"] == "ok"
    assert sample.sample(nvml, sample.open_gpus(nvml)[1])["state"] == "lost"  # when it was lost before


@pytest.mark.parametrize(("code", "state"), [(9, "no_driver"), (18, "mismatch"), (12, "no_library"), (999, "failed")])
def test_an_nvml_that_cannot_be_asked(code: int, state: str) -> None:
    with pytest.raises(GoneError) as error:
        Nvml(Played({"init": code})).start()
    assert error.value.state == state


PART = {"id": 0, "profile": "NVIDIA H200", "uuid": "GPU-0"}  # this NVML names a part as it names a GPU


def cut_gpu() -> tuple[Nvml, sample.Gpu]:
    """A GPU with one part, which was seen a sample ago."""
    nvml = Nvml(Played({"answers": {"nvmlDeviceGetMigMode": (1, 1), "nvmlDeviceGetMaxMigDeviceCount": 1,
                                    "nvmlDeviceGetMigDeviceHandleByIndex": ctypes.c_void_p(1),
                                    "nvmlDeviceGetGpuInstanceId": 0}}))
    gpu = sample.open_gpus(nvml)[0]
    (part,) = sample.sample(nvml, gpu)["mig"]
    assert PART.items() < part.items()
    gpu.turn = 0
    return nvml, gpu


@pytest.mark.parametrize("name", ["MigMode", "MaxMigDeviceCount", "MigDeviceHandleByIndex", "GpuInstanceId", "UUID"])
def test_parts_that_cannot_be_read_once_are_the_last_known_ones(name: str) -> None:
    nvml, gpu = cut_gpu()

    def broken(*_: Any) -> None:
        raise Played.NVMLError(999)
    setattr(nvml.library, f"nvmlDeviceGet{name}", broken)
    found = sample.sample(nvml, gpu)
    assert (found["mig"], found["state"]) == ([PART], "ok")
    assert "Unknown Error" in found["words"]


def test_parts_that_are_gone_are_gone() -> None:
    nvml, gpu = cut_gpu()
    nvml.library._orders = {}
    assert "mig" not in sample.sample(nvml, gpu)


def test_a_lost_gpu_is_said_with_its_parts() -> None:
    nvml, gpu = cut_gpu()
    nvml.library._orders = {"lost": [0]}
    lost = sample.sample(nvml, gpu)
    assert (lost["state"], lost["mig"]) == ("lost", [PART])


def test_an_answer_that_is_neither_is_said() -> None:
    nvml = Nvml(Played())

    def broken(*_: Any) -> None:
        raise Played.NVMLError(999)
    nvml.library.nvmlDeviceGetPowerUsage = broken
    found = sample.sample(nvml, sample.open_gpus(nvml)[0])
    assert found["words"] == "nvmlDeviceGetPowerUsage: Unknown Error"
    assert "power_w" not in found
    assert found["temperature_c"] == 71


def unknown(*names: str) -> Nvml:
    """An NVML that answers these questions of GPU 1, or all, with NVML_ERROR_UNKNOWN."""
    return Nvml(Played({"unknown": [1], "unknown_names": list(names)}))


def test_a_gpu_that_answers_with_errors_alone_is_not_well() -> None:
    nvml = Nvml(Played())
    gpus = sample.open_gpus(nvml)
    nvml.library._orders = {"unknown": [1]}
    first, second = (sample.sample(nvml, gpu) for gpu in gpus)
    assert (first["state"], first["words"]) == ("ok", "")
    assert (second["state"], second["uuid"]) == ("unreadable", "GPU-1")
    assert "Unknown Error" in second["words"]
    late = unknown()
    assert sample.sample(late, sample.open_gpus(late)[1])["state"] == "unreadable"  # when it did so before


def test_a_gpu_without_a_sensor_is_well() -> None:
    """As a virtual one: "not supported" is an answer."""
    found = answers(TemperatureV=None, Temperature=None)
    assert (found["state"], found["words"]) == ("ok", "")


def test_a_gpu_that_gives_no_handle_says_it_in_nvmls_words() -> None:
    nvml = unknown("nvmlDeviceGetHandleByIndex")
    found = sample.sample(nvml, sample.open_gpus(nvml)[1])
    assert (found["state"], found["words"]) == ("lost", "nvmlDeviceGetHandleByIndex: Unknown Error")
    nvml = Nvml(Played({"lost": [1]}))
    assert "fell off the bus" in sample.sample(nvml, sample.open_gpus(nvml)[1])["words"]


def test_a_count_that_nvml_does_not_give_is_not_zero() -> None:
    nvml = unknown("nvmlDeviceGetCount")
    with pytest.raises(GoneError, match="nvmlDeviceGetCount: Unknown Error") as error:
        sample.open_gpus(nvml)
    assert error.value.state == "failed"
    assert sample.open_gpus(Nvml(Played({"gpus": 0}))) == []


def test_nothing_is_ever_set() -> None:
    played = Played()
    nvml = Nvml(played)
    nvml.start()
    for gpu in sample.open_gpus(nvml):
        sample.sample(nvml, gpu)
    assert all(name.startswith(("nvmlDeviceGet", "nvmlSystemGet", "nvmlInit", "nvmlGpm")) for name in played.asked)


def test_a_lost_gpu_ends_no_other_question() -> None:
    with pytest.raises(LostError):
        Nvml(Played({"lost": [0]})).ask(0, ("nvmlDeviceGetName", sample.open_gpus(Nvml(Played()))[0].handle))


@pytest.mark.parametrize(("mask", "words"), [
    (0x1, []), (0x4, ["power cap"]), (0x20, ["thermal slowdown"]), (0x48, ["hardware thermal slowdown"]),
    (0x8, ["hardware slowdown"]), (0x88, ["power brake"]), (0x102, [])])
def test_reasons_in_words(mask: int, words: list[str]) -> None:
    assert reasons.words(mask) == words
    assert sum(reasons.bits(mask).values()) == mask.bit_count()
