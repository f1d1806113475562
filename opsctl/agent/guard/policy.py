"""``/etc/opsctl/guard.toml``: numbers of the guard that differ from its own, checked key by key."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsctl.agent import flat_toml
from opsctl.agent.guard.model import Policy
from opsctl.errors import ConfigurationError

CODE = "guard.policy"
# Each row must fall from left to right. Margins and times need not: a rung whose margin is above the one before it is
# come to at once, past that one, and a time of 0 is never.
FALLING = (
    ("less_weight", "slowed_weight", "least_weight"),
    ("slowed_clock_percent", "least_clock_percent"),
    ("least_age_s", "halve_age_s", "hold_age_s"),
)
MOST_MARGIN_C = 100
PERCENT = ("less_weight", "slowed_weight", "least_weight", "slowed_clock_percent", "least_clock_percent")
ABOVE_ZERO = ("climb_dwell_s", "flap_window_s", "hold_age_s")
FROM_ZERO = ("slowed_time_s", "least_time_s", "stop_after_s", "observe_s", "slowed_clock_step_percent")
LEAST_FLAPS = 2


def read_policy(path: Path) -> Policy:
    """The guard's own numbers, with those of the file in their place; no file: the guard's own.

    A fraction may stand in quotes too (``"2.5"``): hosts with Python 3.10 read whole numbers only.

    Raises:
        ConfigurationError: ``guard.policy``, naming file, key and value.
    """
    try:
        table = flat_toml.loads(path.read_text())
    except FileNotFoundError:
        return Policy()
    except (OSError, ValueError) as error:
        raise ConfigurationError(CODE, f"{path} cannot be read: {error}.", hint=_HINT) from None
    return policy_of(table, path)


def policy_of(table: Mapping[str, Any], path: Path) -> Policy:
    """The guard's own numbers with those of ``table`` in their place; ``path`` is for the errors. Raises as above."""
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Policy)}
    values = {key: _value(path, kinds, key, value) for key, value in table.items()}
    policy = dataclasses.replace(Policy(), **values)
    _check(path, policy)
    return policy


_HINT = "the keys and their meaning: docs/guard-numbers.md; opsctl provision writes this file"


def _value(path: Path, kinds: dict[str, type], key: str, value: Any) -> Any:
    if key not in kinds:
        raise _wrong(path, key, value, "is unknown")
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise _wrong(path, key, value, "is no number") from None
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 1e9:  # also NaN
        raise _wrong(path, key, value, "is no number")
    if kinds[key] is int and number != int(number):
        raise _wrong(path, key, value, "is no whole number")
    return kinds[key](number)


def _check(path: Path, policy: Policy) -> None:
    values = dataclasses.asdict(policy)
    for key in PERCENT:
        if not 1 <= values[key] <= 100:
            raise _wrong(path, key, values[key], "is not between 1 and 100")
    for key in ABOVE_ZERO:
        if values[key] <= 0:
            raise _wrong(path, key, values[key], "is not above 0")
    for key in FROM_ZERO:
        if values[key] < 0:
            raise _wrong(path, key, values[key], "is below 0")
    _check_margins(path, policy, values)
    if policy.flap_descents < LEAST_FLAPS:
        raise _wrong(path, "flap_descents", policy.flap_descents, f"is below {LEAST_FLAPS}")
    for row in FALLING:
        for higher, lower in itertools.pairwise(row):
            if values[lower] > values[higher] or (values[lower] == values[higher] and "weight" not in lower):
                raise _wrong(path, lower, values[lower], f"is not below {higher} = {values[higher]:g}")


def _check_margins(path: Path, policy: Policy, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key.endswith("_margin_c") and abs(value) > MOST_MARGIN_C:
            raise _wrong(path, key, value, f"is not between -{MOST_MARGIN_C} and {MOST_MARGIN_C}")
    if policy.stop_now_margin_c > policy.stop_margin_c and policy.stop_now_margin_c > policy.least_margin_c:
        raise _wrong(path, "stop_now_margin_c", policy.stop_now_margin_c, "is above stop_margin_c and least_margin_c")


def _wrong(path: Path, key: str, value: Any, why: str) -> ConfigurationError:
    return ConfigurationError(CODE, f"{path}: {key} = {value!r} {why}.", hint=_HINT)
