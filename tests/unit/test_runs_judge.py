"""Who may take a lock, and which run a command continues, takes back or runs into. Tables."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from runs_kit import holder

from opsctl.errors import ExitCode, UsageError
from opsctl.runs import identity, judge
from opsctl.runs.identity import Holder
from opsctl.runs.judge import Begin, Blocked, Continue, Known, Verdict, decide, known

ME = holder("ann", "R2")
V2 = {"verb": "update-model", "service": "chat", "version": "v2"}
V3 = {**V2, "version": "v3"}
BACK = {"verb": "rollback", "service": "chat", "version": ""}
PROVISION = {"verb": "provision"}
STAGE = {"verb": "stage", "service": "chat", "version": "v2"}


@pytest.mark.parametrize(("other", "lives", "beat_s", "verdict"), [
    (None, True, 0, Verdict.FREE),
    (ME, True, 0, Verdict.MINE),
    (holder("ann", "R1"), False, 1, Verdict.GONE),
    (holder("ann", "R1"), True, 1, Verdict.HELD),
    (holder("ann", "R1"), True, 61, Verdict.STALE),
    (holder("ann", "R1", boot="boot-0"), True, 1, Verdict.GONE),  # its pid is another process' by now
    (holder("bob", "R1"), False, 1, Verdict.HELD),
    (holder("bob", "R1"), False, 60, Verdict.HELD),
    (holder("bob", "R1"), False, 60.5, Verdict.STALE),
    (holder("bob", "R1", machine_id=ME.machine_id), False, 1, Verdict.HELD),  # another user on the same machine
    (holder("ann", "R1", machine_id="id-of-desk"), False, 1, Verdict.HELD),  # the same user elsewhere
    (holder("ann", "R1", machine=ME.machine, machine_id="id-of-desk"), False, 1, Verdict.HELD),  # two called laptop
    (holder("ann", "R1", machine="clone"), False, 1, Verdict.HELD),  # two made of one image
    (holder("ann", "R1", machine="clone", boot="boot-0"), False, 1, Verdict.HELD),
    (holder("ann", "R1", namespace="pid:[2]"), False, 1, Verdict.HELD),  # its processes cannot be seen from here
    (holder("ann", "R1", namespace=""), False, 1, Verdict.GONE),  # an older agent does not keep it
])
def test_who_may_take_a_lock(other: Holder | None, lives: bool, beat_s: float, verdict: Verdict) -> None:
    assert judge.lock(other, ME, lives=lives, beat_s=beat_s) is verdict


def test_a_machine_without_an_id_is_nobodys() -> None:
    nameless = holder("ann", "R2", machine_id="")
    assert judge.lock(holder("ann", "R1", machine_id=""), nameless, lives=False, beat_s=1) is Verdict.HELD


def run(name: str, intent: dict[str, Any], exit_code: int | None = None, hosts: tuple[str, ...] = ("gpu-1", "gpu-2"),
        **more: Any) -> Known:
    return Known(name, str(intent["verb"]), intent, (), hosts, str(intent.get("service", "")), "bob@desk", 0.0,
                 exit_code, **more)


@pytest.mark.parametrize(("runs", "intent", "hosts", "decision"), [
    ([], V2, "gpu-1", Begin()),
    ([run("R1", V2)], V2, "gpu-1", Continue(run("R1", V2))),
    ([run("R1", V2, 8)], V2, "gpu-1", Continue(run("R1", V2, 8))),
    ([run("R1", V2, 130)], V2, "gpu-9", Continue(run("R1", V2, 130))),
    ([run("R1", V2, 0)], V2, "gpu-1", Begin()),
    ([run("R1", V2, 5)], V3, "gpu-1", Begin()),
    ([run("R1", V2, 6)], V3, "gpu-1", Begin()),
    ([run("R1", V2, 7)], V3, "gpu-1", Begin()),
    ([run("R1", V2, 1)], V3, "gpu-1", Begin()),
    ([run("R1", V2)], V3, "gpu-1", Blocked(run("R1", V2))),
    ([run("R1", V2, 8)], V3, "gpu-2", Blocked(run("R1", V2, 8))),
    ([run("R1", V2)], V3, "gpu-9", Begin()),
    ([run("R1", V2)], PROVISION, "gpu-1", Blocked(run("R1", V2))),
    ([run("R1", PROVISION)], BACK, "gpu-1", Blocked(run("R1", PROVISION))),
    ([run("R1", V2, closed="broken")], V3, "gpu-1", Begin()),
    ([run("R1", V2)], BACK, "gpu-1", Begin((run("R1", V2),))),
    ([run("R1", {**BACK, "version": "v1"}, 8)], BACK, "gpu-1", Begin((run("R1", {**BACK, "version": "v1"}, 8),))),
    ([run("R1", BACK, 8)], BACK, "gpu-1", Continue(run("R1", BACK, 8))),
    ([run("R1", {**V2, "service": "talk"}, 8)], BACK, "gpu-1", Blocked(run("R1", {**V2, "service": "talk"}, 8))),
    ([run("R1", STAGE)], V3, "gpu-1", Begin()),
    ([run("R1", V2)], STAGE, "gpu-1", Begin()),
    ([run("R1", STAGE)], STAGE, "gpu-1", Begin((run("R1", STAGE),))),
])
def test_which_run_a_command_goes_on_with(runs: list[Known], intent: dict[str, Any], hosts: str, decision: object
                                          ) -> None:
    assert decide(runs, intent, {hosts}) == decision


@pytest.mark.parametrize("exit_code", [None, 1, 7, 8, 130])
def test_a_run_that_is_named_is_continued(exit_code: int | None) -> None:
    named = run("R1", V2, exit_code)
    assert decide([run("R9", PROVISION, 0), named], V2, {"gpu-1"}, wanted="R1") == Continue(named)


@pytest.mark.parametrize(("exit_code", "unfinished", "resumable"), [
    (None, True, True), (0, False, False), (1, False, True), (4, False, False), (5, False, False), (6, False, False),
    (7, False, True), (8, True, True), (130, True, True)])
def test_what_is_unfinished(exit_code: int | None, unfinished: bool, resumable: bool) -> None:
    one = run("R1", V2, exit_code)
    assert (one.unfinished, one.resumable) == (unfinished, resumable)
    assert not run("R1", V2, exit_code, closed="taken back by R2").resumable


def test_the_gateways_document_is_read() -> None:
    began = {"t": 7.5, "event": "RunBegan", "run": "R1", "verb": "update-model", "intent": V2, "service": "chat",
             "argv": ["update-model", "--version", "v2"], "hosts": ["gpu-1"], "by": "bob@desk", "holder": {"pid": 3}}
    ended = {"t": 9, "event": "RunEnded", "exit_code": 8, "code": "drain.deadline", "by": "bob@desk"}
    first, second = known({"runs": [
        {"run": "R1", "began": began, "ended": ended, "closed": None, "lines": 4, "at": 9},
        {"run": "R0", "began": {"event": "RunBegan"}, "ended": None, "closed": {"why": "x"}, "lines": 1, "at": None}]})
    assert (first.run, first.intent, first.argv, first.hosts, first.by) == (
        "R1", V2, ("update-model", "--version", "v2"), ("gpu-1",), "bob@desk")
    assert (first.began, first.exit_code, first.code, first.lines) == (7.5, 8, "drain.deadline", 4)
    assert first.unfinished
    assert first.holder is not None
    assert (second.closed, second.unfinished) == ("x", False)


def test_a_run_in_the_way_is_named_with_both_ways_on() -> None:
    error = judge.blocked(run("R1", V2, 8), "yesterday")
    assert (error.code, error.exit_code) == ("run.unfinished", ExitCode.LOCKED)
    assert error.message == ("update-model of chat by bob@desk, begun yesterday, ended with exit code 8 on gpu-1, "
                             "gpu-2 (run R1).")
    assert "opsctl resume R1" in error.hint
    assert "opsctl lock break R1" in error.hint


def test_we_are_alive_and_a_process_that_ended_is_not() -> None:
    mine = identity.me("R1", "stage")
    assert identity.alive(mine)
    assert not identity.alive(Holder(**{**mine.as_document(), "pid_start": mine.pid_start - 1}))  # its number, anew
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked how it ended
    assert identity.process_start(child.pid) is None
    child.wait()
    assert identity.process_start(child.pid) is None


def test_a_holder_survives_its_document() -> None:
    mine = identity.me("R1", "stage")
    assert identity.holder_of(mine.as_document()) == mine
    assert mine.token != identity.me("R1", "stage").token


@pytest.mark.parametrize(("runs", "word"), [
    ([run("R1", V2, 6)], "resume.is_over"), ([run("R1", V2, 0)], "resume.is_over"),
    ([run("R1", V2, 8, closed="taken back by R2")], "resume.is_over"), ([run("R0", V2, 8)], "resume.no_such_run"),
    ([], "resume.no_such_run")])
def test_a_run_that_is_named_and_over_is_not_begun_anew(runs: list[Known], word: str) -> None:
    with pytest.raises(UsageError) as refused:
        decide(runs, V2, {"gpu-1"}, wanted="R1")
    assert refused.value.code == word


@pytest.mark.parametrize(("others", "intent", "decision"), [
    ([run("R2", PROVISION)], V2, Blocked(run("R2", PROVISION))),
    ([run("R2", V2, 8)], V2, Blocked(run("R2", V2, 8))),
    ([run("R2", PROVISION, hosts=("gpu-9",))], V2, Continue(run("R1", V2, 7))),
    ([run("R2", STAGE)], V2, Continue(run("R1", V2, 7))),
    ([run("R2", V2, 8)], BACK, Continue(run("R1", BACK, 7), (run("R2", V2, 8),))),
])
def test_a_run_that_is_named_waits_for_others_too(others: list[Known], intent: dict[str, Any], decision: object
                                                  ) -> None:
    assert decide([*others, run("R1", intent, 7)], intent, {"gpu-1"}, wanted="R1") == decision


def test_a_rollback_that_goes_on_takes_back_what_it_had_not_yet() -> None:
    update, back = run("R1", V2, 8), run("R2", BACK, 8)
    assert decide([back, update], BACK, {"gpu-1"}) == Continue(back, (update,))


def test_the_same_command_on_more_hosts_runs_into_others() -> None:
    other = run("R2", PROVISION, hosts=("gpu-9",))
    assert decide([other, run("R1", V2, 8)], V2, {"gpu-1", "gpu-9"}) == Blocked(other)
