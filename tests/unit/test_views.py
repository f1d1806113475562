"""What a person reads while a run goes on, and how errors leave the process."""

from __future__ import annotations

import io
import json

import pytest
import typer
from rich.console import Console

from opsctl.cli.speak import speaking
from opsctl.cli.views import LiveView, PlainView, choose_view, human_bytes, progress_words
from opsctl.engines.events import Note, PhaseStarted, Progress, RunFinished, RunStarted, TaskResult, TaskStarted
from opsctl.errors import ConfigurationError, ExitCode, RefusedError

EVENTS = [
    RunStarted("provision", "20261122-101500-ab12", ("gpu-1", "gpu-2")),
    PhaseStarted("Preflight"),
    TaskStarted("Check the disk.", "gpu-1"),
    TaskResult("gpu-1", "Check the disk.", "ok"),
    TaskResult("gpu-2", "Install [nginx].", "changed", item="nginx"),
    Progress("chat v1", 40_000_000, 80_000_000, per_second=10_000_000.0, host="gpu-1"),
    Progress("chat v1", 80_000_000, 80_000_000, per_second=10_000_000.0, host="gpu-1"),
    TaskResult("gpu-1", "Start the unit.", "failed", "exit code 1", ("line one", "line two")),
    Note("gpu-2 is behind", "warning"),
    RunFinished(7, changed=1, seconds=12.34),
]


def test_the_plain_log_says_what_changed_and_what_failed() -> None:
    out = io.StringIO()
    view = PlainView(Console(file=out, width=200))
    for event in EVENTS:
        view.show(event)
    lines = [line[9:] if line[2:3] == ":" else line for line in out.getvalue().splitlines()]
    assert lines == [
        "provision: run 20261122-101500-ab12 on gpu-1, gpu-2",
        "== Preflight",
        "gpu-2      changed     Install [nginx]. (nginx)",
        "gpu-1      chat v1: 40.0 MB of 80.0 MB, 50 %, 10.0 MB/s, 4 s left",
        "gpu-1      chat v1: 80.0 MB of 80.0 MB, 100 %, 10.0 MB/s",
        "gpu-1      failed      Start the unit.: exit code 1",
        "           | line one",
        "           | line two",
        "gpu-2 is behind",
        "finished in 12.3 s, 1 changed",
    ]


def test_the_live_table_draws_every_host_and_keeps_failures_on_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    view = choose_view(console)
    assert isinstance(view, LiveView)
    for event in EVENTS[:6]:
        view.show(event)
    drawn = Console(file=io.StringIO(), width=120)
    drawn.print(view._render())
    assert isinstance(drawn.file, io.StringIO)
    table = drawn.file.getvalue()
    assert "gpu-1" in table
    assert "1 changed" in table
    assert "50 %" in table
    for event in EVENTS[6:]:
        view.show(event)
    view.close()
    assert "Start the unit.: exit code 1" in out.getvalue()


@pytest.mark.parametrize(("count", "words"), [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (6.5e11, "650.0 GB"),
                                              (2e12, "2.0 TB")])
def test_bytes_for_people(count: float, words: str) -> None:
    assert human_bytes(count) == words


@pytest.mark.parametrize(("event", "words"), [
    (Progress("x", 12_000_000, 80_000_000, per_second=8e6), "12.0 MB of 80.0 MB, 15 %, 8.0 MB/s, 8 s left"),
    (Progress("x", 100_000_000_000, 200_000_000_000, per_second=1e8),
     "100.0 GB of 200.0 GB, 50 %, 100.0 MB/s, 17 min left"),
    (Progress("x", 0, 1_340_000_000_000, per_second=1e8), "0 B of 1.3 TB, 0 %, 100.0 MB/s, 3 h 43 min left"),
    (Progress("x", 119, 0, "seconds"), "119 s"),
    (Progress("x", 121, 0, "seconds"), "2 min"),
    (Progress("x", 0, 0, "seconds"), "0 s"),
])
def test_progress_says_speed_and_time_left(event: Progress, words: str) -> None:
    assert progress_words(event) == words


def test_what_ended_leaves_the_live_table() -> None:
    view = LiveView(Console(file=io.StringIO(), force_terminal=True, width=120))
    for host in ("gpu-1", "gpu-2"):
        view.show(Progress("stage chat v2: environment", 7, 0, "seconds", host=host))
    view.show(TaskResult("gpu-1", "stage chat v2", "changed"))
    assert [event.host for event in view._progress.values()] == ["gpu-2"]
    view.close()


def test_progress_without_a_total_promises_nothing() -> None:
    assert progress_words(Progress("x", 3, 0, "items")) == "3"


@pytest.mark.parametrize(("error", "code"), [
    (ConfigurationError("a.b", "inventory.ini: x is wrong.", hint="write y"), 3),
    (RefusedError("c.d", "no."), 5),
    (ValueError("boom"), 1),
    (KeyboardInterrupt(), 130),
])
def test_errors_become_exit_codes_and_one_document(error: BaseException, code: int,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, speaking("provision", as_json=True):
        raise error
    assert caught.value.exit_code == code
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["schema"] == "opsctl.provision/v1"
    assert document["exit_code"] == code
    assert "Traceback" not in said.err


def test_a_result_and_talk_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    with speaking("status") as speaker:
        speaker.say("looking")
        speaker.result({"rows": []}, "nothing there")
    said = capsys.readouterr()
    assert said.out == "nothing there\n"
    assert said.err == "looking\n"


def test_a_result_may_carry_an_exit_code() -> None:
    with pytest.raises(typer.Exit) as caught, speaking("verify", as_json=True) as speaker:
        speaker.result({}, "", ExitCode.FOUND_WRONG)
    assert caught.value.exit_code == 9
