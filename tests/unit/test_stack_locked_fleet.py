"""stack.lock in a fleet: it stands where the inventory is silent, and a provision refuses when it no longer holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from opsctl import resolving
from opsctl.engines.events import Event, Note, discard
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.inventory import fleet_from_ansible
from opsctl.fleet.model import Fleet, Host
from opsctl.resolving import check_lock
from opsctl.stack.lock import Entry, HostFacts, Lock, render

TODAY = date(2026, 11, 22)
H200S = ("2335",) * 8
ENTRY = Entry({"2335": 8}, "debian12", 580, "580.126.09", "open", True, "13.0", ("vllm==0.33.0",),
              ("linux-headers-amd64",))
SERVICES = "chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n  gpus_per_instance: 8\n  tensor_parallel: 8\n"


def a_fleet(directory: Path, **variables: object) -> Fleet:
    hosts = {"gpu-1": {"ansible_host": "192.0.2.1", **variables}, "ops": {"ansible_host": "192.0.2.2"}}
    groups = {"all": ["gpu-1", "ops"], "gpu": ["gpu-1"], "lb": ["ops"], "gateway": ["ops"]}
    text = render(Lock({"gpu-1": ENTRY}))
    (directory / "stack.lock").write_text(text)
    return fleet_from_ansible(hosts, groups, SERVICES, directory, directory / "inventory.ini", lock_text=text)


def play(monkeypatch: pytest.MonkeyPatch, facts: HostFacts | OpsctlError, engine: str = "vllm==0.33.0") -> list[str]:
    """A host that has this; gives the names of those who were asked."""
    asked: list[str] = []

    def ask_hosts(_: Fleet, hosts: Sequence[Host]) -> dict[str, HostFacts | OpsctlError]:
        asked.extend(host.name for host in hosts)
        return {host.name: facts for host in hosts}

    monkeypatch.setattr(resolving, "ask_hosts", ask_hosts)
    monkeypatch.setattr(resolving, "engines_of", lambda fleet, hosts: ({host.name: (engine,) for host in hosts}, ""))
    return asked


def test_the_lock_stands_where_the_inventory_is_silent(tmp_path: Path) -> None:
    host = a_fleet(tmp_path, gpu_model="H200").host("gpu-1")
    assert host.variables["nvidia_driver_version"] == "580.126.09"
    assert host.variables["nvidia_driver_fabric_manager"] == "present"
    assert set(host.locked) == {"nvidia_driver_version", "nvidia_driver_flavour", "nvidia_driver_fabric_manager",
                                "nvidia_driver_own"}
    written = a_fleet(tmp_path, nvidia_driver_version="595.71.05").host("gpu-1")
    assert written.variables["nvidia_driver_version"] == "595.71.05"
    assert "nvidia_driver_version" not in written.locked


def test_a_lock_that_holds_stands_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = play(monkeypatch, HostFacts(H200S, "debian12", (), 4))
    fleet = a_fleet(tmp_path)
    check_lock(fleet, fleet.hosts, discard, TODAY)
    assert asked == ["gpu-1"]


@pytest.mark.parametrize(("facts", "engine", "written", "words"), [
    (HostFacts(("26b9",) * 2, "debian12", ()), "vllm==0.33.0", "", "8 x H200 SXM 141GB, and it has 2 x L40S"),
    (HostFacts(H200S, "debian13", ()), "vllm==0.33.0", "", "locked with debian12, and it runs debian13"),
    (HostFacts(H200S, "debian12", ()), "vllm==0.33.0", "595.71.05", "driver 580.126.09, and the inventory wishes 595"),
    (HostFacts(H200S, "debian12", ()), "vllm==0.99.0", "", "vllm 0.99.0 is not known"),
])
def test_a_lock_that_does_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: HostFacts,
                                              engine: str, written: str, words: str) -> None:
    play(monkeypatch, facts, engine)
    fleet = a_fleet(tmp_path, **({"nvidia_driver_version": written} if written else {}))
    with pytest.raises(RefusedError) as caught:
        check_lock(fleet, fleet.hosts, discard, TODAY)
    assert caught.value.code == "stack_lock.does_not_hold"
    assert words in caught.value.message
    assert "opsctl stack resolve --write" in caught.value.hint


def test_a_branch_that_has_ended_is_said_and_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, HostFacts(H200S, "debian12", (), 4))
    fleet = a_fleet(tmp_path)
    events: list[Event] = []
    check_lock(fleet, fleet.hosts, events.append, date(2029, 1, 1))
    assert [event.message for event in events if isinstance(event, Note)] == [
        "driver branch 580 gets no fixes any more: it ended with 2028-06; opsctl stack resolve names another"]


def test_a_host_that_does_not_answer_is_not_taken_for_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, RefusedError("host.unreachable", "gpu-1 does not answer.", hint="h"))
    fleet = a_fleet(tmp_path)
    with pytest.raises(RefusedError) as caught:
        check_lock(fleet, fleet.hosts, discard, TODAY)
    assert caught.value.code == "host.unreachable"


def test_hosts_outside_the_lock_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = play(monkeypatch, HostFacts(H200S, "debian12", ()))
    fleet = a_fleet(tmp_path)
    check_lock(fleet, [fleet.host("ops")], discard, TODAY)
    (tmp_path / "stack.lock").unlink()
    check_lock(replace(fleet, directory=tmp_path), fleet.hosts, discard, TODAY)
    assert asked == []
