"""Holds: how they end, and that one nobody can read holds on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from machines import Machine
from release_kit import make_host, make_keys
from systemd_kit import Systemd

from opsctl.agent import holds
from opsctl.agent.paths import Paths
from opsctl.agent.state import state
from opsctl.errors import UsageError

NOON = 1795348800.0  # 2026-11-22T12:00:00Z


@pytest.fixture
def host(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


def put(host: Paths, name: str = "gpu-1", by: str = "ann", message: str = "a fan is loud", for_s: float | None = None,
        at: float = NOON) -> bool:
    return holds.put(host, name, by, message, for_s, lambda: at)


def held(host: Paths, at: float = NOON) -> list[str]:
    return [hold["host"] for hold in holds.all_holds(host, lambda: at)]


def test_a_hold_ends_by_the_calendar_and_one_without_an_end_never(host: Paths) -> None:
    assert put(host, "gpu-1", for_s=3600)
    assert put(host, "gpu-2")
    assert holds.all_holds(host, lambda: NOON) == [
        {"host": "gpu-1", "by": "ann", "message": "a fan is loud", "since": "2026-11-22T12:00:00Z",
         "until": "2026-11-22T13:00:00Z"},
        {"host": "gpu-2", "by": "ann", "message": "a fan is loud", "since": "2026-11-22T12:00:00Z", "until": None}]
    assert held(host, NOON + 3599) == ["gpu-1", "gpu-2"]
    assert held(host, NOON + 3600) == ["gpu-2"]
    assert held(host, NOON + 1e9) == ["gpu-2"]


def test_only_what_is_new_is_a_change_and_the_same_words_keep_since(host: Paths) -> None:
    assert put(host)
    assert not put(host, at=NOON + 60)
    assert put(host, for_s=3600, at=NOON + 60)
    (hold,) = holds.all_holds(host, lambda: NOON + 60)
    assert (hold["since"], hold["until"]) == ("2026-11-22T12:00:00Z", "2026-11-22T13:01:00Z")
    assert put(host, by="bob", for_s=3600, at=NOON + 60)
    (hold,) = holds.all_holds(host, lambda: NOON + 60)
    assert (hold["by"], hold["since"]) == ("bob", "2026-11-22T12:01:00Z")


def test_a_hold_that_ended_is_as_none(host: Paths) -> None:
    put(host, for_s=60)
    assert not holds.remove(host, "gpu-1", lambda: NOON + 60)
    put(host, for_s=60)
    assert put(host, at=NOON + 60)
    (hold,) = holds.all_holds(host, lambda: NOON + 60)
    assert hold["since"] == "2026-11-22T12:01:00Z"


def test_ended_holds_are_swept_by_the_next_and_no_others(host: Paths) -> None:
    put(host, "gpu-1", for_s=60)
    put(host, "gpu-2")
    put(host, "gpu-3", for_s=600, at=NOON + 61)
    assert sorted(path.name for path in host.holds.glob("*.json")) == ["gpu-2.json", "gpu-3.json"]


def test_who_removes_a_hold_is_told_whether_there_was_one(host: Paths) -> None:
    assert not holds.remove(host, "gpu-1")
    assert put(host)
    assert not holds.remove(host, "gpu-2")
    assert holds.remove(host, "gpu-1", lambda: NOON)
    assert held(host) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b"null",
                                     b'{"by": "a", "message": "", "since": ""}',
                                     b'{"by": "a", "message": "", "since": "", "until": "soon"}',
                                     b'{"by": "a", "message": "", "since": "", "until": 5}'])
def test_a_file_that_cannot_be_read_holds_until_it_is_removed(host: Paths, content: bytes) -> None:
    put(host, "gpu-2", for_s=60)
    (host.holds / "gpu-1.json").write_bytes(content)
    (hold,) = holds.all_holds(host, lambda: NOON + 1e9)
    assert (hold["host"], hold["message"], hold["until"]) == ("gpu-1", "its file cannot be read", None)
    put(host, "gpu-3", at=NOON + 1e9)
    assert held(host, NOON + 1e9) == ["gpu-1", "gpu-3"], "nothing sweeps it"
    assert holds.remove(host, "gpu-1")
    assert held(host, NOON + 1e9) == ["gpu-3"]


def test_one_that_cannot_be_read_is_put_right_by_the_same_command(host: Paths) -> None:
    put(host)
    (host.holds / "gpu-1.json").write_bytes(b"{")
    assert put(host, at=NOON + 5)
    assert holds.all_holds(host)[0]["by"] == "ann"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", "gpu-1\n"])
def test_names_that_are_no_hosts(host: Paths, name: str) -> None:
    with pytest.raises(UsageError):
        put(host, name)
    with pytest.raises(UsageError):
        holds.remove(host, name)


def says(host: Paths, *words: str) -> dict[str, Any]:
    done = Machine(host, "gw").run(["opsctl-host", *words])
    assert done.returncode == 0, done.stdout
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_verbs_and_what_the_host_says_of_itself(tmp_path: Path) -> None:
    host = make_host(tmp_path / "host", make_keys(tmp_path / "keys"))
    assert state(host, Systemd())["holds"] == []
    order = ["hold-put", "--host", "gpu-1", "--by", "ann@laptop", "--message", "a fan is loud"]
    assert says(host, *order) == {"changed": True}
    assert says(host, *order) == {"changed": False}
    (hold,) = says(host, "holds")["holds"]
    assert (hold["host"], hold["by"], hold["until"]) == ("gpu-1", "ann@laptop", None)
    assert says(host, *order, "--for-s", "60") == {"changed": True}
    assert state(host, Systemd())["holds"] == says(host, "holds")["holds"] != [hold]
    assert says(host, "hold-remove", "--host", "gpu-1") == {"changed": True}
    assert says(host, "hold-remove", "--host", "gpu-1") == {"changed": False}


@pytest.mark.parametrize("seconds", ["0", "-5", "inf", "nan", "1e12", "soon"])
def test_lengths_that_are_none(host: Paths, seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        says(host, "hold-put", "--host", "gpu-1", "--by", "ann", "--message", "", "--for-s", seconds)
    assert usage.value.code == 2
    assert "error: argument --for-s" in capsys.readouterr().err
    assert not host.holds.exists()
