"""The ledger: what its last word is, which releases are bad, and that no copy ever loses or bends a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from machines import Machine

from opsctl.agent import durable, gateway, ledger
from opsctl.agent.ledger import Line
from opsctl.agent.paths import Paths
from opsctl.errors import LockedError, OpsctlError, RefusedError

A, B, C = (letter * 64 for letter in "abc")
DIGESTS = (A, B)


@pytest.fixture
def host(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


def append(host: Paths, version: str, digest: str, after: int, action: str = "serve") -> dict[str, Any]:
    return gateway.append_ledger(host, "chat", version, digest, after=after, by="ann@desk", action=action, now=0.0)


def lines(host: Paths) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = gateway.show_ledger(host, "chat")["lines"]
    return found


# Marks.


def line(number: int, version: str, digest: str, action: str = "serve") -> Line:
    return Line(number, version, digest, "2026-11-22T03:00:00Z", "ann@desk", action=action)


@pytest.mark.parametrize(("lines", "tip", "bad"), [
    ([], None, set()),
    ([line(1, "v1", A)], 1, set()),
    ([line(1, "v1", A), line(2, "v2", B), line(3, "v1", A), line(4, "v2", B, "bad")], 3, {B}),
    ([line(1, "v1", A), line(2, "v2", B), line(3, "v2", B, "bad")], 2, {B}),
    ([line(1, "v1", A), line(2, "v2", B, "bad"), line(3, "v2", B)], 3, set()),
    ([line(1, "v2", B, "bad")], None, {B}),
])
def test_the_tip_is_what_was_served_last_and_a_mark_lasts_until_it_is_served_again(
        lines: list[Line], tip: int | None, bad: set[str]) -> None:
    found = ledger.tip(lines)
    assert (found and found.number, ledger.bad_digests(lines)) == (tip, bad)


def test_lines_of_an_older_version_say_serve() -> None:
    old = b'{"number": 1, "version": "v1", "digest": "%s", "at": "", "by": "", "run": "", "note": ""}\n' % A.encode()
    assert ledger.parse(old)[0][0].action == "serve"


def test_an_action_of_a_newer_version_is_refused() -> None:
    with pytest.raises(RefusedError) as refused:
        ledger.parse(line(1, "v1", A, "freeze").to_bytes())
    assert refused.value.code == "ledger.inconsistent"


def test_a_release_is_marked_once_and_served_again_in_spite_of_it(two: Paths) -> None:
    assert append(two, "v2", DIGESTS[1], 2, "bad") == {"changed": True, "number": 3}
    assert append(two, "v2", DIGESTS[1], 2, "bad") == {"changed": False, "number": 3}
    assert append(two, "v2", DIGESTS[1], 3) == {"changed": True, "number": 4}  # the tip already, but bad
    assert append(two, "v2", DIGESTS[1], 4) == {"changed": False, "number": 4}


@pytest.fixture
def two(host: Paths) -> Paths:
    """A gateway with v1 and v2 whose ledger has named both."""
    for number, (version, digest) in enumerate(zip(("v1", "v2"), DIGESTS, strict=True)):
        (host.gateway_releases / "chat" / f"{version}-{digest[:12]}").mkdir(parents=True)
        append(host, version, digest, number)
    return host


def test_what_the_ledger_knows_may_be_served_though_the_gateway_lost_it(two: Paths) -> None:
    for version, digest in zip(("v1", "v2"), DIGESTS, strict=True):
        (two.gateway_releases / "chat" / f"{version}-{digest[:12]}").rmdir()
    assert append(two, "v1", A, 2) == {"changed": True, "number": 3}
    with pytest.raises(RefusedError) as refused:
        append(two, "v3", C, 3)
    assert refused.value.code == "ledger.no_release"
    assert append(two, "v3", C, 3, "bad") == {"changed": True, "number": 4}


# Several lines of one change.


BACK = (line(0, "v2", B, "bad"), line(0, "v1", A))


def extend(host: Paths, *given: Line, after: int = 2) -> dict[str, Any]:
    return gateway.extend_ledger(host, "chat", given, after=after, now=0.0)


def test_lines_of_one_change_are_numbered_one_after_the_other(two: Paths) -> None:
    assert extend(two, *BACK) == {"changed": True, "number": 4, "added": [True, True]}
    assert [(found["number"], found["version"], found["action"], found["at"]) for found in lines(two)][2:] == [
        (3, "v2", "bad", "1970-01-01T00:00:00Z"), (4, "v1", "serve", "1970-01-01T00:00:00Z")]
    assert extend(two, *BACK) == {"changed": False, "number": 4, "added": [False, False]}


def test_a_line_that_is_refused_keeps_the_others_out(two: Paths) -> None:
    with pytest.raises(RefusedError):
        extend(two, BACK[0], line(0, "v3", C))
    with pytest.raises(LockedError):
        extend(two, *BACK, after=1)
    assert len(lines(two)) == 2


def test_a_disk_that_fails_in_the_middle_leaves_the_ledger_as_it_was(two: Paths, monkeypatch: pytest.MonkeyPatch
                                                                    ) -> None:
    def ill(_: int) -> None:
        raise OSError(5, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", ill)
        with pytest.raises(OSError, match="Input/output"):
            extend(two, *BACK)
    assert len(lines(two)) == 2


def test_lines_over_a_torn_one(two: Paths) -> None:
    with (two.ledgers / "chat.jsonl").open("ab") as file:
        file.write(BACK[0].to_bytes()[:9])
    assert extend(two, *BACK)["number"] == 4
    assert [found["number"] for found in lines(two)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("body", "code"), [
    (f'{{"version": "v2", "digest": "{B}", "action": "bad"}}\n{{"version": "v1", "digest": "{A}"}}\n'.encode(), 0),
    (b"5\n", 2), (b"{}\n", 2), (b"{\n", 2), (b'{"version": "v1"}\n', 2)])
def test_the_verb_takes_json_lines(two: Paths, body: bytes, code: int) -> None:
    machine = Machine(two, "ops-1")
    done = machine.run(["opsctl-host", "ledger-extend", "--service", "chat", "--after", "2"], stdin=body)
    assert done.returncode == code
    assert [bool(found["by"]) for found in lines(two)] == [True] * (2 if code else 4)


# Copies.

THREE = (line(1, "v1", A), line(2, "v2", B), line(3, "v1", A))


@pytest.mark.parametrize(("here", "given", "result"), [
    (0, 2, {"changed": True, "lines": 2}),
    (2, 2, {"changed": False, "lines": 2}),
    (2, 3, {"changed": True, "lines": 3}),
    (3, 2, {"changed": False, "lines": 3}),
])
@pytest.mark.parametrize("copy", [True, False])
def test_a_ledger_is_taken_when_it_begins_with_what_is_here(host: Paths, here: int, given: int, result: dict[str, Any],
                                                            copy: bool) -> None:
    if here:
        gateway.put_ledger(host, "chat", ledger.to_bytes(THREE[:here]), copy=copy)
    assert gateway.put_ledger(host, "chat", ledger.to_bytes(THREE[:given]), copy=copy) == result
    assert len(gateway.show_ledger(host, "chat", copy=copy)["lines"]) == max(here, given)
    assert gateway.show_ledger(host, "chat", copy=not copy)["lines"] == []


@pytest.mark.parametrize("given", [
    (line(1, "v2", B),), (line(1, "v1", A), line(2, "v3", C), line(3, "v1", A)), (line(1, "v1", A), line(2, "v3", C))])
def test_one_that_says_something_else_is_not(host: Paths, given: tuple[Line, ...]) -> None:
    gateway.put_ledger(host, "chat", ledger.to_bytes(THREE[:2]))
    with pytest.raises(LockedError) as refused:
        gateway.put_ledger(host, "chat", ledger.to_bytes(given))
    assert refused.value.code == "ledger.diverged"
    assert len(lines(host)) == 2


@pytest.mark.parametrize(("body", "code"), [
    (ledger.to_bytes(THREE)[:-1], "ledger.torn"), (b"{}\n", "ledger.damaged"),
    (ledger.to_bytes(THREE[1:]), "ledger.inconsistent")])
def test_half_a_ledger_is_none(host: Paths, body: bytes, code: str) -> None:
    with pytest.raises(OpsctlError) as refused:
        gateway.put_ledger(host, "chat", body)
    assert refused.value.code == code
    assert lines(host) == []


def test_a_damaged_copy_says_which_file_and_what_to_do(host: Paths) -> None:
    path = host.ledger_copies / "chat.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"{}\n")
    with pytest.raises(OpsctlError) as refused:
        gateway.put_ledger(host, "chat", ledger.to_bytes(THREE), copy=True)
    assert str(path) in refused.value.message
    assert "remove it" in refused.value.hint
