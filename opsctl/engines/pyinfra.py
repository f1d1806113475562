"""pyinfra as an engine: a run in a worker process of its own, its results as plain data.

``gather`` asks hosts, ``carry_out`` orders; both answer host by host, and what fails on one is its answer. pyinfra and
gevent live in the worker alone: one patches the whole process, the other can do one run in a process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from opsctl.engines.child import die_with_parent, stop_group
from opsctl.engines.events import Emit, TaskStarted
from opsctl.engines.pyinfra_job import EVENTS_FD, Job, Order, write_job
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.ssh_config import private_directory
from opsctl.releases.remote import error_of

__all__ = ["HostFacts", "Order", "Worker", "carry_out", "gather"]

SILENCE_S = 300.0  # a fact and a command may take a minute each, and connecting through two jumps another
FAREWELL_S = 2.0
CHUNK = 1 << 16

Key = tuple[str, str, str]
Document = Mapping[str, Any]


@dataclass(frozen=True)
class HostFacts:
    """What a host said: its ``state`` document, and stage plans by service and release."""

    state: Document
    stage_plans: Mapping[tuple[str, str], Document] = field(default_factory=dict)


class Worker:
    """The worker process: started ahead of need, it has its imports done when the job comes.

    One process does one job; ``prepare`` makes the next one ready. For one thread at a time, and that thread must live
    as long as the process: a worker dies with the thread that started it.
    """

    def __init__(self) -> None:
        self._process: _Process | None = None

    def prepare(self) -> None:
        """Starts a process unless one is waiting already. Returns at once."""
        if self._process is not None and self._process.waits():
            return
        self.close()
        self._process = _Process()

    def run(self, job: Job) -> Iterator[dict[str, Any]]:
        """The events of a job, as the worker tells them; the last is ``end``, or ``stopped`` when it ended before."""
        self.prepare()
        process, self._process = self._process, None
        if process is None:
            raise AssertionError("prepare() made it")
        with process.closing():
            yield from process.work(write_job(job), job.fleet.directory / ".opsctl" / "pyinfra.log")

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with process.closing():
                pass

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def gather(fleet: Fleet, hosts: Sequence[Host], *, plans: Sequence[tuple[str, str]] = (),
           worker: Worker | None = None) -> dict[str, HostFacts | OpsctlError]:
    """Asks each host for its state and for stage plans of ``plans`` (service, release), all hosts at once.

    A host that cannot be asked, or that answers one of it with an error, has that error as its answer.
    """
    states: dict[str, Document] = {}
    stage_plans: dict[str, dict[tuple[str, str], Document]] = {host.name: {} for host in hosts}
    errors: dict[str, OpsctlError] = {}
    names = tuple(host.name for host in hosts)
    for event in _run(Job(fleet, names, plans=tuple(plans)), worker):
        match event:
            case {"event": "document", "host": name, "plan": [service, release], "document": document}:
                stage_plans[name][service, release] = document
            case {"event": "document", "host": name, "document": document}:
                states[name] = document
            case {"event": "error", "host": name, "error": error}:
                errors[name] = error_of(error, int(error["exit_code"]))
            case {"event": "stopped", "why": why, "log_tail": tail}:
                for name in names:
                    if name not in states or len(stage_plans[name]) < len(set(plans)):
                        errors.setdefault(name, _stopped(f"{name}: {why} before the host was asked.", tail))
    return {name: errors[name] if name in errors else HostFacts(states[name], stage_plans[name]) for name in names}


def carry_out(fleet: Fleet, orders: Sequence[Order], emit: Emit, *, worker: Worker | None = None
              ) -> dict[Key, Document | OpsctlError]:
    """Begins what is ordered on all hosts at once; the orders of one host one after the other, until one fails.

    The answer to an order, by its ``key``: the job's first status document, for gc what was removed, or an error. An
    order that has nothing to do is answered as done, with ``changed`` false.
    """
    answers: dict[Key, Document | OpsctlError] = {}
    unconnected: dict[str, OpsctlError] = {}
    why = ""
    tail: Sequence[str] = ()
    hosts = tuple(dict.fromkeys(order.host for order in orders))
    for event in _run(Job(fleet, hosts, orders=tuple(orders)), worker):
        match event:
            case {"event": "begins", "order": number}:
                emit(TaskStarted(" ".join(orders[number].key[1:]), orders[number].host))
            case {"event": "document", "order": number, "document": document}:
                answers[orders[number].key] = document
            case {"event": "nothing", "order": number}:
                answers[orders[number].key] = nothing_to_do(orders[number])
            case {"event": "error", "order": number, "error": error}:
                answers[orders[number].key] = error_of(error, int(error["exit_code"]))
            case {"event": "error", "host": name, "error": error}:
                unconnected[name] = error_of(error, int(error["exit_code"]))
            case {"event": "stopped", "why": why, "log_tail": tail}:
                continue
    for order in orders:
        if order.key not in answers:
            answers[order.key] = unconnected.get(order.host) or _unheard(order, answers, why, tail)
    return answers


def nothing_to_do(order: Order) -> Document:
    """The answer to an order whose facts say that all of it is done. Pure."""
    if order.operation == "gc":
        return {"changed": False, "removed": [], "engines": [], "bytes": 0}
    about = {name: order.arguments[name] for name in ("instance", "release") if name in order.arguments}
    return {"state": "done", "result": {"changed": False, **about}}


def _unheard(order: Order, answers: Mapping[Key, Document | OpsctlError], why: str, tail: Sequence[str]) -> OpsctlError:
    """Of an order without an answer: one before it failed on this host, or the worker ended."""
    what = f"{order.operation} of {order.key[2]}"
    for key, answer in answers.items():
        if key[0] == order.host and isinstance(answer, OpsctlError):
            return RefusedError("order.not_begun", f"{order.host}: {what} was not begun, because {key[1]} of {key[2]} "
                                f"failed ({answer.code}).", hint=answer.hint)
    return _stopped(f"{order.host}: {why or 'the pyinfra worker ended'} before it said whether {what} began.", tail)


def _stopped(message: str, tail: Sequence[str]) -> OpsctlError:
    return OpsctlError("pyinfra.stopped", message, hint="the same command again finds what began", log_tail=tail)


def _run(job: Job, worker: Worker | None) -> Iterator[dict[str, Any]]:
    if not job.chosen:
        return
    if worker is not None:
        yield from worker.run(job)
        return
    with Worker() as own:
        yield from own.run(job)


class _Process:
    """One worker process, from its start to its end."""

    def __init__(self) -> None:
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by closing()
        self._events, write_fd = os.pipe()
        try:
            # -P: a file named json.py in the fleet's folder is no module of ours
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "opsctl.engines.pyinfra_worker"], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=self._said, pass_fds=(write_fd,), start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call, no allocation
                env={**os.environ, EVENTS_FD: str(write_fd)})
        finally:
            os.close(write_fd)

    def waits(self) -> bool:
        return self._process.poll() is None

    def work(self, line: str, log: Path) -> Iterator[dict[str, Any]]:
        """Hands over the job; its events. Ends with ``stopped`` when the worker did not tell its ``end``.

        All that such a worker said goes to ``log``, for whoever looks for the mistake in it.
        """
        if self._process.stdin is None:
            raise AssertionError("the process was started with a pipe")
        with suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(line.encode())
        ended = False
        for text in self._lines():
            event: dict[str, Any] = json.loads(text)
            ended = event["event"] == "end"
            yield event
        if not ended:
            yield {"event": "stopped", **self._last_words(log)}

    def _lines(self) -> Iterator[bytes]:
        """Whole lines until the worker closes its end, or says nothing for too long; a line cut short is none."""
        poll = select.poll()
        poll.register(self._events, select.POLLIN)
        rest = b""
        while poll.poll(SILENCE_S * 1000):
            data = os.read(self._events, CHUNK)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines

    def _last_words(self, log: Path) -> dict[str, Any]:
        """Why it ended, and the last line that it said; the lines above that are a traceback's."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(FAREWELL_S)
        stop_group(self._process, signal.SIGTERM)
        self._said.seek(0)
        said = self._said.read()
        private_directory(log.parent)
        log.write_bytes(said)
        return {"why": f"the pyinfra worker ended ({_ending(self._process.returncode)})",
                "log_tail": said.decode("utf-8", "replace").strip().splitlines()[-1:]}

    @contextmanager
    def closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            stop_group(self._process, signal.SIGTERM)
            if self._process.stdin is not None:
                with suppress(BrokenPipeError):
                    self._process.stdin.close()
            os.close(self._events)
            self._said.close()


def _ending(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
