"""status --strict: exit 9 when anything is not as it should be, and one line that says what."""

from __future__ import annotations

import json
from pathlib import Path

import guard_kit
import pytest
from typer.testing import CliRunner

from opsctl.cli import main
from opsctl.fleet.model import Fleet
from opsctl.status import Row, Seen, wrong, wrong_words

GOOD = [Row("ops-1", ("lb",), state="up"), Row("gpu-1", ("gpu",), "chat.0", "v2", "serving", 1, 0, weight=100)]


def row(state: str, weight: int | None = None, instance: str = "chat.0") -> Row:
    return Row("gpu-2", ("gpu",), instance, "v2", state, weight=weight)


def test_a_fleet_that_is_well_has_nothing_wrong() -> None:
    assert wrong(GOOD) == []


@pytest.mark.parametrize("state", ["unreachable", "failed", "behind", "ahead", "drained", "changing", "stopped",
                                   "starting", "draining", "error", "no release", "not provisioned",
                                   "a word of tomorrow's"])
def test_every_other_state_is_wrong(state: str) -> None:
    assert wrong([*GOOD, row(state)]) == [{"host": "gpu-2", "instance": "chat.0", "what": state}]


@pytest.mark.parametrize(("weight", "expected"), [(None, []), (100, []), (30, ["serving at 30 %"])])
def test_an_instance_that_serves_less_than_it_could_is_wrong(weight: int | None, expected: list[str]) -> None:
    assert [one["what"] for one in wrong([row("serving", weight)])] == expected


@pytest.mark.parametrize(("silent", "expected"), [(["chat"], ["ledger did not answer"]), (["other"], []), ([], [])])
def test_a_ledger_that_did_not_answer_hides_who_is_behind(silent: list[str], expected: list[str]) -> None:
    assert [one["what"] for one in wrong(GOOD, silent)] == expected


def test_what_the_guard_holds_back_is_wrong() -> None:
    guards = {"gpu-1": guard_kit.seen(instances=[guard_kit.slowed(latched=True)]), "gpu-2": guard_kit.seen()}
    assert wrong(GOOD, guards=guards) == [
        {"host": "gpu-1", "instance": "chat.0", "what": "guard: slowed (30 %)"},
        {"host": "gpu-1", "instance": "chat.0", "what": "guard: latched"}]


def test_one_line_says_what() -> None:
    bad = wrong([row("failed"), row("unreachable", instance="")], ["chat"])
    assert wrong_words(bad) == "3 wrong: gpu-2 chat.0 failed, gpu-2 unreachable, chat ledger did not answer"


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    (tmp_path / "inventory.ini").write_text(
        "[gpu]\nhere ansible_connection=local service_address=127.0.0.1 management_address=127.0.0.1\n"
        "[lb]\nhere\n[gateway]\nhere\n[monitor]\nhere\n", encoding="utf-8")
    (tmp_path / "services.yml").write_text("chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n", encoding="utf-8")
    return tmp_path / "inventory.ini"


@pytest.mark.parametrize(("found", "silent", "options", "exit_code", "says"), [
    (GOOD, (), ["--strict"], 0, ""),
    ([*GOOD, row("failed")], (), [], 0, ""),
    ([*GOOD, row("failed")], (), ["--strict"], 9, "1 wrong: gpu-2 chat.0 failed"),
    (GOOD, ("chat",), ["--strict"], 9, "1 wrong: chat ledger did not answer"),
    (GOOD, (), ["--strict", "--watch", "1"], 2, "one of the two"),
])
def test_the_exit_code(inventory: Path, monkeypatch: pytest.MonkeyPatch, found: list[Row], silent: tuple[str, ...],
                       options: list[str], exit_code: int, says: str) -> None:
    monkeypatch.setattr("opsctl.status.look", lambda _fleet, _hosts: Seen(found, silent))
    said = CliRunner().invoke(main.app, ["status", str(inventory), *options])
    assert (said.exit_code, says in said.stderr) == (exit_code, True), said.stderr
    assert says == "" or says not in said.stdout


def test_the_document_says_what_is_wrong_with_and_without_it(inventory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(_fleet: Fleet, _hosts: object) -> Seen:
        return Seen([row("behind")])
    monkeypatch.setattr("opsctl.status.look", look)
    for options, exit_code in (([], 0), (["--strict"], 9)):
        said = CliRunner().invoke(main.app, ["status", str(inventory), "--json", *options])
        assert said.exit_code == exit_code
        assert json.loads(said.stdout)["wrong"] == [{"host": "gpu-2", "instance": "chat.0", "what": "behind"}]


def test_a_guard_at_work_is_exit_9_and_in_the_document(inventory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guards = {"gpu-1": guard_kit.seen(instances=[guard_kit.slowed()])}
    monkeypatch.setattr("opsctl.status.look", lambda _fleet, _hosts: Seen(GOOD, guards=guards))
    said = CliRunner().invoke(main.app, ["status", str(inventory), "--strict", "--json"])
    assert said.exit_code == 9
    assert json.loads(said.stdout)["guards"]["gpu-1"]["instances"][0]["rung"] == 2
