"""The gateway's journals of runs: ``/var/lib/opsctl/runs/<run>.ndjson``, fsynced before it is answered for.

Lines are JSON objects, numbered from 0. Who appends says from which, so the same words again after a lost answer add
nothing, and two who both believe that they lead a run do not write over each other. A line that a power cut tore was
never answered for: the next append drops it. Operators' words and messages are in here, so only root reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from opsctl.agent.durable import locked, make_directory, remove_durably, sync_directory
from opsctl.agent.locks import RUN
from opsctl.agent.paths import Paths
from opsctl.errors import ExitCode, LockedError, OpsctlError, RefusedError, UsageError

KEPT = 200
SUFFIX = ".ndjson"
PRIVATE = 0o600
STARTS = ("RunBegan", "RunContinued")
TO_RESUME = (ExitCode.PAUSED, ExitCode.INTERRUPTED)
MARK = b'"Run'  # what every line has that says how a run stands: the others need no reading

Line = dict[str, Any]


def append(paths: Paths, run: str, first: int, body: bytes, keep: int = KEPT) -> int:
    """Adds the lines of ``body``: lines ``first``, ``first`` + 1, ... of the journal; returns how many it has then.

    Those that are there already are left out. One that begins a run sweeps ended runs older than the newest ``keep``.

    Raises:
        UsageError: ``body`` is not one JSON object a line, or ``run`` cannot be one.
        RefusedError: ``run.gap``: lines before ``first`` are missing.
        LockedError: ``run.diverged``: other lines are there: somebody else continues this run.
        OpsctlError: ``run.damaged``: a line in the middle cannot be read.
    """
    path = _file(paths, run)
    given = _given(body)
    with _only_one(paths):
        lines, whole = parse(path.read_bytes(), run) if path.exists() else ([], 0)
        new = added(run, lines, first, given)
        _write(path, whole, b"".join(json.dumps(line).encode() + b"\n" for line in new))
        if new and not lines:
            for name in to_sweep(_names(paths), lambda name: is_ended(summary(paths, name)), keep):
                remove_durably(_file(paths, name))
    return len(lines) + len(new)


def added(run: str, lines: Sequence[Line], first: int, given: Sequence[Line]) -> Sequence[Line]:
    """Those of ``given``, lines from ``first`` on, that ``lines`` do not have. Pure; raises as ``append`` does."""
    if first > len(lines):
        raise RefusedError("run.gap", f"the journal of {run} has {len(lines)} lines: line {first} cannot be next.",
                           hint=f"send from line {len(lines)} on")
    there = lines[first:first + len(given)]
    if list(there) != list(given[:len(there)]):
        raise LockedError("run.diverged", f"the journal of {run} says something else from line {first} on: somebody "
                          "else continues this run.", hint="opsctl runs shows who")
    return given[len(there):]


def parse(content: bytes, run: str) -> tuple[list[Line], int]:
    """The lines, and how many bytes of ``content`` they are, without what a power cut left at the end.

    Raises:
        OpsctlError: ``run.damaged``: one before the last cannot be read.
    """
    texts, whole = _whole(content)
    lines = [_object(text) for text in texts]
    for number, line in enumerate(lines):
        if line is None:
            raise OpsctlError("run.damaged", f"line {number} of the journal of {run} cannot be read.",
                              hint="move its file in /var/lib/opsctl/runs on the gateway away, and look at opsctl "
                              "status before anything else")
    return [line for line in lines if line is not None], whole


def show(paths: Paths, run: str) -> list[Line]:
    """All lines of a journal.

    Raises:
        UsageError: ``run.unknown``: there is none.
        OpsctlError: as ``parse``.
    """
    try:
        return parse(_file(paths, run).read_bytes(), run)[0]
    except FileNotFoundError:
        raise UsageError("run.unknown", f"the gateway has no run {run!r}.", hint="opsctl runs lists them") from None


def all_runs(paths: Paths, limit: int | None = None) -> list[dict[str, Any]]:
    """Summaries, newest first. One whose first line a power cut tore never began."""
    summaries = (summary(paths, name) for name in _names(paths)[:limit])
    return [one for one in summaries if one["began"] is not None]


def summary(paths: Paths, run: str) -> dict[str, Any]:
    """``{"run", "began", "ended", "closed", "lines", "at", "hosts", "argv"}``: how it stands; ``at``: of its last line.

    ``hosts``: of all its starts; ``argv``: of the last one that was for all of them, else of the last one. ``ended``:
    the line that says so, None when somebody continued it since. ``closed``: the same, but that is for good.
    """
    try:
        texts, _ = _whole(_file(paths, run).read_bytes())
    except FileNotFoundError:  # swept just now
        texts = []
    began, last = (_object(texts[at]) if texts else None for at in (0, -1))
    marks = [line for text in texts if MARK in text and (line := _object(text))]
    since = max((at for at, line in enumerate(marks) if line.get("event") in STARTS), default=0)
    ended = [line for line in marks[since:] if line.get("event") == "RunEnded"]
    closed = [line for line in marks if line.get("event") == "RunClosed"]
    return {"run": run, "began": began, "ended": ended[-1] if ended else None, "closed": closed[-1] if closed else None,
            "lines": len(texts), "at": (last or {}).get("t"),
            **extent([line for line in marks if line.get("event") in STARTS])}


def extent(starts: Sequence[Line]) -> dict[str, Any]:
    """The ``hosts`` and ``argv`` of a run that was begun and continued so. Pure."""
    hosts = list(dict.fromkeys(host for line in starts for host in line.get("hosts") or ()))
    whole = [line for line in starts if set(line.get("hosts") or ()) >= set(hosts)] or starts
    return {"hosts": hosts, "argv": whole[-1].get("argv") or [] if whole else []}


def is_ended(summary: Mapping[str, Any]) -> bool:
    """Whether nobody is expected to resume it: closed, or ended with neither 8 nor 130, or never begun. Pure."""
    ended = summary["ended"]
    if summary["began"] is None or summary["closed"] is not None:
        return True
    return ended is not None and ended.get("exit_code") not in TO_RESUME


def to_sweep(names: Sequence[str], ended: Callable[[str], bool], keep: int) -> list[str]:
    """Those of ``names``, newest first, that come after the first ``keep`` and of which ``ended`` says yes. Pure."""
    return [name for name in names[keep:] if ended(name)]


def _given(body: bytes) -> list[Line]:
    lines = [_object(text) for text in body.split(b"\n") if text]
    if any(line is None for line in lines):
        raise UsageError("run.bad_input", "run-append wants one JSON object in each line.")
    return [line for line in lines if line is not None]


def _whole(content: bytes) -> tuple[list[bytes], int]:
    """The lines' texts without a torn end, and how many bytes they are: some filesystems leave zeros where data was."""
    texts = content.split(b"\n")[:-1]
    while texts and _object(texts[-1]) is None:
        texts.pop()
    return texts, sum(len(text) + 1 for text in texts)


def _object(text: bytes) -> Line | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, whole: int, content: bytes) -> None:
    """Puts ``content`` after the first ``whole`` bytes. What could not be made to last is taken off again.

    Lines of before are synced too: their writer may have been killed before it was.
    """
    make_directory(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
    try:
        os.ftruncate(descriptor, whole)
        try:
            os.lseek(descriptor, whole, os.SEEK_SET)
            while content:
                content = content[os.write(descriptor, content):]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, whole)
            raise
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def _file(paths: Paths, run: str) -> Path:
    if not RUN.fullmatch(run):
        raise UsageError("run.bad_name", f"{run!r} is not the name of a run.", hint="opsctl runs lists them")
    return paths.runs / f"{run}{SUFFIX}"


def _names(paths: Paths) -> list[str]:
    """Newest first: names sort by time."""
    return sorted((path.name.removesuffix(SUFFIX) for path in paths.runs.glob(f"*{SUFFIX}")
                   if not path.name.startswith(".")), reverse=True)


def _only_one(paths: Paths) -> AbstractContextManager[bool]:
    return locked(paths.runs / ".lock")
