"""The drill: what is reckoned for a real host and told of it; a lab's cooling, mended whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from guard_kit import POLICY, gpu, hot, instance, seen, slowed
from test_guarding_rows import FLEET

from opsctl.engines.session import Completed
from opsctl.errors import LockedError, OpsctlError, RefusedError, UsageError
from opsctl.fleet.model import Host
from opsctl.guarding import exercise, looking
from opsctl.guarding.replay import replay, usable, with_load, with_pool
from opsctl.guarding.story import Report, Step, Story, report_lines
from opsctl.lab import laboratory
from opsctl.lab import state as lab_state
from opsctl.lab.gpu import faults, trees
from opsctl.lab.gpu.profiles import Gpus

OTHER_SERVES = {"others": 1, "min_serving": 1, "words": ""}
NONE_SERVES = {"others": 0, "min_serving": 1, "words": ""}


def warm(others: dict[str, Any] = OTHER_SERVES, **changes: Any) -> dict[str, Any]:
    """A host under load, 10 °C below its limit."""
    return seen(**{"gpus": [gpu(temperature_c=77.0, margin_c=10.0, memory_margin_c=17.0)],
                   "instances": [instance(pool=others)], **changes})


def reckoned(document: dict[str, Any], factor: float, for_s: float = 60.0) -> tuple[Story, Report]:
    story = replay(document, POLICY, factor, for_s)
    return story, story.report(for_s)


@pytest.mark.parametrize(("factor", "document", "deepest", "stopped"), [
    (1.05, warm(), "normal", ()),
    (1.33, warm(), "slowed", ()),
    (2.0, warm(), "least", ()),
    (2.0, warm(enforcing=False), "least", ()),
    (3.3, warm(), "stop", ("chat.0",)),
    (3.3, warm(NONE_SERVES), "least", ()),  # the last one is never stopped
    (3.3, warm({"others": None, "min_serving": 1, "words": "x"}), "least", ()),  # nor when nobody knows
    (3.3, warm(enforcing=False), "least", ()),  # nor on a host's first day
])
def test_how_deep_it_goes(factor: float, document: dict[str, Any], deepest: str, stopped: tuple[str, ...]) -> None:
    story, report = reckoned(document, factor)
    assert report.deepest == {"chat.0": deepest}
    assert report.stopped == stopped
    assert story.normal or report.latched or report.lost
    assert (report.first_s is None) == (deepest == "normal")


def test_a_guard_that_acts_keeps_the_hardware_out_of_it() -> None:
    acting, observing = reckoned(warm(), 2.0)[1], reckoned(warm(enforcing=False), 2.0)[1]
    assert acting.hardware_s < observing.hardware_s
    assert acting.first_s == observing.first_s


def test_a_total_loss_ends_at_the_hardwares_own_switch() -> None:
    _, report = reckoned(warm(), 8.0)
    assert report.lost == (0,)
    assert report.normal_s is None
    assert any("switched off by the hardware: GPU 0" in line for line in report_lines(report, for_s=60, real=False))


def test_a_step_says_when_what_and_why() -> None:
    story, _ = reckoned(warm(), 1.33)
    first = story.steps[0]
    assert (first.instance, first.word, first.weight) == ("chat.0", "slowed", 30)
    assert first.why.startswith("GPU 0: margin")
    assert first.words.startswith(f"{first.at_s:6.1f} s  chat.0  slowed   weight  30 %, clocks 80 %, "
                                  f"margin {first.margin_c:.0f} °C: GPU 0")


def test_one_hot_gpu_moves_only_its_own_instance() -> None:
    gpus = [gpu(0, temperature_c=77.0, margin_c=10.0), gpu(1, instance="chat.1", temperature_c=30.0, margin_c=57.0)]
    both = seen(gpus=gpus, instances=[instance(), instance(instance="chat.1")])
    assert reckoned(both, 2.0)[1].deepest == {"chat.0": "least", "chat.1": "normal"}


def test_who_else_serves_is_told_where_the_guard_has_not_asked() -> None:
    unasked = warm({"others": None, "min_serving": 1, "words": "the load balancers have not been asked yet"})
    assert reckoned(with_pool(unasked, {"chat": 1}), 3.3)[1].deepest == {"chat.0": "stop"}
    assert reckoned(with_pool(unasked, {"chat": 0}), 3.3)[1].deepest == {"chat.0": "least"}
    assert with_pool(warm(NONE_SERVES), {"chat": 5}) == warm(NONE_SERVES)  # it has asked: that counts


def test_what_a_replay_cannot_use_is_left_out() -> None:
    blind, lost = gpu(0, temperature_c=None), gpu(1, state="lost", margin_c=None)
    assert usable(seen(gpus=[blind, lost])) == []
    assert usable(warm()) == warm()["gpus"]
    assert with_load(warm()) == ""
    assert "under load" in with_load(warm(gpus=[gpu(utilisation_percent=3)]))


def test_the_document_that_goes_in_is_left_as_it_was() -> None:
    document = warm()
    before = json.dumps(document)
    replay(document, POLICY, 3.3, 60.0)
    assert json.dumps(document) == before


def test_a_story_counts_what_it_saw() -> None:
    story = Story()
    burning = hot(0, -3.0, reasons=["hardware thermal slowdown"])
    assert story.see(0.0, seen()) == []
    assert [step.word for step in story.see(2.0, seen(gpus=[hot()], instances=[slowed()]))] == ["slowed"]
    assert story.see(2.5, seen(gpus=[burning], instances=[slowed()])) == []  # nothing moved
    assert not story.normal
    story.see(3.0, seen(gpus=[burning], instances=[slowed(latched=True)]))
    story.see(4.0, seen(setter="no socket"))
    story.see(5.0, seen())
    assert story.normal
    assert story.report(3.5) == Report(2.0, {"chat.0": "slowed"}, 1.5, 0.5, -3.0, 90.0, (), ("chat.0",), (),
                                       "no socket")


def test_the_report_in_words() -> None:
    report = Report(2.04, {"chat.0": "slowed"}, 0.26, 95.2, -1.0, 88.0, (), (), ())
    assert report_lines(report, for_s=60.0, real=True) == [
        "first reaction after 2.0 s", "deepest rung: chat.0 slowed", "least margin -1 °C; hottest 88 °C",
        "in hardware slowdown: about 0.3 s", "back to normal 95 s after the end of 60 s of bad cooling"]
    nothing = dataclasses.replace(report, first_s=None, normal_s=None, setter="no socket")
    assert "setter: no socket: clocks and stops had no effect" in report_lines(nothing, for_s=60.0, real=True)
    assert report_lines(nothing, for_s=60.0, real=True)[0] == "it did not react"
    assert report_lines(nothing, for_s=60.0, real=True)[-1].startswith("not back to normal")


# In a lab


class Said:
    """A session whose host answers these words."""

    host = Host("gpu-1", "10.0.0.11", ("gpu",))

    def __init__(self, **answers: Completed) -> None:
        self._answers = answers

    def run(self, argv: list[str], **_: Any) -> Completed:
        return self._answers[argv[1] if argv[0] != "test" else "test"]


def locks(*found: dict[str, Any]) -> Completed:
    return Completed(0, json.dumps({"locks": list(found)}), "")


@pytest.mark.parametrize(("answer", "kind", "says"), [
    (seen(instances=[slowed()]), RefusedError, "the guard is at work on chat.0"),
    (seen(instances=[instance(latched=True)]), RefusedError, "the guard is at work on chat.0"),
    (seen(instances=[]), RefusedError, "no instance"),
    (seen(words="the guard said nothing for 9 s"), RefusedError, "said nothing"),
    (seen(), LockedError, "run R1 is at work"),
])
def test_when_no_exercise_is_begun(answer: dict[str, Any], kind: type[OpsctlError], says: str) -> None:
    session: Any = Said(locks=locks({"name": "host", "holder": {"run": "R1"}}))
    with pytest.raises(kind, match=says):
        exercise.check(session, answer)
    exercise.check(Said(locks=locks({"name": "service-chat", "holder": {}})), seen())  # type: ignore[arg-type]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> lab_state.Lab:
    """A lab on disk, of one machine with GPUs; no process of it runs, and none is begun."""
    monkeypatch.setattr(lab_state, "STATE_ROOT", tmp_path / "labs")
    monkeypatch.setattr(laboratory.silicon, "start", lambda _: None)
    machine = lab_state.Machine("gpu-1", "10.0.0.11", ("gpu",), gpus=Gpus("H200", 2))
    made = lab_state.Lab("play", 1, "bookworm", IPv4Network("10.9.0.0/24"), FLEET.directory, machines=(machine,))
    lab_state.save(made)
    trees.faults_path(made.place(machine)).parent.mkdir(parents=True)
    return made


def cooling(lab: lab_state.Lab) -> dict[int, float]:
    return faults.load(trees.faults_path(lab.place(lab.machine("gpu-1")))).cooling


def test_only_a_machine_of_a_lab_of_this_computer_is_broken(lab: lab_state.Lab) -> None:
    host = FLEET.host("gpu-1")
    assert exercise.own_lab(FLEET, host) == "play"
    assert exercise.own_lab(FLEET, dataclasses.replace(host, address="10.0.0.99")) == ""
    assert exercise.own_lab(FLEET, FLEET.host("gpu-2")) == ""
    assert exercise.own_lab(dataclasses.replace(FLEET, directory=Path("/another")), host) == ""
    marked: Any = Said(test=Completed(0, "", ""))
    unmarked: Any = Said(test=Completed(1, "", ""))
    assert exercise.lab_of(marked, FLEET) == "play"
    assert exercise.lab_of(unmarked, FLEET) == ""  # a real host that has the name and address of a lab's machine


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), RefusedError("host.unreachable", "x")])
def test_the_cooling_is_worse_inside_and_mended_outside(lab: lab_state.Lab, error: BaseException | None) -> None:
    expected = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with expected, exercise.worse_cooling("play", "gpu-1", None, 2.5):
        assert cooling(lab) == {0: 2.5, 1: 2.5}
        if error:
            raise error
    assert cooling(lab) == {}


def test_only_the_gpu_that_is_meant(lab: lab_state.Lab) -> None:
    with exercise.worse_cooling("play", "gpu-1", 1, 2.0):
        assert cooling(lab) == {1: 2.0}
        laboratory.fault("play", "gpu-1", 0, lambda there, gpus: faults.cool(there, gpus, 3.0))
    assert cooling(lab) == {0: 3.0}  # somebody else's, meanwhile


def test_what_is_broken_already_is_left_alone(lab: lab_state.Lab) -> None:
    laboratory.fault("play", "gpu-1", 0, lambda there, gpus: faults.cool(there, gpus, 1.5))
    with pytest.raises(RefusedError, match="broken already"), exercise.worse_cooling("play", "gpu-1", 1, 2.0):
        pass
    assert cooling(lab) == {0: 1.5}
    laboratory.fault("play", "gpu-1", 0, lambda there, gpus: faults.cool(there, gpus, 1.0))
    with pytest.raises(UsageError, match="has no GPU 7"), exercise.worse_cooling("play", "gpu-1", 7, 2.0):
        pass


HELD = """
import sys, threading
from opsctl.guarding.exercise import when_gone
with when_gone(["touch", sys.argv[1]]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(("number", "undone"), [(signal.SIGKILL, True), (signal.SIGTERM, True), (None, False)])
def test_the_undo_runs_when_whoever_registered_it_is_gone(tmp_path: Path, number: signal.Signals | None, undone: bool
                                                          ) -> None:
    mark = tmp_path / "undone"
    process = subprocess.Popen([sys.executable, "-c", HELD, str(mark)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])})
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert not mark.exists()
    if number is None:
        process.communicate("", timeout=30)
    else:
        process.send_signal(number)
        process.wait(30)
    until = time.monotonic() + (20 if undone else 1)
    while not mark.exists() and time.monotonic() < until:
        threading.Event().wait(0.02)
    assert mark.exists() == undone
    process.stdout.close()


def test_watching_forgives_a_moment_of_silence_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [seen(), OpsctlError("host.timed_out", "x"), seen(instances=[slowed()])]
    now = iter(range(100))
    heard: list[tuple[float, list[Step]]] = []

    def ask(_session: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, OpsctlError):
            raise answer
        return answer
    monkeypatch.setattr(looking, "ask", ask)
    session: Any = None
    exercise.watch(session, Story(), 0.0, lambda _: not answers, lambda at, _, steps: heard.append((at, list(steps))),
                   clock=lambda: float(next(now)), pause=lambda _: None)
    assert [[step.word for step in steps] for _, steps in heard] == [[], ["slowed"]]
    answers += [RefusedError("host.unreachable", "gone"), seen()]
    with pytest.raises(RefusedError):
        exercise.watch(session, Story(), 0.0, lambda _: not answers, lambda *_: None, clock=lambda: float(next(now)),
                       pause=lambda _: None)
