"""Host patterns, as Ansible reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from opsctl.errors import ExitCode, UsageError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.fleet.select import select_hosts, the_service

FLEET = Fleet(
    directory=Path("/fleet"), inventory=Path("/fleet/inventory.ini"), services=(),
    hosts=(
        Host("ops-1", "192.0.2.10", ("lb", "gateway")),
        Host("gpu-1", "192.0.2.11", ("gpu", "rack_a")),
        Host("gpu-2", "192.0.2.12", ("gpu", "rack_a")),
        Host("gpu-10", "192.0.2.20", ("gpu", "rack_b")),
    ),
)


@pytest.mark.parametrize(("limit", "expected"), [
    ("", "ops-1 gpu-1 gpu-2 gpu-10"),
    ("all", "ops-1 gpu-1 gpu-2 gpu-10"),
    ("*", "ops-1 gpu-1 gpu-2 gpu-10"),
    ("gpu-1", "gpu-1"),
    ("gpu", "gpu-1 gpu-2 gpu-10"),
    ("gpu-10,ops-1", "ops-1 gpu-10"),
    ("gpu-10:ops-1", "ops-1 gpu-10"),
    ("gpu-?", "gpu-1 gpu-2"),
    ("rack_*", "gpu-1 gpu-2 gpu-10"),
    ("gpu:!gpu-2", "gpu-1 gpu-10"),
    ("!gpu-2", "ops-1 gpu-1 gpu-10"),
    ("gpu:&rack_a", "gpu-1 gpu-2"),
    ("gpu,&rack_a,!gpu-1", "gpu-2"),
    ("!gpu-1,gpu,&rack_a", "gpu-2"),
    ("~gpu-[12]$", "gpu-1 gpu-2"),
    ("gpu[0]", "gpu-1"),
    ("gpu[-1]", "gpu-10"),
    ("gpu[0:1]", "gpu-1 gpu-2"),
    ("gpu[1:]", "gpu-2 gpu-10"),
    ("gpu[1:],ops-1", "ops-1 gpu-2 gpu-10"),
])
def test_pattern_selects(limit: str, expected: str) -> None:
    assert " ".join(host.name for host in select_hosts(FLEET, limit)) == expected


@pytest.mark.parametrize(("limit", "hint"), [
    ("gpu-l", "did you mean gpu-"),
    ("database", "hosts:"),
    ("gpu:!gpu", "hosts:"),
    ("gpu,datbase", "hosts:"),
    ("~gpu-[", "glob"),
])
def test_pattern_that_selects_nothing_is_an_error_with_a_hint(limit: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        select_hosts(FLEET, limit)
    assert caught.value.exit_code is ExitCode.USAGE
    assert hint in caught.value.hint


def test_a_service_is_named_or_the_only_one() -> None:
    chat, embed = (Service(name, "gpu", port, listen) for name, port, listen in (("chat", 8100, 8000),
                                                                                  ("embed", 8200, 8001)))
    assert the_service(replace(FLEET, services=(chat,)), "") == chat
    two = replace(FLEET, services=(chat, embed))
    assert the_service(two, "embed") == embed
    for name, code in (("", "fleet.which_service"), ("talk", "fleet.no_such_service")):
        with pytest.raises(UsageError) as caught:
            the_service(two, name)
        assert caught.value.code == code
        assert "chat, embed" in caught.value.hint
