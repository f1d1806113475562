"""What status says of hosts that serve, are silent, are bare."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import guard_kit
import pytest

from opsctl.agent.ledger import Line
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.status import Beside, Row, endpoints, instance_state, rows

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


DIGESTS = {f"v{number}": f"{number}" * 64 for number in range(4)}


def ledger(*versions: str) -> list[Line]:
    return [Line(number, version, DIGESTS[version], "2026", "ann") for number, version in enumerate(versions, 1)]


def drain(weight: int, owner: str, **more: Any) -> dict[str, Any]:
    return {"instance": "chat.0", "owner": owner, "weight": weight, "reason": "", **more}


ANN = drain(0, "operator:ann", reason="new kernel")
GUARD = drain(30, "guard")
RUN = drain(0, "run:17", lease_s=88.2)


@pytest.mark.parametrize(("version", "unit", "drains", "lines", "expected"), [
    ("v2", "active", [], ["v1", "v2"], ("serving", "")),
    ("v2", "active", [], [], ("serving", "")),
    ("v1", "active", [], ["v1", "v2"], ("behind", "gpu-1 chat.0: the ledger says v2")),
    ("v3", "active", [], ["v1", "v2"], ("ahead", "gpu-1 chat.0: the ledger says v2")),
    ("v1", "failed", [], ["v1", "v2"], ("failed", "gpu-1 chat.0: the ledger says v2")),
    ("v2", "active", [ANN], ["v2"], ("drained", "gpu-1 chat.0: 0 % by operator:ann (new kernel)")),
    ("v2", "active", [GUARD], ["v2"], ("serving", "gpu-1 chat.0: 30 % by guard")),
    ("v2", "active", [GUARD, RUN], ["v2"], ("drained", "gpu-1 chat.0: 30 % by guard, 0 % by run:17, ends in 88 s "
                                                       "unless renewed")),
    ("v2", "inactive", [ANN], ["v2"], ("stopped", "gpu-1 chat.0: 0 % by operator:ann (new kernel)")),
    ("v1", "active", [ANN], ["v1", "v2"], ("drained", "gpu-1 chat.0: 0 % by operator:ann (new kernel); the ledger says "
                                                      "v2")),
    ("v2", "active", [{**ANN, "instance": "chat.1"}], ["v2"], ("serving", "")),
])
def test_drains_and_the_ledger_show(version: str, unit: str, drains: list[dict[str, Any]], lines: list[str],
                                    expected: tuple[str, str]) -> None:
    answers = {"gpu-1": {**state(instance(release=version, digest=DIGESTS[version], unit=unit)), "drains": drains}}
    (row,) = rows(FLEET, FLEET.group("gpu"), answers, {"chat": ledger(*lines)})
    assert (row.state, row.note) == expected
    assert row.weight == (min(drain["weight"] for drain in drains) if drains and expected[1] else None)


@pytest.mark.parametrize(("guard", "drains", "note"), [
    (None, [], ""),
    (guard_kit.seen(), [], ""),
    (guard_kit.seen(instances=[guard_kit.slowed()]), [],
     "gpu-1 chat.0: guard: slowed, weight 30 %, clocks 80 % not in force; GPU 0: margin -1 °C, at most -1 °C: slowed"),
    (guard_kit.seen(instances=[guard_kit.instance(weight=50)]), [ANN],
     "gpu-1 chat.0: 0 % by operator:ann (new kernel); guard: normal, weight 50 %"),
    (guard_kit.seen(words="the guard said nothing for 9 s"), [], "gpu-1 chat.0: the guard said nothing for 9 s"),
])
def test_what_the_guard_does_stands_in_the_note(guard: dict[str, Any] | None, drains: list[dict[str, Any]], note: str
                                                ) -> None:
    answers = {"gpu-1": {**state(instance()), "drains": drains, **({"guard": guard} if guard else {})}}
    (row,) = rows(FLEET, FLEET.group("gpu"), answers)
    assert row.note == note


@pytest.mark.parametrize(("voice", "drains", "note"), [
    ("up 0%", [], "its release is being changed (opsctl-host cutover-status chat.0)"),
    ("", [], "when nobody works on it, opsctl-host work-undo chat.0 undoes it"),
    ("down #unfinished start", [], "a change of its release was cut off: opsctl-host work-undo chat.0 undoes it"),
    ("up 0%", [ANN], "undoes it; 0 % by operator:ann (new kernel)"),
])
def test_an_instance_that_is_being_changed_does_not_serve(voice: str, drains: list[dict[str, Any]], note: str) -> None:
    answers = {"gpu-1": {**state(instance(unfinished=True, voice=voice)), "drains": drains}}
    (row,) = rows(FLEET, FLEET.group("gpu"), answers)
    assert row.state == "changing"
    assert row.note.startswith("gpu-1 chat.0: ")
    assert row.note.endswith(note) or note in row.note


def test_a_gateway_that_does_not_answer_keeps_nobody_waiting() -> None:
    late = threading.Event()

    def slow() -> dict[str, list[Line]]:
        late.wait()
        return {"chat": ledger("v1")}
    began = time.monotonic()
    assert Beside(slow).answer(0.05) is None
    assert time.monotonic() - began < 5
    late.set()


def test_a_gateway_that_fails_is_left_out() -> None:
    def broken() -> dict[str, list[Line]]:
        raise OpsctlError("host.connection_lost", "x")
    assert Beside(broken).answer(5) is None
    assert Beside(lambda: {"chat": ledger("v1")}).answer(5) == {"chat": ledger("v1")}


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, "serving"),
    ({"health": "unhealthy"}, "starting"),
    ({"unit": "inactive"}, "stopped"),
    ({"unit": "failed"}, "failed"),
    ({"unit": "activating"}, "starting"),
    ({"unit": "deactivating"}, "draining"),
    ({"unit": "inactive", "release": None}, "no release"),
    ({"unfinished": False}, "serving"),
    ({"unfinished": True}, "changing"),
    ({"unfinished": True, "unit": "inactive"}, "changing"),
])
def test_the_state_of_an_instance_in_one_word(changes: dict[str, Any], expected: str) -> None:
    assert instance_state(instance(**changes)) == expected


def test_clients_are_told_the_load_balancer() -> None:
    assert endpoints(FLEET) == {"chat": ["http://10.0.0.2:8000/v1"]}
