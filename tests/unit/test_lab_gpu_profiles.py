"""GPU models are data, and whoever writes them wrong is told where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opsctl.errors import ConfigurationError, UsageError
from opsctl.lab.gpu.profiles import Gpus, known, named, parse, parse_gpus

FILE = Path("profiles.toml")


def a_table() -> dict[str, Any]:
    profile = named("H200")
    return {key: getattr(profile, key) for key in type(profile).__dataclass_fields__ if key != "model"}


def test_every_model_of_the_issue_is_there() -> None:
    assert set(known()) >= {"H100", "H200", "B200", "A100", "L40S", "T4", "RTX 4090", "V100"}
    assert all(profile.source for profile in known().values())
    with_sensor = {model for model, profile in known().items() if profile.memory_max_c is not None}
    assert with_sensor == {"H100", "H200", "B200", "A100", "V100"}
    assert {model for model, profile in known().items() if profile.gpm} == {"H100", "H200", "B200"}
    assert {model for model, profile in known().items() if profile.t_limit} == {"H100", "H200", "B200", "L40S"}


def test_cooling_as_built_is_enough() -> None:
    for profile in known().values():
        at_full_power = 25 + profile.thermal_resistance_c_per_w * profile.power_default_w
        assert 8 < profile.max_operating_c - at_full_power < 12, profile.model


@pytest.mark.parametrize(("change", "said"), [
    ({"power_min_w": None}, "[H200] power_min_w is missing."),
    ({"colour": "green"}, "[H200] colour is unknown."),
    ({"t_limit": 1}, "[H200] t_limit is 1, which is no bool."),
    ({"memory_mib": "143771"}, "[H200] memory_mib is '143771', which is no int."),
    ({"slowdown_c": 87}, "[H200] slowdown_c does not lie between max_operating_c and shutdown_c."),
    ({"power_default_w": 900}, "[H200] power_min_w does not lie above power_idle_w and below the default and the "
                               "maximum."),
    ({"architecture": "rubin"}, "[H200] architecture is 'rubin'"),
    ({"tau_s": 0}, "[H200] tau_s is not above 0."),
    ({"fabric": False}, "[H200] nvswitches is not 0: that wants a nvswitch_device_id, and fabric = true."),
    ({"source": ""}, "[H200] source is empty: where are the numbers from?"),
])
def test_what_is_wrong_is_named_with_file_table_and_key(change: dict[str, Any], said: str) -> None:
    table = {key: value for key, value in (a_table() | change).items() if value is not None}
    with pytest.raises(ConfigurationError) as caught:
        parse("H200", table, FILE)
    assert f"profiles.toml: {said}" in caught.value.message


HOSTS = ("gpu-1", "gpu-2")


@pytest.mark.parametrize(("text", "wanted"), [
    ("8xH200", {"gpu-1": Gpus("H200", 8), "gpu-2": Gpus("H200", 8)}),
    ("gpu-1=8xh200,gpu-2=4xL40S", {"gpu-1": Gpus("H200", 8), "gpu-2": Gpus("L40S", 4)}),
    ("gpu-2=1xRTX4090", {"gpu-2": Gpus("RTX 4090", 1)}),
])
def test_gpus_of_hosts(text: str, wanted: dict[str, Gpus]) -> None:
    assert parse_gpus(text, HOSTS) == wanted


@pytest.mark.parametrize(("text", "code"), [
    ("H200", "lab.gpus"), ("", "lab.gpus"), ("8xH200,4xL40S", "lab.gpus"), ("gpu-1=8xH200,4xL40S", "lab.gpus"),
    ("8xH300", "lab.no_such_gpu"), ("0xH200", "lab.gpu_count"), ("17xH200", "lab.gpu_count"),
    ("gpu-7=1xT4", "lab.no_such_machine"), ("ops-1=1xT4", "lab.no_such_machine"),
])
def test_gpus_that_are_none(text: str, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gpus(text, HOSTS)
    assert caught.value.code == code
