"""What status says of hosts that serve, are silent, are bare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.status import Row, endpoints, instance_state, rows

FLEET = Fleet(
    Path("/fleet"), Path("/fleet/inventory.ini"),
    (Host("ops-1", "10.0.0.2", ("gateway", "lb", "monitor"), service_address="10.0.0.2", management_address="10.0.0.2"),
     Host("gpu-1", "10.0.0.11", ("gpu",), service_address="10.0.0.11", management_address="10.0.0.11")),
    (Service("chat", "gpu", port=8100, listen=8000),),
)


def instance(**changes: Any) -> dict[str, Any]:
    return {"instance": "chat.0", "service": "chat", "index": 0, "port": 8100, "unit": "active", "sub": "running",
            "release": "v1", "digest": "0" * 64, "health": "healthy", "running": 2, "waiting": 1, "since": 0} | changes


def state(*instances: dict[str, Any]) -> dict[str, Any]:
    return {"schema": "opsctl.host-state/v1", "instances": list(instances), "releases": [], "holds": [], "drains": []}


@pytest.mark.parametrize(("answers", "expected"), [
    ({"ops-1": state(), "gpu-1": state(instance())},
     [Row("ops-1", ("gateway", "lb", "monitor"), state="up"),
      Row("gpu-1", ("gpu",), "chat.0", "v1", "serving", 2, 1)]),
    ({"ops-1": {}, "gpu-1": {}},
     [Row("ops-1", ("gateway", "lb", "monitor"), state="not provisioned"),
      Row("gpu-1", ("gpu",), "chat.0", state="not provisioned")]),
    ({"ops-1": OpsctlError("status.agent", "it broke"),
      "gpu-1": RefusedError("host.unreachable", "gpu-1 does not answer")},
     [Row("ops-1", ("gateway", "lb", "monitor"), state="error", note="it broke"),
      Row("gpu-1", ("gpu",), "chat.0", state="unreachable", note="gpu-1 does not answer")]),
    ({"ops-1": state(), "gpu-1": state()},
     [Row("ops-1", ("gateway", "lb", "monitor"), state="up"),
      Row("gpu-1", ("gpu",), "chat.0", state="not provisioned",
          note="the host does not know this instance yet: opsctl provision")]),
])
def test_a_row_for_every_instance_and_every_idle_host(answers: dict[str, Any], expected: list[Row]) -> None:
    assert rows(FLEET, FLEET.hosts, answers) == expected


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, "serving"),
    ({"health": "unhealthy"}, "starting"),
    ({"unit": "inactive"}, "stopped"),
    ({"unit": "failed"}, "failed"),
    ({"unit": "activating"}, "starting"),
    ({"unit": "deactivating"}, "draining"),
    ({"unit": "inactive", "release": None}, "no release"),
])
def test_the_state_of_an_instance_in_one_word(changes: dict[str, Any], expected: str) -> None:
    assert instance_state(instance(**changes)) == expected


def test_clients_are_told_the_load_balancer() -> None:
    assert endpoints(FLEET) == {"chat": ["http://10.0.0.2:8000/v1"]}
