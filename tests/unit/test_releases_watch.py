"""Watching a job: what is told on the way, how it ends, and a host that cannot be heard for a while."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from opsctl.engines.events import Event, Progress
from opsctl.engines.session import Completed
from opsctl.errors import ExitCode, OpsctlError, RolledBackError
from opsctl.releases import watch as watching
from opsctl.releases.remote import HOST_PROGRAM
from opsctl.releases.watch import Speed, watch

LOOK = ["stage-status", "--service", "chat", "--release", "v2-0123456789ab"]
DONE = {"state": "done", "result": {"changed": True}}


def running(phase: str, done: int = 0, total: int = 0) -> dict[str, Any]:
    return {"state": "running", "phase": phase, "done": done, "total": total}


@dataclass
class Job:
    """A session with a host whose job says one status after the other; an exception is raised."""

    says: list[Any]
    host: Any = field(default_factory=lambda: SimpleNamespace(name="gpu-1"))
    asked: list[Sequence[str]] = field(default_factory=list)

    def run(self, argv: Sequence[str], **_: Any) -> Completed:
        self.asked.append(argv)
        said = self.says.pop(0)
        if isinstance(said, OpsctlError):
            raise said
        return Completed(0, json.dumps(said), "")


def watched(*says: Any, seconds: float = 2.0) -> tuple[Any, list[Progress], Job]:
    """The result, the progress told, and the job; its first status is the first of ``says``."""
    seen: list[Event] = []
    job = Job(list(says[1:]))
    result = watch(job, LOOK, "stage chat v2", seen.append, first=says[0],  # type: ignore[arg-type]
                   clock=ticking(seconds))
    return result, [event for event in seen if isinstance(event, Progress)], job


def ticking(seconds: float) -> Callable[[], float]:
    ticks = itertools.count()
    return lambda: next(ticks) * seconds


def test_a_job_that_is_done_already_is_not_asked() -> None:
    result, told, job = watched(DONE)
    assert (result, told, job.asked) == ({"changed": True}, [], [])


def test_bytes_and_phases_are_told() -> None:
    result, told, job = watched(running(""), running("fetch", 40, 100), running("fetch", 60, 100),
                                running("environment"), DONE)
    assert result == {"changed": True}
    assert [(one.subject, one.unit, one.done, one.total) for one in told] == [
        ("stage chat v2: starting", "seconds", 2, 0),
        ("stage chat v2", "bytes", 40, 100),
        ("stage chat v2", "bytes", 60, 100),
        ("stage chat v2", "bytes", 100, 100),
        ("stage chat v2: environment", "seconds", 8, 0)]
    assert [one.per_second for one in told[1:3]] == [0.0, 10.0]
    assert {one.host for one in told} == {"gpu-1"}
    assert job.asked == [[HOST_PROGRAM, *LOOK, "--wait-s", "2.0"]] * 4


def test_bytes_that_came_between_two_questions_are_told_before_the_end() -> None:
    _, told, _ = watched(running("fetch", 40, 100), DONE)
    assert (told[-1].done, told[-1].total) == (100, 100)


def test_a_job_that_failed_raises_its_own_error() -> None:
    error = {"code": "gate.unhealthy", "message": "no answer.", "hint": "look", "log_tail": ["x"], "exit_code": 6}
    with pytest.raises(RolledBackError) as caught:
        watched(running("gate"), {"state": "failed", "error": error})
    assert caught.value.message == "gpu-1: no answer."
    assert caught.value.as_document() == {**{key: error[key] for key in ("code", "hint", "log_tail")},
                                          "message": "gpu-1: no answer."}
    assert caught.value.exit_code is ExitCode.ROLLED_BACK


def test_a_host_that_booted_meanwhile_knows_nothing_of_the_job() -> None:
    with pytest.raises(OpsctlError) as caught:
        watched(running("fetch", 1, 2), {"state": "none", "phase": "", "done": 0, "total": 0})
    assert caught.value.code == "job.lost"
    assert "same command again" in caught.value.hint


@pytest.mark.parametrize(("silences", "code", "heard"), [
    (0, "", True), (4, "host.unreachable", True), (5, "host.unreachable", False), (1, "host.foreign_key", False)])
def test_a_host_that_is_not_heard_is_asked_again_for_a_while(
        silences: int, code: str, heard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(watching, "pause", pauses.append)
    says = [running("fetch", 1, 2), *[OpsctlError(code, "silence.")] * silences, DONE]
    if heard:
        assert watched(*says)[0] == {"changed": True}
        assert pauses == list(watching.RETRY_S)[:silences]
    else:
        with pytest.raises(OpsctlError) as caught:
            watched(*says)
        assert caught.value.code == code


@pytest.mark.parametrize(("seen", "speeds"), [
    ([(0, 500), (1, 600), (2, 700)], [0, 100, 100]),
    ([(0, 0), (4, 500), (10, 500), (14, 500), (16, 500)], [0, 125, 50, 0, 0]),  # it stands still
    ([(0, 0), (8, 800), (16, 8800), (24, 16800)], [0, 100, 550, 1000]),  # a slow start is forgotten
    ([(0, 500), (2, 300), (4, 400)], [0, 0, 0]),  # a copy rotted: it is brought again
    ([(3, 5), (3, 9)], [0, 0]),
])
def test_speed_is_that_of_the_last_seconds(seen: list[tuple[float, int]], speeds: list[float]) -> None:
    speed = Speed(10.0)
    assert [speed.per_second(now, done) for now, done in seen] == speeds
