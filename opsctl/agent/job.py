"""Long work as a named transient unit, which outlives whoever asked for it.

``start`` runs ``opsctl-host`` again inside the unit; the worker keeps a status file under ``/run/opsctl/jobs``; anybody
may look at it, at any time. Nothing is piped: a pipe dies with its reader, and so would the work.

A job is its name and its verb. One name runs one verb at a time; who wants another one waits, and nobody gets the
result of another verb for that of his own. What a worker is told ``besides`` is no part of that: who wants the same
with other words there watches the one that runs.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opsctl.agent import systemd
from opsctl.agent.durable import locked, make_directory, write_atomically
from opsctl.agent.paths import Paths
from opsctl.agent.systemd import Run
from opsctl.errors import LockedError, OpsctlError

POLL_S = 0.2
SCHEMA = "opsctl.job/v1"
GENTLY = ("Nice=10",)  # work that has time


def worker_arguments(verb: Sequence[str]) -> list[str]:
    """``opsctl-host VERB`` by the interpreter that runs now."""
    return [sys.executable, "-I", "-m", "opsctl.agent.host", *verb]


def description(verb: Sequence[str]) -> str:
    """What the unit is called; systemd keeps it for as long as the unit runs, so it says which verb that is."""
    return f"opsctl {' '.join(verb)}"


def run_arguments(name: str, verb: Sequence[str], properties: Sequence[str] = GENTLY, besides: Sequence[str] = ()
                  ) -> list[str]:
    """A unit that stays for as long as it works, and leaves its name free even when it fails."""
    return ["systemd-run", "--quiet", "--collect", f"--unit={name}.service", f"--description={description(verb)}",
            "--service-type=exec", "--property=UMask=0022", *(f"--property={one}" for one in properties), "--",
            *worker_arguments([*verb, *besides])]


def undone_by(verb: Sequence[str], timeout_s: float) -> tuple[str, ...]:
    """Unit properties: systemd runs ``opsctl-host VERB`` when the worker has ended, however that was, for so long."""
    return (f"ExecStopPost={shlex.join(worker_arguments(verb))}", f"TimeoutStopSec={timeout_s:.0f}")


def start(paths: Paths, name: str, verb: Sequence[str], run: Run = systemd.run, properties: Sequence[str] = GENTLY,
          besides: Sequence[str] = ()) -> bool:
    """Starts the job ``name``, or finds it running; True when it was started now. ``properties``: of its unit.

    ``besides``: what its worker gets after ``verb``; one that runs with other words there is found all the same.

    Raises:
        LockedError: it runs for another verb.
        OpsctlError: systemd would not.
    """
    make_directory(paths.jobs)
    with locked(paths.jobs / f"{name}.lock"):
        unit = _unit(name, run)
        if unit.busy:
            if unit.description != description(verb):
                raise _other(name, unit.description)
            return False
        _status_file(paths, name).unlink(missing_ok=True)
        done = run(run_arguments(name, verb, properties, besides))
        if done.returncode:
            raise OpsctlError("job.not_started", f"systemd did not start {name}: {done.stderr.strip()}.",
                              hint="systemctl status", log_tail=done.stderr.splitlines())
        return True


def look(paths: Paths, name: str, run: Run = systemd.run) -> dict[str, Any]:
    """The job's status document. ``state``: ``none``, ``running``, ``done`` (``result``), ``failed`` (``error``)."""
    busy = _unit(name, run).busy  # asked first: a worker writes its result before its unit ends
    status = _read(_status_file(paths, name))
    if busy:
        return {**(status or _document(name)), "state": "running"}
    if status is None:
        return {**_document(name), "state": "none"}
    if status["state"] == "running":
        error = OpsctlError("job.died", f"{name} ended without a result.", hint=f"journalctl -u {name}",
                            log_tail=systemd.log_tail(f"{name}.service", run=run))
        return {**status, "state": "failed", "error": _error(error)}
    return status


def wait(paths: Paths, name: str, verb: Sequence[str] | None, timeout_s: float,
         heard: Callable[[dict[str, Any]], None], run: Run = systemd.run, clock: Callable[[], float] = time.monotonic,
         pause: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Watches until the job is no longer running or ``timeout_s`` is over; ``heard`` gets every change.

    ``verb``: only the status of one that begins like this; None: whichever the job ran last.

    Raises:
        LockedError: the job runs, or ran, another verb.
    """
    deadline = clock() + timeout_s
    last: dict[str, Any] = {}
    while True:
        status = look(paths, name, run)
        if verb is not None and status["verb"] and status["verb"][:len(verb)] != list(verb):
            raise _other(name, description(status["verb"]))
        if status != last:
            heard(status)
            last = status
        if status["state"] != "running" or clock() >= deadline:
            return status
        pause(POLL_S)


def close(paths: Paths, name: str, error: OpsctlError) -> None:
    """Says how a job ended whose worker cannot, or whose own word is not the last."""
    status = {**(_read(_status_file(paths, name)) or _document(name)), "state": "failed"}
    write_atomically(_status_file(paths, name), json.dumps({**status, "error": _error(error)}))


def last_word(paths: Paths, name: str) -> dict[str, Any]:
    """What the worker wrote last, whether or not it still runs."""
    return _read(_status_file(paths, name)) or {**_document(name), "state": "none"}


class Reporter:
    """The worker's end: writes the status file."""

    def __init__(self, paths: Paths, name: str, verb: Sequence[str] = ()) -> None:
        self._path = _status_file(paths, name)
        self._status = {**_document(name), "verb": list(verb)}
        make_directory(paths.jobs)
        self._write()

    def doing(self, phase: str) -> None:
        self._status.update(phase=phase)
        self._write()

    def progress(self, done: int, total: int) -> None:
        """Bytes."""
        self._status.update(done=done, total=total)
        self._write()

    def finished(self, result: dict[str, Any]) -> None:
        self._status.update(state="done", result=result)
        self._write()

    def failed(self, error: OpsctlError) -> None:
        self._status.update(state="failed", error=_error(error))
        self._write()

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(self._status).encode())


def _document(name: str) -> dict[str, Any]:
    return {"schema": SCHEMA, "job": name, "verb": [], "state": "running", "phase": "", "done": 0,
            "total": 0}


def _error(error: OpsctlError) -> dict[str, Any]:
    return {**error.as_document(), "exit_code": int(error.exit_code)}


def _other(name: str, what: str) -> LockedError:
    return LockedError("job.other", f"{name} is taken: it is the job of {what!r}.",
                       hint=f"journalctl -u {name} shows how far that is; when it has ended, the same again")


def _status_file(paths: Paths, name: str) -> Path:
    return paths.jobs / f"{name}.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        status: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return {"verb": [], **status}


def _unit(name: str, run: Run) -> systemd.Unit:
    unit = f"{name}.service"
    return systemd.show([unit], run)[unit]
