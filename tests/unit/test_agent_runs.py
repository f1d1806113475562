"""Journals of runs: no line is lost, none is there twice, and which of them are done with."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from machines import Machine

from opsctl.agent import runs
from opsctl.agent.paths import Paths
from opsctl.errors import LockedError, OpsctlError, RefusedError, UsageError

RUN = "20261122-031500-ab12"
BEGAN = {"t": 1.0, "event": "RunBegan", "run": RUN, "verb": "update-model", "by": "ann@laptop"}


def event(t: float, name: str = "HostBegan", **more: Any) -> dict[str, Any]:
    return {"t": t, "event": name, **more}


def ended(t: float, exit_code: int) -> dict[str, Any]:
    return event(t, "RunEnded", exit_code=exit_code, code="", by="ann@laptop")


def body(*lines: object) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@pytest.fixture
def host(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


def file(host: Paths, run: str = RUN) -> Path:
    return host.runs / f"{run}.ndjson"


# Lines.


def test_lines_come_after_each_other_and_only_root_reads_them(host: Paths) -> None:
    assert runs.append(host, RUN, 0, body(BEGAN, event(2))) == 2
    assert runs.append(host, RUN, 2, body(event(3))) == 3
    assert runs.show(host, RUN) == [BEGAN, event(2), event(3)]
    assert file(host).stat().st_mode & 0o777 == 0o600


def test_the_same_again_after_a_lost_answer_adds_nothing(host: Paths) -> None:
    for _ in range(2):
        assert runs.append(host, RUN, 0, body(BEGAN, event(2))) == 2
    assert runs.append(host, RUN, 1, body(event(2), event(3))) == 3
    assert runs.append(host, RUN, 0, b"") == 3
    assert runs.show(host, RUN) == [BEGAN, event(2), event(3)]


def test_a_gap_is_refused_and_says_where_to_go_on(host: Paths) -> None:
    with pytest.raises(RefusedError) as refused:
        runs.append(host, RUN, 1, body(event(2)))
    assert refused.value.code == "run.gap"
    assert not file(host).exists()
    runs.append(host, RUN, 0, body(BEGAN))
    with pytest.raises(RefusedError) as refused:
        runs.append(host, RUN, 2, body(event(3)))
    assert "from line 1 on" in refused.value.hint
    assert runs.show(host, RUN) == [BEGAN]


def test_two_who_continue_the_same_run_do_not_mix(host: Paths) -> None:
    runs.append(host, RUN, 0, body(BEGAN))
    assert runs.append(host, RUN, 1, body(event(2, "RunContinued", by="ann"))) == 2
    with pytest.raises(LockedError) as refused:
        runs.append(host, RUN, 1, body(event(2, "RunContinued", by="bob"), event(3)))
    assert refused.value.code == "run.diverged"
    assert len(runs.show(host, RUN)) == 2


@pytest.mark.parametrize("torn", [b'{"t": 3, "eve', b"{", b"\x00" * 40, b"\x00" * 40 + b"\n", b'{"t"\n'])
def test_a_line_that_a_power_cut_tore_is_dropped_by_the_next(host: Paths, torn: bytes) -> None:
    runs.append(host, RUN, 0, body(BEGAN, event(2)))
    with file(host).open("ab") as journal:
        journal.write(torn)
    assert runs.show(host, RUN) == [BEGAN, event(2)]
    assert runs.summary(host, RUN)["lines"] == 2
    assert runs.append(host, RUN, 2, body(event(3))) == 3
    assert file(host).read_bytes() == body(BEGAN, event(2), event(3))


def test_a_first_line_that_was_torn_is_a_run_that_never_began(host: Paths) -> None:
    host.runs.mkdir(parents=True)
    file(host).write_bytes(body(BEGAN)[:30])
    assert runs.all_runs(host) == []
    assert runs.append(host, RUN, 0, body(BEGAN)) == 1
    assert [one["run"] for one in runs.all_runs(host)] == [RUN]


def test_a_journal_that_is_broken_in_the_middle_is_left_as_it_is(host: Paths) -> None:
    runs.append(host, RUN, 0, body(BEGAN, event(2), event(3)))
    broken = file(host).read_bytes().replace(body(event(2)), b"\x00rot\n")
    file(host).write_bytes(broken)
    for act in (lambda: runs.show(host, RUN), lambda: runs.append(host, RUN, 3, body(event(4)))):
        with pytest.raises(OpsctlError) as refused:
            act()
        assert refused.value.code == "run.damaged"
        assert "line 1 " in refused.value.message
    assert file(host).read_bytes() == broken
    assert runs.all_runs(host)[0]["began"] == BEGAN


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_what_the_disk_did_not_take_is_not_there(host: Paths, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the same again would find its lines and believe that they last."""
    runs.append(host, RUN, 0, body(BEGAN))
    write = os.write

    def full(descriptor: int, content: bytes) -> int:
        return write(descriptor, content[:5]) if len(content) > 60 else ill()

    def ill(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, fails, full if fails == "write" else ill)
        with pytest.raises(OSError, match="No space"):
            runs.append(host, RUN, 1, body(event(2), event(3)))
    assert file(host).read_bytes() == body(BEGAN)
    assert runs.append(host, RUN, 1, body(event(2), event(3))) == 3


def test_lines_whose_writer_was_killed_before_they_were_synced_are_synced_by_the_next(
        host: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    host.runs.mkdir(parents=True)
    file(host).write_bytes(body(BEGAN))
    synced: list[Path] = []
    monkeypatch.setattr(runs.os, "fsync", lambda one: synced.append(Path(f"/proc/self/fd/{one}").readlink()))
    assert runs.append(host, RUN, 0, body(BEGAN)) == 1
    assert file(host) in synced


@pytest.mark.parametrize("given", [b"5\n", b"[]\n", b"{\n", b'{"t": 1}\n{"t"', b"\xff\n"])
def test_what_is_no_line_is_usage(host: Paths, given: bytes) -> None:
    with pytest.raises(UsageError):
        runs.append(host, RUN, 0, given)
    assert not host.runs.exists()


@pytest.mark.parametrize("run", ["", "../x", "a/b", ".x", "x" * 65])
def test_names_that_are_no_runs(host: Paths, run: str) -> None:
    with pytest.raises(UsageError):
        runs.append(host, run, 0, body(BEGAN))


# How runs stand.


CONTINUED = event(5, "RunContinued", by="bob@desk")
CLOSED = event(6, "RunClosed", by="bob@desk", why="lock break")


@pytest.mark.parametrize(("lines", "exit_code", "is_ended"), [
    ([], None, False),
    ([ended(3, 0)], 0, True),
    ([ended(3, 6)], 6, True),
    ([ended(3, 7)], 7, True),
    ([ended(3, 1)], 1, True),
    ([ended(3, 8)], 8, False),
    ([ended(3, 130)], 130, False),
    ([ended(3, 8), CONTINUED], None, False),
    ([ended(3, 7), CONTINUED], None, False),  # who continued it may have died
    ([ended(3, 8), CONTINUED, ended(6, 0)], 0, True),
    ([ended(3, 8), CLOSED], 8, True),
    ([CLOSED], None, True),
    ([ended(3, 8), CLOSED, CONTINUED], None, True),  # whoever did not see that it was closed: for good is for good
    ([event(3, "Drained", message='"RunEnded"')], None, False),
])
def test_how_a_run_stands(host: Paths, lines: list[dict[str, Any]], exit_code: int | None, is_ended: bool) -> None:
    runs.append(host, RUN, 0, body(BEGAN, event(2), *lines))
    (found,) = runs.all_runs(host)
    assert (found["ended"] and found["ended"]["exit_code"]) == exit_code
    assert runs.is_ended(found) == is_ended
    assert (found["run"], found["began"], found["lines"]) == (RUN, BEGAN, 2 + len(lines))
    assert found["at"] == (lines or [event(2)])[-1]["t"]


def test_runs_are_told_newest_first(host: Paths) -> None:
    for name in ("20261122-03", "20261121-09", "20261122-01"):
        runs.append(host, name, 0, body({**BEGAN, "run": name}))
    assert [one["run"] for one in runs.all_runs(host)] == ["20261122-03", "20261122-01", "20261121-09"]
    assert [one["run"] for one in runs.all_runs(host, 1)] == ["20261122-03"]


def test_a_new_run_sweeps_old_ones_that_have_ended(host: Paths) -> None:
    for name, end in (("r1", 0), ("r2", 8), ("r3", None), ("r4", 0), ("r5", 0)):
        runs.append(host, name, 0, body(BEGAN, *([] if end is None else [ended(2, end)])))
    runs.append(host, "r5", 2, body(event(9)), keep=1)  # begins none
    assert len(runs.all_runs(host)) == 5
    runs.append(host, "r6", 0, body(BEGAN), keep=2)
    assert [one["run"] for one in runs.all_runs(host)] == ["r6", "r5", "r3", "r2"]


# The verbs.


def test_a_run_over_the_verbs(host: Paths) -> None:
    def says(*words: str, stdin: bytes = b"") -> tuple[int, dict[str, Any]]:
        done = Machine(host, "gw").run(["opsctl-host", *words], stdin=stdin)
        return done.returncode, json.loads(done.stdout)
    assert says("runs") == (0, {"runs": []})
    assert says("run-append", "--run", RUN, "--from", "0", stdin=body(BEGAN)) == (0, {"lines": 1})
    code, answer = says("run-append", "--run", RUN, "--from", "5", stdin=body(event(2)))
    assert (code, answer["error"]["code"]) == (5, "run.gap")
    assert says("run-append", "--run", RUN, "--from", "1", stdin=body(ended(2, 8))) == (0, {"lines": 2})
    assert says("run-show", "--run", RUN) == (0, {"run": RUN, "lines": [BEGAN, ended(2, 8)]})
    (found,) = says("runs", "--limit", "5")[1]["runs"]
    assert found == {"run": RUN, "began": BEGAN, "ended": ended(2, 8), "closed": None, "lines": 2, "at": 2,
                     "hosts": BEGAN.get("hosts", []), "argv": BEGAN.get("argv", [])}
    code, answer = says("run-show", "--run", "nothing")
    assert (code, answer["error"]["code"]) == (2, "run.unknown")
