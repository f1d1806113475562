"""Where each GPU's margin and limits come from, and the file of the guard's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opsctl.agent.guard.model import Policy
from opsctl.agent.guard.policy import read_policy
from opsctl.agent.guard.readings import readings
from opsctl.errors import ConfigurationError, ExitCode

POLICY = Policy()


def reading(**told: Any) -> Any:
    found = readings([{"uuid": "GPU-a", "index": 3, "state": "ok", **told}], 7.5, POLICY)
    return found["GPU-a"]


@pytest.mark.parametrize(("told", "margin", "source", "limits"), [
    # H200: the API's margin, limits from the fields
    ({"temperature_c": 59, "margin_c": 26, "margin_source": "margin_api",
      "offsets_c": {"slowdown": -2, "shutdown": -8}}, 26, "margin_api", (-2, -8)),
    # a margin of 0 or less is a value like any other
    ({"temperature_c": 90, "margin_c": -3, "margin_source": "margin_api",
      "offsets_c": {"slowdown": -2, "shutdown": -5}}, -3, "margin_api", (-2, -5)),
    # no fields: the limits from thresholds
    ({"temperature_c": 80, "margin_c": 8, "margin_source": "margin_api",
      "thresholds_c": {"max_operating": 88, "slowdown": 91, "shutdown": 93}}, 8, "margin_api", (-3, -5)),
    # A100: thresholds alone
    ({"temperature_c": 80, "margin_c": 5, "margin_source": "thresholds",
      "thresholds_c": {"max_operating": 85, "slowdown": 89, "shutdown": 92}}, 5, "thresholds", (-4, -7)),
    # a margin that counts from the slowdown, because nothing else is known
    ({"temperature_c": 80, "margin_c": 9, "margin_source": "thresholds",
      "thresholds_c": {"slowdown": 89, "shutdown": 92}}, 9, "thresholds", (0, -3)),
    # nothing is known: measured against the configured maximum
    ({"temperature_c": 80}, 3, "configured", (-2, -8)),
    ({"temperature_c": 80, "margin_c": 7, "margin_source": "margin_api"}, 7, "margin_api", (-2, -8)),
    # fields of the wrong sign are no limits
    ({"temperature_c": 80, "margin_c": 7, "margin_source": "margin_api",
      "offsets_c": {"slowdown": 2, "shutdown": 8}}, 7, "margin_api", (-2, -3)),
    ({"temperature_c": 80, "margin_c": float("nan")}, 3, "configured", (-2, -8)),
])
def test_margin_and_limits(told: dict[str, Any], margin: float, source: str, limits: tuple[float, float]) -> None:
    one = reading(**told)
    assert (one.state, one.index, one.at_s) == ("ok", 3, 7.5)
    assert (one.margin_c, one.margin_source) == (margin, source)
    assert (one.slowdown_margin_c, one.shutdown_margin_c) == limits


def test_memory_has_a_margin_of_its_own_where_its_maximum_is_known() -> None:
    assert reading(temperature_c=60, memory_temperature_c=92, thresholds_c={"memory_max": 95}).memory_margin_c == 3
    assert reading(temperature_c=60, memory_temperature_c=92).memory_margin_c is None
    assert reading(temperature_c=60, thresholds_c={"memory_max": 95}).memory_margin_c is None


@pytest.mark.parametrize(("told", "state"), [
    ({"state": "lost"}, "lost"),
    ({"state": "unreadable"}, "unreadable"),
    ({"power_w": 300.0}, "unreadable"),  # the reader calls it ok, but nobody knows how hot it is
])
def test_a_gpu_without_temperature_is_not_taken_for_a_cool_one(told: dict[str, Any], state: str) -> None:
    assert (reading(**told).state, reading(**told).margin_c) == (state, None)


def test_a_gpu_that_never_told_its_uuid_is_left_to_those_who_know_what_is_missing() -> None:
    assert readings([{"index": 0, "state": "lost"}], 0.0, POLICY) == {}


@pytest.mark.parametrize(("text", "key", "value"), [
    ("less_margin_c = 4", "less_margin_c", 4.0),
    ('slowed_time_s = "2.5"', "slowed_time_s", 2.5),
    ("less_weight = 80", "less_weight", 80),
    ("slowed_margin_c = 90", "slowed_margin_c", 90.0),  # past LESS, at once
    ("slowed_time_s = 0\nleast_time_s = 0", "least_time_s", 0.0),  # never by time
    ("slowed_weight = 70", "slowed_weight", 70),  # as much as LESS
    ("# nothing\n", "less_margin_c", Policy().less_margin_c),
])
def test_a_file_says_other_numbers_key_by_key(tmp_path: Path, text: str, key: str, value: float) -> None:
    file = tmp_path / "guard.toml"
    file.write_text(text)
    found = getattr(read_policy(file), key)
    assert (found, type(found)) == (value, type(value))


def test_no_file_means_the_guards_own_numbers(tmp_path: Path) -> None:
    assert read_policy(tmp_path / "guard.toml") == Policy()


@pytest.mark.parametrize(("text", "names"), [
    ("les_margin_c = 4", ("les_margin_c", "4", "unknown")),
    ("less_margin_c = true", ("less_margin_c", "True", "no number")),
    ('less_margin_c = "warm"', ("less_margin_c", "warm", "no number")),
    ("less_margin_c = nan", ("less_margin_c", "nan", "no number")),
    ('less_margin_c = "inf"', ("less_margin_c", "inf", "no number")),
    ('less_weight = "2.5"', ("less_weight", "2.5", "no whole number")),
    ("less_weight = 0", ("less_weight", "0", "between 1 and 100")),
    ("less_weight = 20", ("slowed_weight", "30", "below less_weight = 20")),
    ("less_margin_c = 300", ("less_margin_c", "300", "between -100 and 100")),
    ("stop_now_margin_c = 5", ("stop_now_margin_c", "5", "above stop_margin_c")),
    ("least_time_s = -1", ("least_time_s", "-1", "below 0")),
    ("least_clock_percent = 80", ("least_clock_percent", "80", "below slowed_clock_percent = 80")),
    ("halve_age_s = 3", ("hold_age_s", "5", "below halve_age_s = 3")),
    ("flap_descents = 1", ("flap_descents", "1", "below 2")),
    ("stop_after_s = -1", ("stop_after_s", "-1", "below 0")),
    ("climb_dwell_s = 0", ("climb_dwell_s", "0", "above 0")),
    ("less_margin_c = [1]", ("less_margin_c", "[1]", "no number")),
    ("what is this", ("cannot be read",)),
])
def test_a_wrong_number_names_file_key_and_value(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    file = tmp_path / "guard.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_policy(file)
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    assert all(name in caught.value.message for name in (str(file), *names)), caught.value.message
