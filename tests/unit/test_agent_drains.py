"""Drains: whose they are, what the least of them is, and that a lease ends without anybody's help."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from release_kit import Keys, make_host, make_keys

from opsctl.agent.drains import least_weight, parse, put, read_drains, remaining, remove
from opsctl.agent.paths import Paths
from opsctl.errors import UsageError


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def host(tmp_path: Path, keys: Keys) -> Paths:
    return make_host(tmp_path / "host", keys)


def drained(host: Paths, **more: Any) -> dict[str, int]:
    return {drain["owner"]: drain["weight"] for drain in read_drains(host, "chat.0", **more)}


def test_each_owner_removes_its_own_drain_alone(host: Paths) -> None:
    assert put(host, "chat.0", "operator:ann", 0, "fan", "ann")
    assert put(host, "chat.0", "run:20261122-031500-ab12", 30, "", "bob")
    assert drained(host) == {"operator:ann": 0, "run:20261122-031500-ab12": 30}
    assert least_weight(read_drains(host, "chat.0")) == 0
    assert remove(host, "chat.0", "operator:ann")
    assert drained(host) == {"run:20261122-031500-ab12": 30}
    assert not remove(host, "chat.0", "operator:ann")
    assert not remove(host, "chat.0", "guard")
    assert drained(host) == {"run:20261122-031500-ab12": 30}
    assert remove(host, "chat.0", "run:20261122-031500-ab12")
    assert least_weight(read_drains(host, "chat.0")) == 100


def test_only_what_is_new_is_a_change(host: Paths) -> None:
    assert put(host, "chat.0", "guard", 50, "hot", "agent")
    assert not put(host, "chat.0", "guard", 50, "hot", "agent")
    assert put(host, "chat.0", "guard", 30, "hot", "agent")
    assert put(host, "chat.0", "guard", 30, "hotter", "agent")
    assert put(host, "chat.0", "guard", 30, "hotter", "agent", lease_s=60)
    assert not put(host, "chat.0", "guard", 30, "hotter", "agent", lease_s=60)
    assert put(host, "chat.0", "guard", 30, "hotter", "agent")


def test_what_is_told_of_a_drain(host: Paths) -> None:
    put(host, "chat.0", "run:1", 0, "update to v2", "ann", lease_s=60, clock=lambda: 1000.0)
    (told,) = read_drains(host, "chat.0", clock=lambda: 1010.0)
    assert told.pop("at").endswith("Z")
    assert told == {"instance": "chat.0", "owner": "run:1", "weight": 0, "reason": "update to v2", "by": "ann",
                    "lease_s": 50.0}


def test_a_lease_ends_by_itself_and_can_be_renewed(host: Paths) -> None:
    put(host, "chat.0", "run:1", 0, "", "ann", lease_s=60, clock=lambda: 1000.0)
    assert drained(host, clock=lambda: 1059.9) == {"run:1": 0}
    assert drained(host, clock=lambda: 1060.0) == {}
    assert not put(host, "chat.0", "run:1", 0, "", "ann", lease_s=60, clock=lambda: 1050.0)
    assert drained(host, clock=lambda: 1109.9) == {"run:1": 0}
    assert drained(host, clock=lambda: 1110.0) == {}


def test_a_lease_ends_with_its_boot(host: Paths) -> None:
    put(host, "chat.0", "run:1", 0, "", "ann", lease_s=60, clock=lambda: 1000.0)
    put(host, "chat.0", "operator:ann", 10, "", "ann")
    host.boot_id.write_text("boot-2\n")
    assert drained(host, clock=lambda: 5.0) == {"operator:ann": 10}


def test_a_lease_that_was_over_meanwhile_is_told_to_who_renews_it(host: Paths) -> None:
    """The instance was in rotation again: that is a change, and no mere renewal."""
    put(host, "chat.0", "run:1", 0, "", "ann", lease_s=60, clock=lambda: 1000.0)
    assert put(host, "chat.0", "run:1", 0, "", "ann", lease_s=60, clock=lambda: 1061.0)
    assert not remove(host, "chat.0", "run:1", clock=lambda: 2000.0)


def test_ended_leases_are_swept_and_nothing_else(host: Paths) -> None:
    put(host, "chat.0", "run:1", 0, "", "ann", lease_s=60, clock=lambda: 1000.0)
    put(host, "chat.0", "run:2", 0, "", "ann", lease_s=600, clock=lambda: 1000.0)
    put(host, "chat.0", "operator:ann", 0, "", "ann", clock=lambda: 1000.0)
    remove(host, "chat.0", "guard", clock=lambda: 1100.0)
    assert {path.name for path in host.drains("chat.0").glob("*.json")} == {"run:2.json", "operator:ann.json"}


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"{}", b'{"weight": "0"}', b'{"weight": NaN}', b'{"weight": 100, "lease": 5}',
    b'{"weight": 100, "lease": {"boot": "boot-1"}}', b"\xff", b'{"weight": null}',
])
def test_a_file_that_cannot_be_read_drains_until_its_owner_takes_it_away(host: Paths, content: bytes) -> None:
    host.drains("chat.0").mkdir(parents=True)
    (host.drains("chat.0") / "guard.json").write_bytes(content)
    assert drained(host) == {"guard": 0}
    assert remove(host, "chat.0", "guard")
    assert drained(host) == {}


@pytest.mark.parametrize(("weight", "read"), [("-5", 0), ("250", 100), ("1e999", 100), ("33.9", 33)])
def test_weights_are_percent(weight: str, read: int) -> None:
    assert parse(f'{{"weight": {weight}}}'.encode())["weight"] == read


@pytest.mark.parametrize(("lease", "boot", "left"), [
    (None, "boot-1", None), ({"boot": "boot-1", "until_s": 12}, "boot-1", 2.0),
    ({"boot": "boot-1", "until_s": 12}, "boot-2", 0.0), ({"boot": "boot-1", "until_s": 4}, "boot-1", -6.0),
])
def test_what_is_left_of_a_lease(lease: dict[str, object] | None, boot: str, left: float | None) -> None:
    assert remaining({"weight": 0, "lease": lease}, boot, 10.0) == left


@pytest.mark.parametrize("owner", ["", "ann", "operator:", "run:../../x", "operator:a/b", "guard:x", "operator:.x",
                                   "operator:ann\n", "operator:" + "x" * 65])
def test_names_that_are_no_owners(host: Paths, owner: str) -> None:
    with pytest.raises(UsageError):
        put(host, "chat.0", owner, 0, "", "ann")
    with pytest.raises(UsageError):
        remove(host, "chat.0", owner)


def test_owners_at_the_same_time_lose_nothing(host: Paths) -> None:
    """Also while ended leases are swept, and with one owner's renewals beside its removal."""
    owners = [f"run:{number}" for number in range(6)]
    together = threading.Barrier(len(owners))

    def work(owner: str) -> None:
        together.wait()
        for _ in range(15):
            put(host, "chat.0", f"{owner}-ended", 0, "", "ann", lease_s=-1)
            put(host, "chat.0", owner, 0, "", "ann", lease_s=600)
            assert owner in drained(host)
            assert remove(host, "chat.0", owner)
            assert owner not in drained(host)
        put(host, "chat.0", owner, 7, "", "ann")

    failed: list[BaseException] = []

    def guarded(owner: str) -> None:
        try:
            work(owner)
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=[owner]) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert drained(host) == dict.fromkeys(owners, 7)
