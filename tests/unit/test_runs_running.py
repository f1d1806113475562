"""Runs from their first lock to their last line, on hosts whose opsctl-host is the real one."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs_kit import RunsHost, holder, make_fleet, make_hosts

from opsctl.agent import holds as host_holds
from opsctl.agent import locks as host_locks
from opsctl.agent import runs as host_runs
from opsctl.engines.events import Event, Note, PhaseStarted, Progress, RunStarted, TaskResult, discard
from opsctl.engines.session import Completed
from opsctl.errors import (
    ConfigurationError,
    ExitCode,
    LockedError,
    MixedError,
    OpsctlError,
    PausedError,
    RefusedError,
    UsageError,
)
from opsctl.fleet.model import Fleet
from opsctl.runs import Declined, busy, leftovers, locking, running
from opsctl.runs.judge import Known
from opsctl.runs.running import Task, read_runs

V2 = {"verb": "update-model", "service": "chat", "version": "v2"}
V3 = {**V2, "version": "v3"}
BACK = {"verb": "rollback", "service": "chat", "version": ""}
STAGE = {"verb": "stage", "service": "chat", "version": "v2"}
HOSTS = ("gpu-1", "gpu-2", "gpu-3")


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return make_fleet(tmp_path)


@pytest.fixture
def hosts(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, RunsHost]:
    return make_hosts(fleet, tmp_path, monkeypatch)


def task(fleet: Fleet, intent: dict[str, str] = V2, **more: Any) -> Task:
    return Task(fleet, tuple(fleet.host(name) for name in HOSTS), intent, ("chat",),
                ("update-model", "--version", "v2"), **more)


def journal(hosts: dict[str, RunsHost], run: str) -> list[dict[str, Any]]:
    return host_runs.show(hosts["ops-1"].paths, run)


def events(hosts: dict[str, RunsHost], run: str) -> list[str]:
    return [line["event"] for line in journal(hosts, run)]


def locked(hosts: dict[str, RunsHost]) -> dict[str, str]:
    """Host -> run."""
    return {name: one["holder"]["run"] for name, host in hosts.items() for one in host_locks.all_locks(host.paths)}


def cut_off(fleet: Fleet, intent: dict[str, str], monkeypatch: pytest.MonkeyPatch, who: str = "bob") -> str:
    """A run of somebody's whose controller was killed in the middle, long ago."""
    with monkeypatch.context() as patch:
        patch.setattr(running, "me", lambda run, verb: holder(who, run, verb=verb))
        patch.setattr(locking.Locks, "drop", lambda self: self._done.set())
        patch.setattr(running, "_end", lambda *_, **__: None)
        with running.running(task(fleet, intent), discard) as work:
            work.emit(Note("so far so good"))
            work.run.about_to()
    return work.run.name


def later(hosts: dict[str, RunsHost]) -> None:
    for host in hosts.values():
        host.clock_s += 61


def test_a_run_is_locked_and_written_down_and_over(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    seen: list[Event] = []
    with running.running(task(fleet), seen.append) as work:
        run = work.run.name
        assert locked(hosts) == dict.fromkeys(("ops-1", *HOSTS), run)
        assert [line["event"] for line in journal(hosts, run)] == ["RunBegan"], "before anything is done"
        work.emit(TaskResult("gpu-1", "x", "changed"))
        work.emit(Progress("bytes", 1, 2))
        assert len(journal(hosts, run)) == 1, "gathered"
        work.run.about_to()
        assert events(hosts, run) == ["RunBegan", "RunStarted", "TaskResult"], "before the act"
    assert locked(hosts) == {}
    first, *_, last = journal(hosts, run)
    assert (first["verb"], first["intent"], first["argv"], first["hosts"], first["service"]) == (
        "update-model", V2, ["update-model", "--version", "v2"], list(HOSTS), "chat")
    assert "token" not in first["holder"]
    assert (last["event"], last["exit_code"], last["code"]) == ("RunEnded", 0, "")
    local = (fleet.directory / ".opsctl/runs" / run / "journal.ndjson").read_text().splitlines()
    assert [json.loads(line) for line in local] == journal(hosts, run)
    assert isinstance(seen[0], RunStarted)


def test_a_phase_begins_when_the_journal_is_safe(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    with running.running(task(fleet), discard) as work:
        work.emit(PhaseStarted("Preflight"))
        assert events(hosts, work.run.name)[-1] == "PhaseStarted"


@pytest.mark.parametrize(("error", "code", "word", "unfinished"), [
    (RefusedError("a.b", "no."), 5, "a.b", False), (PausedError("c.d", "later."), 8, "c.d", True),
    (MixedError("e.f", "half."), 7, "e.f", False), (KeyboardInterrupt(), 130, "interrupted", True),
    (ValueError("bug"), 1, "", False),
])
def test_how_it_ended_is_written_in_every_case(fleet: Fleet, hosts: dict[str, RunsHost], error: BaseException,
                                               code: int, word: str, unfinished: bool) -> None:
    with pytest.raises(type(error)), running.running(task(fleet), discard):
        raise error
    run = read_runs(fleet)[0]
    assert (run.exit_code, run.code, run.unfinished) == (code, word, unfinished)
    assert locked(hosts) == {}


def test_a_no_to_the_plan_leaves_nothing_to_resume(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    with pytest.raises(Declined), running.running(task(fleet), discard):
        raise Declined
    run = read_runs(fleet)[0]
    assert (run.exit_code, run.closed, run.unfinished) == (130, "declined", False)


def test_the_same_command_continues_under_the_same_name(fleet: Fleet, hosts: dict[str, RunsHost],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    run = cut_off(fleet, V2, monkeypatch)
    later(hosts)
    seen: list[Event] = []
    with running.running(task(fleet), seen.append) as work:
        assert work.run.name == run
        assert set(locked(hosts).values()) == {run}
    assert events(hosts, run) == ["RunBegan", "RunStarted", "Note", "RunContinued", "RunStarted", "Note", "RunEnded"]
    assert not read_runs(fleet)[0].unfinished
    notes = [event.message for event in seen if isinstance(event, Note)]
    assert f"continues run {run} of bob@bobs-laptop" in notes[1]
    assert "took over the lock" in notes[0]


def test_as_long_as_its_controller_lives_it_is_locked(fleet: Fleet, hosts: dict[str, RunsHost],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    run = cut_off(fleet, V2, monkeypatch)
    with pytest.raises(LockedError) as refused, running.running(task(fleet), discard):
        pass
    assert refused.value.code == "lock.held"
    assert run in refused.value.message
    assert len(read_runs(fleet)) == 1, "who was refused is no run"


def test_another_command_is_refused_and_told_which_run(fleet: Fleet, hosts: dict[str, RunsHost],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    run = cut_off(fleet, V2, monkeypatch)
    later(hosts)
    with pytest.raises(LockedError) as refused, running.running(task(fleet, V3), discard):
        pass
    assert (refused.value.code, refused.value.exit_code) == ("run.unfinished", ExitCode.LOCKED)
    assert "update-model of chat by bob@bobs-laptop" in refused.value.message
    assert f"opsctl resume {run}" in refused.value.hint
    assert locked(hosts) == {}


def test_a_rollback_takes_it_back_when_it_acts(fleet: Fleet, hosts: dict[str, RunsHost], monkeypatch: pytest.MonkeyPatch
                                               ) -> None:
    run = cut_off(fleet, V2, monkeypatch)
    later(hosts)
    with pytest.raises(RefusedError), running.running(task(fleet, BACK), discard):
        raise RefusedError("rollback.nowhere", "no.")
    assert next(one for one in read_runs(fleet) if one.run == run).unfinished, "nothing was taken back"
    with running.running(task(fleet, BACK), discard) as work:
        work.run.about_to()
    known = {one.run: one for one in read_runs(fleet)}
    assert known[run].closed == f"taken back by {work.run.name}"
    assert known[work.run.name].state == "done"


def test_a_stage_needs_no_lock_and_is_in_nobodys_way(fleet: Fleet, hosts: dict[str, RunsHost],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    first = cut_off(fleet, STAGE, monkeypatch)
    with running.running(task(fleet, V2), discard), running.running(task(fleet, STAGE), discard) as work:
        assert work.run.name not in locked(hosts).values()
    known = {one.run: one for one in read_runs(fleet)}
    assert known[first].closed == f"done by {work.run.name}"


def test_a_run_that_is_named_goes_on_though_it_failed(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    with pytest.raises(MixedError), running.running(task(fleet), discard) as first:
        raise MixedError("x.y", "half.")
    with running.running(task(fleet, wanted=first.run.name), discard) as again:
        assert again.run.name == first.run.name


def test_who_lost_a_lock_writes_no_end_over_somebody_elses_run(fleet: Fleet, hosts: dict[str, RunsHost],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(locking.Locks.__init__, "__kwdefaults__",
                        {**locking.Locks.__init__.__kwdefaults__, "clock": lambda: clock[0]})
    with pytest.raises(LockedError) as lost, running.running(task(fleet), discard) as work:
        later(hosts)
        clock[0] += 61
        with monkeypatch.context() as patch:
            patch.setattr(running, "me", lambda run, verb: holder("bob", run))
            with running.running(task(fleet), discard) as bobs:
                assert bobs.run.name == work.run.name
                with pytest.raises(LockedError):
                    work.run.about_to()
        work.run.about_to()
    assert lost.value.code == "lock.lost"
    assert [line["by"] for line in journal(hosts, work.run.name) if line["event"] == "RunEnded"] == ["bob@bobs-laptop"]
    local = (work.run.directory / "journal.ndjson").read_text()
    assert '"lock.lost"' in local


def test_a_broken_run_stops_at_its_next_act(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    with pytest.raises(LockedError) as lost, running.running(task(fleet), discard) as work:
        running.close_run(fleet, read_runs(fleet)[0], "its locks were broken", "bob@desk")
        work.emit(Note("on I go"))
        work.run.about_to()
    assert lost.value.code == "run.diverged"
    assert not read_runs(fleet)[0].unfinished


def test_a_gateway_that_stops_answering_is_told_once_and_gets_its_lines_later(
        fleet: Fleet, hosts: dict[str, RunsHost], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsctl.runs.journal.AGAIN_S", 0.0)
    seen: list[Event] = []
    with running.running(task(fleet), seen.append) as work:
        hosts["ops-1"].silent = "host.unreachable"
        for number in range(3):
            work.emit(Note(f"act {number}"))
            work.run.about_to()
        assert len([event for event in seen if isinstance(event, Note) and "journal" in event.message]) == 1
        hosts["ops-1"].silent = ""
        work.run.about_to()
    messages = [line.get("message", "") for line in journal(hosts, work.run.name)]
    assert [message for message in messages if message.startswith("act")] == ["act 0", "act 1", "act 2"]
    assert events(hosts, work.run.name)[-1] == "RunEnded"


def test_before_the_gateway_has_an_agent_lines_wait_without_a_word(fleet: Fleet, hosts: dict[str, RunsHost],
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsctl.runs.journal.AGAIN_S", 0.0)
    for host in hosts.values():
        host.bare = True
    seen: list[Event] = []
    with running.running(task(fleet, {"verb": "provision"}), seen.append) as work:
        work.emit(PhaseStarted("Preflight"))
        for host in hosts.values():
            host.bare = False
        work.emit(PhaseStarted("agent"))
        assert events(hosts, work.run.name) == ["RunBegan", "RunStarted", "PhaseStarted", "PhaseStarted"]
    assert [event for event in seen if isinstance(event, Note)] == []
    assert not read_runs(fleet)[0].unfinished


def test_held_hosts_are_left_alone_and_shown(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    host_holds.put(hosts["ops-1"].paths, "gpu-2", "ann@desk", "RMA")
    seen: list[Event] = []
    with running.running(task(fleet), seen.append) as work:
        assert [host.name for host in work.hosts] == ["gpu-1", "gpu-3"]
        assert "gpu-2" not in locked(hosts)
    note = next(event for event in seen if isinstance(event, Note))
    assert note.host == "gpu-2"
    assert note.message.startswith("left alone, on hold by ann@desk since 2")
    assert note.message.endswith(": RMA")


@pytest.mark.parametrize(("held", "limit"), [(("gpu-2",), "gpu-2,gpu-1"), (HOSTS, ""), (HOSTS, "gpu")])
def test_a_held_host_that_is_named_or_nothing_else_is_refused(fleet: Fleet, hosts: dict[str, RunsHost],
                                                              held: tuple[str, ...], limit: str) -> None:
    for name in held:
        host_holds.put(hosts["ops-1"].paths, name, "ann@desk", "RMA")
    with pytest.raises(LockedError) as refused, running.running(task(fleet, limit=limit), discard):
        pass
    assert (refused.value.code, refused.value.exit_code) == ("host.on_hold", ExitCode.LOCKED)
    assert "opsctl release gpu-" in refused.value.hint
    assert locked(hosts) == {}


def test_a_pattern_that_meets_a_held_host_goes_on_without(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    host_holds.put(hosts["ops-1"].paths, "gpu-2", "ann@desk", "RMA")
    with running.running(task(fleet, limit="gpu-*"), discard) as work:
        assert list(work.held) == ["gpu-2"]


MODULE = {"what": "ansible", "pid": 7, "unit": "", "command": "python3 AnsiballZ_apt.py"}
DPKG = {"what": "dpkg", "pid": 8, "unit": "", "command": "apt-get upgrade"}
DRIVER = {"what": "driver", "pid": None, "unit": "opsctl-driver.service", "command": ""}


def test_what_an_earlier_controller_left_is_waited_for(fleet: Fleet, hosts: dict[str, RunsHost],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy.wait_until_idle, "__defaults__", (lambda: 0.0, lambda _: None))
    hosts["gpu-2"].busy = [[MODULE], [MODULE], []]
    seen: list[Event] = []
    with running.running(task(fleet), seen.append):
        assert hosts["gpu-2"].busy == []
    notes = [event for event in seen if isinstance(event, Note)]
    assert [(note.host, note.message) for note in notes] == [
        ("gpu-2", "busy, waiting for it to end: a task of an earlier provision (process 7)")]
    assert any(isinstance(event, Progress) for event in seen)


def test_a_dpkg_stops_a_provision_and_no_update(fleet: Fleet, hosts: dict[str, RunsHost],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 10_000, 300))
    monkeypatch.setattr(busy.wait_until_idle, "__defaults__", (lambda: float(next(ticks)), lambda _: None))
    hosts["gpu-2"].busy = [[DPKG]] * 9
    with running.running(task(fleet), discard):
        pass
    with pytest.raises(PausedError) as paused, running.running(task(fleet, {"verb": "provision"}), discard):
        pass
    assert paused.value.code == "host.busy"
    assert "packages are being installed (process 8, apt-get upgrade)" in paused.value.message
    assert [run.unfinished for run in read_runs(fleet) if run.verb == "provision"] == [True]


@pytest.mark.parametrize("intent", [V2, BACK, {"verb": "provision"}])
def test_nobody_goes_on_while_a_driver_is_changed(fleet: Fleet, hosts: dict[str, RunsHost], intent: dict[str, str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 10_000, 700))
    monkeypatch.setattr(busy.wait_until_idle, "__defaults__", (lambda: float(next(ticks)), lambda _: None))
    hosts["gpu-2"].busy = [[MODULE, DRIVER]] * 9  # the task that began it waits for it
    seen: list[Event] = []
    with pytest.raises(PausedError) as paused, running.running(task(fleet, intent), seen.append):
        pass
    assert paused.value.code == "host.busy"
    words = "a change of the driver that an earlier provision began"
    assert paused.value.message.startswith(f"gpu-2 has been busy for 35 minutes: {words}")
    assert any(isinstance(event, Note) and event.message.endswith(words) for event in seen)


def test_a_driver_is_seen_where_there_is_no_agent_yet(fleet: Fleet, hosts: dict[str, RunsHost],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """The role of the driver comes before that of the agent, so a first provision leaves just that."""
    monkeypatch.setattr(busy.wait_until_idle, "__defaults__", (lambda: 0.0, lambda _: None))
    said = iter(["71 /usr/bin/python3 /usr/local/lib/opsctl/driver-transaction {}\n", ""])
    real = RunsHost._program

    def program(host: RunsHost, argv: Any, chunks: Any) -> Any:
        return Completed(0, next(said), "") if argv == busy.MODULES else real(host, argv, chunks)

    monkeypatch.setattr(RunsHost, "_program", program)
    hosts["gpu-1"].bare = True
    seen: list[Event] = []
    with running.running(replace(task(fleet, {"verb": "provision"}), hosts=(fleet.host("gpu-1"),)), seen.append):
        assert list(said) == []
    assert [event.message for event in seen if isinstance(event, Note)] == [
        "busy, waiting for it to end: a change of the driver that an earlier provision began (process 71)"]


def test_without_the_gateway_a_rollback_goes_on(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    hosts["ops-1"].silent = "host.unreachable"
    host_holds.put(hosts["gpu-2"].paths, "gpu-2", "ann@desk", "RMA")
    with running.running(task(fleet, BACK), discard) as work:
        assert set(locked(hosts)) == {"gpu-1", "gpu-3"}
        assert list(work.held) == ["gpu-2"], "its own copy counts"
    with pytest.raises(OpsctlError) as refused, running.running(task(fleet, V2), discard):
        pass
    assert refused.value.code == "host.unreachable"


def test_one_who_is_refused_leaves_no_trace(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    hosts["ops-1"].silent = "host.unreachable"
    with pytest.raises(RefusedError), running.running(task(fleet, V2), discard):
        pass
    assert not (fleet.directory / ".opsctl/runs").exists()
    assert replace(task(fleet), limit="x").verb == "update-model"


def mover_of(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, lose_after: int) -> tuple[Any, list[str]]:
    """A move whose lock is lost at the check after so many; and the verbs that its host was asked."""
    from opsctl.releases import roll
    from opsctl.releases.plan import Step

    asked: list[str] = []
    checks = iter(range(100))

    def check() -> None:
        if next(checks) >= lose_after:
            raise LockedError("lock.lost", "taken by bob.")

    def ask(_: object, verb: Any, host: str) -> dict[str, Any]:
        asked.append(verb[0])
        return {"state": {"instances": [{"instance": "chat.0", "unit": "active", "voice": "up"}], "drains": []},
                "idle": {"idle": True, "running": 0, "waiting": 0}}.get(verb[0], {"weight": 100})

    monkeypatch.setattr(roll, "ask", ask)
    monkeypatch.setattr(roll, "carry_out", lambda *_, **__: asked.append("cutover") or {})
    step = Step(host="gpu-1", instance="chat.0", now="v1-aaaaaaaaaaaa", next="v2-bbbbbbbbbbbb", action="move",
                serving=True, wave=1, back="v1-aaaaaaaaaaaa")
    settings = roll.Settings("R1", 60, 50, check=check)
    return roll._Mover(replace(fleet, load_balancer="none"), step, settings, discard, roll.threading.Event(),
                       roll.Timing()), asked


@pytest.mark.parametrize(("lose_after", "acts"), [(0, set()), (2, {"drain"})])
def test_a_move_that_lost_its_lock_touches_nothing_more(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, lose_after: int,
                                                        acts: set[str]) -> None:
    mover, asked = mover_of(fleet, monkeypatch, lose_after)
    with mover, pytest.raises(LockedError) as lost:
        mover.move(back=False)
    assert lost.value.code == "lock.lost"
    assert set(asked) - {"state", "idle"} == acts


def test_a_rollout_that_lost_its_lock_begins_nothing(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    from opsctl.releases import roll
    from opsctl.releases.plan import ALL_HEARD, Step
    from opsctl.releases.rollout import Move, Rollout

    def lost() -> None:
        raise LockedError("lock.lost", "taken by bob.")

    begun: list[object] = []
    monkeypatch.setattr(roll._Conductor, "_serving", lambda _: (frozenset(), ALL_HEARD))
    monkeypatch.setattr(roll._Conductor, "_begin", lambda *step, **_: begun.append(step))
    step = Step(host="gpu-1", instance="chat.0", now="", next="v2-bbbbbbbbbbbb", action="move", serving=False, wave=1,
                back="")
    with pytest.raises(LockedError):
        roll.roll(fleet, fleet.services[0], Rollout((Move(step),), 1), roll.Settings("R1", 60, 50, about_to=lost),
                  discard)
    assert begun == []


def test_a_first_provision_that_still_needs_a_password_goes_on(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    for host in hosts.values():
        host.silent = "host.no_sudo"
    seen: list[Event] = []
    with running.running(task(fleet, {"verb": "provision"}), seen.append) as work:
        for host in hosts.values():
            host.silent = ""  # the first task has brought it
        work.run.about_to()
    assert [event for event in seen if isinstance(event, Note)] == []
    assert read_runs(fleet)[0].state == "done"


def test_a_move_whose_thread_is_told_to_exit_is_over_too(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    from opsctl.releases import roll
    from opsctl.releases.plan import Step

    def leave(*_: object, **__: object) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(roll._Mover, "move", leave)
    step = Step(host="gpu-1", instance="chat.0", now="", next="v2-bbbbbbbbbbbb", action="move", serving=False, wave=1,
                back="")
    conductor = roll._Conductor(replace(fleet, load_balancer="none"), fleet.services[0], roll.Settings("R1", 60, 50),
                                discard)
    conductor._begin(step, back=False)
    _, _, error = conductor._ended.get(timeout=5)
    assert error is not None
    assert "unexpected SystemExit" in error.message


@pytest.mark.parametrize("refusal", [
    UsageError("a.b", "no."), ConfigurationError("a.b", "no."), LockedError("a.b", "no."), RefusedError("a.b", "no."),
    Declined()])
@pytest.mark.parametrize("before", [PausedError("c.d", "later."), MixedError("e.f", "half."), None])
def test_a_continuation_that_is_refused_leaves_the_run_as_it_was(
        fleet: Fleet, hosts: dict[str, RunsHost], refusal: BaseException, before: OpsctlError | None,
        monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        run = cut_off(fleet, V2, monkeypatch)
        later(hosts)
    else:
        with pytest.raises(type(before)), running.running(task(fleet), discard) as work:
            raise before
        run = work.run.name
    was = read_runs(fleet)[0]
    with pytest.raises(type(refusal)), running.running(task(fleet, wanted=run), discard):
        raise refusal
    now = read_runs(fleet)[0]
    assert (now.run, now.unfinished, now.resumable, now.closed) == (run, was.unfinished, True, "")
    assert now.exit_code == (was.exit_code or (130 if isinstance(refusal, Declined) else 8))


def test_a_rollback_that_only_looks_takes_nothing_back(fleet: Fleet, hosts: dict[str, RunsHost],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    run = cut_off(fleet, V2, monkeypatch)
    later(hosts)
    with pytest.raises(Declined), running.running(task(fleet, BACK), discard) as work:
        work.emit(PhaseStarted("Look"))
        raise Declined
    assert next(one for one in read_runs(fleet) if one.run == run).unfinished


def test_a_rollback_with_nothing_to_move_takes_it_back_at_its_end(fleet: Fleet, hosts: dict[str, RunsHost],
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    run = cut_off(fleet, V2, monkeypatch)
    later(hosts)
    with running.running(task(fleet, BACK), discard) as work:
        work.emit(PhaseStarted("Look"))
    assert next(one for one in read_runs(fleet) if one.run == run).closed == f"taken back by {work.run.name}"


def test_what_could_not_be_closed_is_closed_later(fleet: Fleet, hosts: dict[str, RunsHost],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    run = cut_off(fleet, V2, monkeypatch)
    later(hosts)
    close, failed, seen = running.close_run, list[str](), list[Event]()

    def fails_twice(fleet: Fleet, run: Any, *more: str) -> None:
        if len(failed) < 2:
            failed.append(run.run)
            raise OpsctlError("host.timed_out", "ops-1 did not answer.")
        close(fleet, run, *more)

    monkeypatch.setattr(running, "close_run", fails_twice)
    with running.running(task(fleet, BACK), seen.append) as work:
        work.run.about_to()
        work.run.about_to()
    assert next(one for one in read_runs(fleet) if one.run == run).closed == f"taken back by {work.run.name}"
    assert len([one for one in seen if isinstance(one, Note) and "could not be closed" in one.message]) == 1


def in_the_dark(fleet: Fleet, hosts: dict[str, RunsHost], intent: dict[str, str], error: BaseException | None = None
                ) -> str:
    """A run that ends while the gateway is away."""
    with contextlib.suppress(OpsctlError), running.running(task(fleet, intent), discard) as work:
        work.run.about_to()
        work.emit(Note("and now the gateway goes"))
        hosts["ops-1"].silent = "host.unreachable"
        if error:
            raise error
    hosts["ops-1"].silent = ""
    later(hosts)
    return work.run.name


def test_an_end_that_the_gateway_missed_is_told_later(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    run = in_the_dark(fleet, hosts, V2)
    assert events(hosts, run)[-1] == "RunStarted"
    with running.running(task(fleet, V3), discard) as work:
        assert work.run.name != run
    assert events(hosts, run)[-2:] == ["Note", "RunEnded"]
    assert {one.run: one.state for one in read_runs(fleet)} == {run: "done", work.run.name: "done"}


def test_so_is_the_end_of_one_that_was_continued(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    with pytest.raises(PausedError), running.running(task(fleet), discard):
        raise PausedError("c.d", "later.")
    run = in_the_dark(fleet, hosts, V2)
    assert events(hosts, run)[-1] == "Note", "continues run"
    assert [one.state for one in read_runs(fleet)] == ["done"]
    assert events(hosts, run).count("RunBegan") == 1


def test_what_somebody_else_continued_is_not_written_over(fleet: Fleet, hosts: dict[str, RunsHost],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    run = in_the_dark(fleet, hosts, V2, MixedError("e.f", "half."))
    with monkeypatch.context() as elsewhere, pytest.raises(PausedError):
        elsewhere.setattr(running.leftovers, "send", lambda *_: ())
        with running.running(task(fleet), discard) as work:
            raise PausedError("c.d", "later.")
    assert work.run.name == run
    was = journal(hosts, run)
    assert [one.exit_code for one in read_runs(fleet)] == [8]
    assert journal(hosts, run) == was


def test_a_run_that_lost_its_locks_tells_no_end_of_it_later(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    run = in_the_dark(fleet, hosts, V2, LockedError("lock.lost", "taken by bob."))
    assert [(one.run, one.unfinished) for one in read_runs(fleet)] == [(run, True)]


def test_a_rollback_without_the_gateway_is_known_later_and_so_is_what_it_took_back(
        fleet: Fleet, hosts: dict[str, RunsHost], monkeypatch: pytest.MonkeyPatch) -> None:
    run = cut_off(fleet, V2, monkeypatch)
    later(hosts)
    hosts["ops-1"].silent = "host.unreachable"
    with running.running(task(fleet, BACK), discard) as work:
        work.run.about_to()
    hosts["ops-1"].silent = ""
    known = {one.run: one for one in read_runs(fleet)}
    assert known[work.run.name].state == "done"
    assert known[run].closed == f"taken back by {work.run.name}"


def test_it_is_known_later_also_where_nothing_waited_for_it(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    with running.running(task(fleet), discard):
        pass
    hosts["ops-1"].silent = "host.unreachable"
    with running.running(task(fleet, BACK), discard) as work:
        work.run.about_to()
    hosts["ops-1"].silent = ""
    assert {one.run: one.state for one in read_runs(fleet)}[work.run.name] == "done"


AA, BB, CC = "20261122-100000-aa", "20261122-100000-bb", "20261122-110000-cc"


@pytest.mark.parametrize(("known", "wanted"), [
    ((), []),  # a gateway that has just got its agent
    (((AA, 0),), [(BB, True), (CC, True)]),
    (((AA, None),), [(AA, False), (BB, False), (CC, False)]),
    (((BB, 0), (CC, 0)), [(AA, True)]),
    ((("20261122-105959-dd", 8),), [(CC, False)]),
])
def test_which_journals_of_this_machine_the_gateway_wants(known: tuple[tuple[str, int | None], ...],
                                                          wanted: list[tuple[str, bool]]) -> None:
    runs = [Known(name, exit_code=code) for name, code in known]
    assert leftovers.wanting(runs, [CC, AA, BB]) == wanted


def test_a_killed_run_that_was_overtaken_does_not_come_back(fleet: Fleet, hosts: dict[str, RunsHost],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    with running.running(task(fleet), discard):
        pass
    hosts["ops-1"].silent = "host.unreachable"
    with pytest.raises(KeyError), running.running(task(fleet, BACK), discard) as work:
        monkeypatch.setattr(running, "_end", lambda *_, **__: None)  # killed: no last line
        raise KeyError
    hosts["ops-1"].silent = ""
    assert work.run.name not in {one.run for one in read_runs(fleet)}


def test_a_lock_that_is_known_to_be_lost_stops_a_play_at_its_next_event(fleet: Fleet, hosts: dict[str, RunsHost],
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[locking.Locks] = []
    make = running._locks
    monkeypatch.setattr(running, "_locks", lambda *given: made.append(make(*given)) or made[0])
    with pytest.raises(LockedError) as lost, running.running(task(fleet), discard) as work:
        work.emit(TaskResult("gpu-1", "x", "changed"))
        host_locks.break_(hosts["gpu-2"].paths, "host", work.run.name)
        for place in made[0].places:
            made[0]._beat(place)
        for event in (TaskResult("gpu-1", "y", "changed"), Progress("bytes", 1, 2)):
            with pytest.raises(LockedError):
                work.emit(event)
        work.emit(TaskResult("gpu-1", "z", "changed"))
    assert lost.value.code == "lock.lost"
    assert locked(hosts) == {}


def some(fleet: Fleet, *names: str, **more: Any) -> Task:
    return Task(fleet, tuple(fleet.host(name) for name in names), V2, ("chat",), ("update-model", *names), **more)


def test_a_run_has_the_hosts_of_all_its_starts(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    for names in (("gpu-1",), ("gpu-1", "gpu-2"), ("gpu-2",)):
        with pytest.raises(PausedError), running.running(some(fleet, *names), discard):
            raise PausedError("c.d", "later.")
    (run,) = read_runs(fleet)
    assert (run.hosts, run.argv) == (("gpu-1", "gpu-2"), ("update-model", "gpu-1", "gpu-2"))
    with pytest.raises(LockedError) as refused, running.running(replace(some(fleet, "gpu-2"), intent=V3), discard):
        pass
    assert refused.value.code == "run.unfinished"


def test_some_of_its_hosts_do_not_end_a_run(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    with pytest.raises(PausedError), running.running(task(fleet), discard):
        raise PausedError("c.d", "later.")
    seen: list[Event] = []
    with running.running(some(fleet, "gpu-1"), seen.append):
        pass
    (run,) = read_runs(fleet)
    assert (run.exit_code, run.argv) == (8, ("update-model", "--version", "v2"))
    assert any("gpu-2, gpu-3" in event.message for event in seen if isinstance(event, Note))
    host_holds.put(hosts["ops-1"].paths, "gpu-2", "ann@desk", "RMA")
    with running.running(task(fleet), discard):
        pass
    assert [one.state for one in read_runs(fleet)] == ["done"], "who is on hold is not waited for"
