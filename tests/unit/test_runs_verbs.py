"""opsctl hold, release, runs, resume and lock break: what they decide and write; hosts' opsctl-host is the real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from runs_kit import RunsHost, RunsSessions, holder, make_fleet, make_hosts
from typer.main import get_command

from opsctl.agent import holds as host_holds
from opsctl.agent import locks as host_locks
from opsctl.cli import hold as hold_verb
from opsctl.cli import lock as lock_verb
from opsctl.cli import main, resume, runs
from opsctl.cli.speak import Resumed, typed, wanted_run
from opsctl.engines.events import Event, Note, discard
from opsctl.errors import ExitCode, OpsctlError, UsageError
from opsctl.fleet.model import Fleet
from opsctl.runs import breaking, holding, locking, running
from opsctl.runs.judge import Known
from opsctl.runs.running import Task, read_runs

V2 = {"verb": "update-model", "service": "chat", "version": "v2"}


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return make_fleet(tmp_path)


@pytest.fixture
def hosts(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, RunsHost]:
    found = make_hosts(fleet, tmp_path, monkeypatch)
    monkeypatch.setattr(breaking, "on_each", RunsSessions(found).on_each)  # type: ignore[arg-type]
    return found


def holds(hosts: dict[str, RunsHost], name: str) -> list[str]:
    return [hold["host"] for hold in host_holds.all_holds(hosts[name].paths)]


def test_a_hold_lies_on_the_gateway_and_on_the_host(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    assert holding.put(fleet, fleet.host("gpu-2"), "ann@desk", "RMA", None, discard)
    assert not holding.put(fleet, fleet.host("gpu-2"), "ann@desk", "RMA", None, discard)
    assert [holds(hosts, name) for name in hosts] == [["gpu-2"], [], ["gpu-2"], []]
    found = holding.read(fleet, fleet.hosts)
    assert found["gpu-2"].words.startswith("on hold by ann@desk since 2")
    assert holding.remove(fleet, fleet.host("gpu-2"), discard)
    assert not holding.remove(fleet, fleet.host("gpu-2"), discard)
    assert holding.read(fleet, fleet.hosts) == {}


def test_a_host_that_is_off_is_held_all_the_same(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    hosts["gpu-2"].silent = "host.unreachable"
    seen: list[Event] = []
    assert holding.put(fleet, fleet.host("gpu-2"), "ann@desk", "RMA", 7200, seen.append)
    assert [event.host for event in seen if isinstance(event, Note)] == ["gpu-2"]
    assert holding.read(fleet, fleet.hosts)["gpu-2"].until


def test_the_gateway_is_the_authority_when_it_answers(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    holding.put(fleet, fleet.host("gpu-2"), "ann@desk", "RMA", None, discard)
    host_holds.remove(hosts["ops-1"].paths, "gpu-2")
    assert holding.read(fleet, fleet.hosts) == {}
    hosts["ops-1"].silent = "host.unreachable"
    assert list(holding.read(fleet, fleet.hosts)) == ["gpu-2"]
    seen: list[Event] = []
    assert holding.put(fleet, fleet.host("gpu-3"), "ann@desk", "", None, seen.append)
    (note,) = (event for event in seen if isinstance(event, Note))
    assert "counts only until it does; then say it again" in note.message
    with pytest.raises(OpsctlError):
        holding.remove(fleet, fleet.host("gpu-2"), discard)


@pytest.mark.parametrize(("text", "seconds"), [
    ("", None), ("2d", 172800), ("30m", 1800), ("1.5h", 5400), ("1w", 604800)])
def test_lengths_of_time(text: str, seconds: float | None) -> None:
    assert hold_verb.seconds(text) == seconds


@pytest.mark.parametrize("text", ["2", "d", "0h", "-1d", "two days"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(UsageError):
        hold_verb.seconds(text)


def known(name: str, exit_code: int | None = None, **more: Any) -> Known:
    return Known(**{"run": name, "verb": "update-model", "argv": ("update-model", "--version", "v2"), "by": "bob@desk",
                    "exit_code": exit_code} | more)


def test_which_run_is_resumed() -> None:
    assert resume.choose([], "") is None
    assert resume.choose([known("R2", 0), known("R1", 8)], "") == known("R1", 8)
    assert resume.choose([known("R2", 0), known("R1", 7)], "") is None, "a failure is taken up only by its name"
    assert resume.choose([known("R2", 0), known("R1", 7)], "R1") == known("R1", 7)
    for name, code in (("R9", "resume.no_such_run"), ("R2", "resume.is_over")):
        with pytest.raises(UsageError) as refused:
            resume.choose([known("R2", 0), known("R1", 8)], name)
        assert refused.value.code == code
    with pytest.raises(UsageError) as refused:
        resume.choose([known("R2"), known("R1", 130)], "")
    assert refused.value.code == "resume.which"
    assert "R2 (update-model by bob@desk), R1" in refused.value.message


@pytest.mark.parametrize(("run", "words"), [
    (known("R1"), "not ended"), (known("R1", 0), "done"),
    (known("R1", 6, code="gate.unhealthy"), "exit 6 (gate.unhealthy)"),
    (known("R1", 8, closed="taken back by R2"), "closed: taken back by R2")])
def test_how_a_run_ended_in_words(run: Known, words: str) -> None:
    assert runs.ending(run) == words


def heard(monkeypatch: pytest.MonkeyPatch, *words: str, obj: object = None, called: str = "update-model"
          ) -> tuple[tuple[str, ...], str]:
    """What update-model would put down of a command line, and the run it would continue."""
    found: list[tuple[tuple[str, ...], str]] = []

    def stand_in(context: typer.Context, **_: Any) -> None:
        found.append((typed(context), wanted_run(context)))

    verb = get_command(main.app).commands["update-model"]  # type: ignore[attr-defined]
    inner = verb.callback
    monkeypatch.setattr(verb, "callback", lambda **given: stand_in(current[0], **given))
    current: list[typer.Context] = []
    monkeypatch.setattr(verb, "invoke", lambda context: (current.append(context), verb.callback(**context.params)))
    assert inner
    verb.main(args=list(words), prog_name=called, standalone_mode=False, obj=obj)
    return found[0]


def test_a_command_line_is_kept_without_what_was_one_persons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--version", "v2", "my/inventory.ini", "--limit", "gpu-*", "-y", "--json", "--bundle", "b")
    said = heard(monkeypatch, *words)
    assert said == (("update-model", "--version", "v2", "--limit", "gpu-*", "--bundle", str(tmp_path / "b"), "--yes"),
                    "")
    again = heard(monkeypatch, *said[0][1:], "their/inventory.ini", obj=Resumed("R1"), called="opsctl update-model")
    assert again == (said[0], "R1")


def test_a_run_that_will_not_come_back_is_given_up(fleet: Fleet, hosts: dict[str, RunsHost],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(locking.Locks, "drop", lambda self: self._done.set())
        patch.setattr(running, "_end", lambda *_, **__: None)
        patch.setattr(running, "me", lambda run, verb: holder("bob", run))
        with running.running(Task(fleet, (fleet.host("gpu-1"),), V2, ("chat",)), discard) as work:
            run = work.run.name
    found, silent = breaking.all_locks(fleet)
    assert [(one.host, one.name, one.holder.run) for one in found] == [
        ("ops-1", "service-chat", run), ("gpu-1", "host", run)]
    assert silent == []
    hosts["gpu-3"].silent = "host.unreachable"
    assert breaking.all_locks(fleet)[1] == ["gpu-3"]
    outcome = breaking.break_run(fleet, found, run, discard)
    assert (len(outcome.broken), outcome.closed, outcome.failed) == (2, True, ())
    assert host_locks.all_locks(hosts["gpu-1"].paths) == []
    assert not read_runs(fleet)[0].resumable


def left_behind(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run of bob's on gpu-1 whose controller was killed."""
    with monkeypatch.context() as patch:
        patch.setattr(locking.Locks, "drop", lambda self: self._done.set())
        patch.setattr(running, "_end", lambda *_, **__: None)
        patch.setattr(running, "me", lambda run, verb: holder("bob", run))
        with running.running(Task(fleet, (fleet.host("gpu-1"),), V2, ("chat",)), discard) as work:
            return work.run.name


@pytest.fixture
def break_lock(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
               ) -> Callable[[str], tuple[int, dict[str, Any]]]:
    """``opsctl lock break RUN --yes --json``: its exit code and document."""
    monkeypatch.setattr("opsctl.fleet.inventory.read_fleet", lambda _: fleet)
    monkeypatch.setattr("opsctl.fleet.ssh_config.write_ssh_config", lambda _: None)
    monkeypatch.setattr(lock_verb, "find_inventory", lambda _: fleet.inventory)

    def call(run: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        try:
            lock_verb.break_(run, yes=True, as_json=True)
            code = 0
        except typer.Exit as end:
            code = end.exit_code
        return code, json.loads(capsys.readouterr().out)

    return call


def test_a_silent_gateway_does_not_say_that_a_run_is_over(
        fleet: Fleet, hosts: dict[str, RunsHost], monkeypatch: pytest.MonkeyPatch,
        break_lock: Callable[[str], tuple[int, dict[str, Any]]]) -> None:
    run = left_behind(fleet, monkeypatch)
    hosts["ops-1"].silent = "host.unreachable"
    code, document = break_lock(run)
    assert (code, len(document["broken"]), document["closed"]) == (ExitCode.PAUSED, 1, False)
    assert "does not answer" in document["failed"][0]
    code, document = break_lock(run)
    assert (code, document["error"]["code"]) == (ExitCode.REFUSED, "host.unreachable")
    hosts["ops-1"].silent = ""
    code, document = break_lock(run)
    assert (code, document["closed"], document["failed"]) == (0, True, [])
    code, document = break_lock(run)
    assert (code, document["broken"], document["closed"]) == (0, [], False)


def test_a_lock_that_could_not_be_broken_is_no_success(
        fleet: Fleet, hosts: dict[str, RunsHost], monkeypatch: pytest.MonkeyPatch,
        break_lock: Callable[[str], tuple[int, dict[str, Any]]]) -> None:
    run = left_behind(fleet, monkeypatch)
    act = breaking._break

    def refuse(session: Any, one: breaking.Found, run: str) -> bool:
        if one.host == "gpu-1":
            raise OpsctlError("host.timed_out", "gpu-1 did not answer in time.")
        return act(session, one, run)

    monkeypatch.setattr(breaking, "_break", refuse)
    code, document = break_lock(run)
    assert (code, [one["host"] for one in document["broken"]]) == (ExitCode.PAUSED, ["ops-1"])
    assert document["failed"] == ["gpu-1: gpu-1 did not answer in time."]


def test_a_bare_machine_is_unlocked_too(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    for host in hosts.values():
        host.bare = True
    mine = locking.Locks(fleet, [fleet.host("gpu-1")], [], holder(), discard, allow_bare=True)
    mine.take()
    found, _ = breaking.all_locks(fleet)
    assert [(one.host, one.name, one.holder.run) for one in found] == [("gpu-1", "provision", "R1")]
    assert breaking.break_run(fleet, found, "R1", discard) == breaking.Outcome(tuple(found), False)
    assert breaking.all_locks(fleet)[0] == []
    mine.drop()


def test_status_shows_a_hold_also_of_a_host_that_is_off(fleet: Fleet) -> None:
    from opsctl.status import rows

    held = {"host": "gpu-2", "by": "ann@desk", "message": "RMA", "since": "2026-11-22T03:15:00Z", "until": None}
    off = OpsctlError("host.unreachable", "gpu-2 does not answer.")
    states: dict[str, Any] = {name: {"instances": [], "holds": []} for name in ("gpu-1", "gpu-3")}
    states |= {"ops-1": {"instances": [], "holds": [held]}, "gpu-2": off}
    notes = {row.host: row.note for row in rows(fleet, fleet.hosts, states)}
    assert notes["gpu-2"] == "gpu-2 does not answer.; on hold by ann@desk since 2026-11-22 03:15: RMA"
    states |= {"ops-1": off, "gpu-2": {"instances": [], "holds": [held]}}
    notes = {row.host: row.note for row in rows(fleet, fleet.hosts, states)}
    assert "RMA" in notes["gpu-2"]
    assert "RMA" not in notes["gpu-1"]
