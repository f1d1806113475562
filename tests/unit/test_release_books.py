"""The ledger with the gateway up, down, back, and with copies that contradict it. opsctl-host's verbs are real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from machines import Machine, Sessions

from opsctl.agent import gateway as gateway_program
from opsctl.agent import ledger
from opsctl.agent.ledger import Line
from opsctl.agent.paths import Paths
from opsctl.engines.events import Event, Note, discard
from opsctl.errors import LockedError, OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.releases import books as books_module
from opsctl.releases.books import Books, Merged, keepers, merge, read_books, write_lines

A, B, C = (letter * 64 for letter in "abc")
CHAT = Service("chat", "gpu", 8100, 8000)
V1, V2, V3 = (Line(number, f"v{number}", digest, "2026-11-22T03:15:00Z", "ann@desk")
              for number, digest in enumerate((A, B, C), 1))
V2_BAD = replace(V2, number=3, action="bad", note="too slow")


@pytest.mark.parametrize(("gateway", "copies", "result"), [
    ((V1,), {}, Merged((V1,), "gateway")),
    ((V1, V2), {"gpu-1": (V1,), "gpu-2": ()}, Merged((V1, V2), "gateway")),
    ((V1,), {"gpu-1": (V1, V2), "gpu-2": (V1,)}, Merged((V1, V2), "gpu-1")),
    ((), {"gpu-1": (V1, V2)}, Merged((V1, V2), "gpu-1")),
    (None, {"gpu-1": (V1,), "gpu-2": (V1, V2)}, Merged((V1, V2), "gpu-2")),
    (None, {}, Merged((), "")),
    ((V1, V2), {"gpu-1": (V1, V3)}, Merged((V1, V2), "gateway", ("gpu-1",))),
    ((V1,), {"gpu-1": (V2, V3)}, Merged((V1,), "gateway", ("gpu-1",))),
    ((V1,), {"gpu-1": (V1, V2), "gpu-2": (V1, V3)}, Merged((V1, V2), "gpu-1", ("gpu-2",))),
    (None, {"gpu-1": (V1, V2), "gpu-2": (V1, V3)}, Merged((V1, V2), "gpu-1", ("gpu-2",))),
])
def test_the_longest_that_begins_with_what_the_gateway_says(
        gateway: tuple[Line, ...] | None, copies: dict[str, tuple[Line, ...]], result: Merged) -> None:
    assert merge(gateway, copies) == result


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    hosts = (Host("ops-1", "10.0.0.1", ("gateway", "lb")), Host("gpu-1", "10.0.0.11", ("gpu",)),
             Host("gpu-2", "10.0.0.12", ("gpu",)))
    return Fleet(tmp_path, tmp_path / "inventory.ini", hosts, (CHAT,))


@pytest.fixture
def machines(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Machine]:
    """Three machines; the gateway has v1 to v3."""
    found = {host.name: Machine(Paths(tmp_path / host.name), host.name) for host in fleet.hosts}
    for line in (V1, V2, V3):
        (found["ops-1"].paths.gateway_releases / "chat" / line.release).mkdir(parents=True)
    sessions = Sessions(found)
    monkeypatch.setattr(books_module, "Session", sessions)
    monkeypatch.setattr(books_module, "on_each", sessions.on_each)
    return found


def put(machine: Machine, *lines: Line, copy: bool = True) -> None:
    gateway_program.put_ledger(machine.paths, "chat", ledger.to_bytes(lines), copy=copy)


def versions(machine: Machine, *, copy: bool = True) -> list[str]:
    return [line["version"] for line in gateway_program.show_ledger(machine.paths, "chat", copy=copy)["lines"]]


def test_lines_go_to_the_gateway_and_to_every_hosts_copy(fleet: Fleet, machines: dict[str, Machine]) -> None:
    books = read_books(fleet, CHAT, discard)
    assert books == Books("chat", (), "gateway", gateway_up=True)
    books = write_lines(fleet, CHAT, books, [V1], discard)
    for machine in machines.values():
        machine.verbs.clear()
    books = write_lines(fleet, CHAT, books, [V2, V2_BAD], discard)
    assert machines["ops-1"].verbs == ["ledger-extend", "ledger-show"], "both lines in one write"
    assert machines["gpu-1"].verbs == ["ledger-put"]
    assert [(line.version, line.action, line.by) for line in books.lines] == [
        ("v1", "serve", "ann@desk"), ("v2", "serve", "ann@desk"), ("v2", "bad", "ann@desk")]
    assert read_books(fleet, CHAT, discard).lines == books.lines
    for host in ("gpu-1", "gpu-2"):
        assert versions(machines[host]) == ["v1", "v2", "v2"]
    assert versions(machines["ops-1"]) == []  # it has the ledger itself


def test_the_same_again_writes_nothing(fleet: Fleet, machines: dict[str, Machine]) -> None:
    books = write_lines(fleet, CHAT, read_books(fleet, CHAT, discard), [V1, replace(V2, action="bad")], discard)
    assert write_lines(fleet, CHAT, books, [V1, replace(V2, action="bad")], discard).lines == books.lines


def test_somebody_else_wrote_meanwhile(fleet: Fleet, machines: dict[str, Machine]) -> None:
    books = read_books(fleet, CHAT, discard)
    write_lines(fleet, CHAT, books, [V1], discard)
    with pytest.raises(LockedError) as refused:
        write_lines(fleet, CHAT, books, [V2], discard)
    assert refused.value.code == "ledger.moved"


@pytest.mark.parametrize("code", ["host.unreachable", "host.connection_lost"])
def test_with_the_gateway_down_the_longest_copy_counts(fleet: Fleet, machines: dict[str, Machine], code: str) -> None:
    put(machines["gpu-1"], V1)
    put(machines["gpu-2"], V1, V2)
    machines["ops-1"].silent = code
    books = read_books(fleet, CHAT, discard)
    assert (books.lines, books.source, books.gateway_up) == ((V1, V2), "gpu-2", False)
    assert "ops-1 does not answer" in books.silence


def test_what_was_written_while_it_was_down_is_handed_to_it(fleet: Fleet, machines: dict[str, Machine]) -> None:
    write_lines(fleet, CHAT, read_books(fleet, CHAT, discard), [V1, V2], discard)
    machines["ops-1"].silent = "host.unreachable"
    seen: list[Event] = []
    books = write_lines(fleet, CHAT, read_books(fleet, CHAT, discard), [V1, V2_BAD], seen.append)
    assert [(line.number, line.version, line.action) for line in books.lines][2:] == [
        (3, "v1", "serve"), (4, "v2", "bad")]
    assert any(isinstance(event, Note) and "the gateway gets it from there" in event.message for event in seen)
    machines["ops-1"].silent = ""
    assert len(read_books(fleet, CHAT, discard, looking=True).lines) == 4
    assert versions(machines["ops-1"], copy=False) == ["v1", "v2"], "who only looks writes nothing"
    back = read_books(fleet, CHAT, seen.append)
    assert back == Books("chat", books.lines, "gateway", gateway_up=True)
    assert versions(machines["ops-1"], copy=False) == ["v1", "v2", "v1", "v2"]
    assert any(isinstance(event, Note) and "got 2 lines" in event.message and event.host == "ops-1" for event in seen)


def test_a_gateway_that_went_down_after_it_was_read(fleet: Fleet, machines: dict[str, Machine]) -> None:
    books = write_lines(fleet, CHAT, read_books(fleet, CHAT, discard), [V1], discard)
    machines["ops-1"].silent = "host.unreachable"
    assert not write_lines(fleet, CHAT, books, [V2], discard).gateway_up
    assert versions(machines["gpu-1"]) == ["v1", "v2"]


def test_a_connection_that_broke_while_it_wrote_leaves_the_copies_alone(fleet: Fleet, machines: dict[str, Machine]
                                                                        ) -> None:
    books = write_lines(fleet, CHAT, read_books(fleet, CHAT, discard), [V1], discard)
    machines["ops-1"].silent = "host.connection_lost"  # the line may be there, with a date of its own
    with pytest.raises(OpsctlError) as error:
        write_lines(fleet, CHAT, books, [V2], discard)
    assert error.value.code == "host.connection_lost"
    assert versions(machines["gpu-1"]) == ["v1"]


def test_a_host_that_was_away_gets_its_copy_with_the_next_line(fleet: Fleet, machines: dict[str, Machine]) -> None:
    machines["gpu-2"].silent = "host.unreachable"
    books = write_lines(fleet, CHAT, read_books(fleet, CHAT, discard), [V1], discard)
    assert versions(machines["gpu-2"]) == []
    machines["gpu-2"].silent = ""
    write_lines(fleet, CHAT, books, [V2], discard)
    assert versions(machines["gpu-2"]) == ["v1", "v2"]


def test_nobody_is_there(fleet: Fleet, machines: dict[str, Machine]) -> None:
    books = write_lines(fleet, CHAT, read_books(fleet, CHAT, discard), [V1], discard)
    for machine in machines.values():
        machine.silent = "host.unreachable"
    with pytest.raises(RefusedError) as refused:
        read_books(fleet, CHAT, discard)
    assert refused.value.code == "ledger.unreadable"
    with pytest.raises(OpsctlError) as error:
        write_lines(fleet, CHAT, books, [V2], discard)
    assert error.value.code == "ledger.not_written"


def test_a_silent_gateway_without_copies_is_no_empty_ledger(fleet: Fleet, machines: dict[str, Machine]) -> None:
    machines["ops-1"].silent = "host.unreachable"
    with pytest.raises(RefusedError) as refused:
        read_books(fleet, CHAT, discard)
    assert refused.value.code == "ledger.unreadable"


def test_what_a_person_has_to_mend_is_no_silence(fleet: Fleet, machines: dict[str, Machine]) -> None:
    put(machines["gpu-1"], V1)
    machines["ops-1"].silent = "host.foreign_key"
    with pytest.raises(RefusedError) as refused:
        read_books(fleet, CHAT, discard)
    assert refused.value.code == "host.foreign_key"


def test_two_who_wrote_without_seeing_each_other(fleet: Fleet, machines: dict[str, Machine]) -> None:
    put(machines["ops-1"], V1, V2, copy=False)
    put(machines["gpu-2"], V1, replace(V3, number=2))
    with pytest.raises(LockedError) as refused:
        read_books(fleet, CHAT, discard)
    assert refused.value.code == "ledger.diverged"
    assert "line 2 of the ledger of chat says 'serve v3' on gpu-2 and 'serve v2' on" in refused.value.message
    assert "remove /var/lib/opsctl/ledger/chat.jsonl on gpu-2" in refused.value.hint
    seen: list[Event] = []
    assert read_books(fleet, CHAT, seen.append, looking=True).lines == (V1, V2)
    assert any(isinstance(event, Note) and event.level == "warning" for event in seen)


def test_a_damaged_copy_is_left_out_and_said(fleet: Fleet, machines: dict[str, Machine]) -> None:
    put(machines["ops-1"], V1, copy=False)
    path = machines["gpu-1"].paths.ledger_copies / "chat.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"{}\n")
    seen: list[Event] = []
    assert read_books(fleet, CHAT, seen.append).lines == (V1,)
    assert any(isinstance(event, Note) and event.host == "gpu-1" and str(path) in event.message for event in seen)


def test_one_machine_is_gateway_and_keeper_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Fleet(tmp_path, tmp_path / "inventory.ini", (Host("box", "127.0.0.1", ("gateway", "lb", "gpu")),), (CHAT,))
    machine = Machine(Paths(tmp_path / "box"), "box")
    (machine.paths.gateway_releases / "chat" / V1.release).mkdir(parents=True)
    sessions = Sessions({"box": machine})
    monkeypatch.setattr(books_module, "Session", sessions)
    monkeypatch.setattr(books_module, "on_each", sessions.on_each)
    books = write_lines(alone, "chat", read_books(alone, "chat", discard), [V1], discard)
    assert versions(machine) == versions(machine, copy=False) == ["v1"]
    assert read_books(alone, "chat", discard) == books


def test_of_a_service_that_left_everybody_may_have_a_copy(fleet: Fleet) -> None:
    assert [host.name for host in keepers(fleet, "chat")] == ["gpu-1", "gpu-2"]
    assert [host.name for host in keepers(fleet, "gone")] == ["gpu-1", "gpu-2"]
