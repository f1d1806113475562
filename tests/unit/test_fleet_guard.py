"""What hosts hear of the guard: its numbers from the inventory, and the pages of the load balancers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opsctl.fleet.guard import first_wrong, numbers
from opsctl.fleet.inventory import is_read
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.placements import statistics_pages

LB = Host("ops-1", "10.0.0.2", ("lb", "gateway"), service_address="10.0.0.2", management_address="10.9.0.2")
OTHER = replace(LB, name="ops-2", groups=("lb",), management_address="fd00::2")
GPU = Host("gpu-1", "10.0.0.11", ("gpu",), management_address="10.9.0.11")
FLEET = Fleet(Path("/fleet"), Path("/fleet/inventory.ini"), (LB, OTHER, GPU), ())


def test_every_load_balancer_of_ours_has_a_page_at_its_management_address() -> None:
    assert statistics_pages(FLEET) == ["http://10.9.0.2:8404/;csv", "http://[fd00::2]:8404/;csv"]


@pytest.mark.parametrize("kind", ["hook", "none"])
def test_a_load_balancer_that_is_not_ours_has_none(kind: Any) -> None:
    assert statistics_pages(replace(FLEET, load_balancer=kind)) == []


@pytest.mark.parametrize(("given", "written"), [
    (None, {}), ("", {}), ({}, {}),
    ({"slowed_margin_c": -1, "less_margin_c": 4.0}, {"less_margin_c": 4, "slowed_margin_c": -1}),
    ({"less_margin_c": 2.5, "observe_s": "60"}, {"less_margin_c": "2.5", "observe_s": 60}),
])
def test_numbers_are_whole_or_text_in_the_hosts_file(given: Any, written: dict[str, Any]) -> None:
    variables = {} if given is None else {"guard_policy": given}
    assert first_wrong(variables) is None
    assert numbers(variables) == written


@pytest.mark.parametrize(("given", "words"), [
    (4, "is no table of numbers"), ("less_margin_c=4", "is no table of numbers"), ([4], "is no table of numbers"),
    ({"margin": 4}, "cannot be: margin = 4 is unknown"), ({"less_weight": 2.5}, "is no whole number"),
    ({"less_margin_c": True}, "is no number"), ({"less_weight": 300}, "is not between 1 and 100"),
    ({"slowed_weight": 80}, "is not below"),
])
def test_what_cannot_be_is_said(given: Any, words: str) -> None:
    wrong = first_wrong({"guard_policy": given})
    assert wrong is not None
    assert wrong.key == "guard_policy"
    assert words in wrong.problem


def test_the_filter_hands_the_variable_on() -> None:
    assert is_read("guard_policy")
