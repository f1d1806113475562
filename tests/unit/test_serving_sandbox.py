"""The engine's unit is compared with the data file that says what a GPU engine must never have."""

from __future__ import annotations

import re
from typing import Any

import pytest

from opsctl.resources import resource
from opsctl.serving.sandbox import rules, violations

RULES = rules()
GOOD = "[Service]\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK\nLimitMEMLOCK=infinity\nKillMode=mixed\n"


def options_of(violated: list[dict[str, Any]]) -> set[str]:
    return {rule["option"] for rule in violated}


def test_every_rule_gives_reason_and_source() -> None:
    for rule in RULES:
        assert rule["reason"].endswith(".") and len(rule["source"]) > 10, rule["option"]
        assert ("unless" in rule) != ("unless_contains" in rule)


def test_a_good_unit_passes() -> None:
    assert violations(GOOD, RULES) == []


@pytest.mark.parametrize(("line", "option"), [
    ("PrivateDevices=yes", "PrivateDevices"),
    ("MemoryDenyWriteExecute = true", "MemoryDenyWriteExecute"),
    ("RestrictAddressFamilies=AF_INET AF_UNIX", "RestrictAddressFamilies"),
    ("KillMode=process", "KillMode"),
    ("KillMode=control-group", "KillMode"),
    ("LimitMEMLOCK=64M", "LimitMEMLOCK"),
    ("DevicePolicy=closed", "DevicePolicy"),
])
def test_what_would_take_the_gpu_away_is_found(line: str, option: str) -> None:
    assert options_of(violations(GOOD + line + "\n", RULES)) == {option}


def test_what_must_be_written_is_missed() -> None:
    assert options_of(violations("[Service]\n", RULES)) == {"LimitMEMLOCK", "KillMode"}


def test_an_explicit_no_is_fine() -> None:
    assert violations(GOOD + "PrivateDevices=no\n# PrivateUsers=yes\n", RULES) == []


def template() -> str:
    path = resource("templates") / "inference@.service.j2"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path.read_text()


def test_the_engines_unit_leaves_the_gpu_in_reach() -> None:
    assert violations(template(), RULES) == []


def test_the_engines_unit_waits_longer_than_any_release_may_drain() -> None:
    from opsctl.serving.adapter import MAXIMUM_DRAIN_S
    from opsctl.serving.front import STOP_S

    found = re.search(r"^TimeoutStopSec=(\d+)", template(), re.MULTILINE)
    assert found is not None and int(found.group(1)) > MAXIMUM_DRAIN_S + STOP_S
