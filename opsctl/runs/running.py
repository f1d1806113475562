"""``running`` is around everything that a verb does to hosts: holds, locks, continue or not, journal, and how it ended.

>>> with running(Task(fleet, "update-model", hosts, intent, services=("chat",)), speaker.emit) as work:
...     update_model(request, work.run, work.emit)

A run that is continued keeps its name: its drains and cutovers are owned by ``run:NAME`` and are found again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opsctl.engines.events import Emit, Event, Note, PhaseStarted, Progress, RunStarted, TaskStarted, as_document
from opsctl.engines.session import Session
from opsctl.errors import ExitCode, LockedError, OpsctlError
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.placements import gateway as gateway_of
from opsctl.releases.books import SILENT
from opsctl.releases.remote import ask
from opsctl.runs import Declined, busy, holding, judge, leftovers
from opsctl.runs.holding import Hold
from opsctl.runs.identity import Holder, me
from opsctl.runs.journal import DIVERGED, NOT_YET, Journal, Run, make_directory, new_name, nothing
from opsctl.runs.judge import Begin, Blocked, Continue, Known
from opsctl.runs.locking import LOST, Locks

PROVISION, ROLLBACK, STAGE = "provision", judge.ROLLBACK, judge.STAGE
WAITS_FOR: Mapping[str, tuple[str, ...]] = {
    PROVISION: ("dpkg", "ansible", "driver", "cutover"), judge.UPDATE: ("ansible", "driver", "cutover"),
    ROLLBACK: ("ansible", "driver", "cutover"), "upgrade-driver": ("dpkg", "ansible", "driver", "cutover")}
DECLINED = "declined"


@dataclass(frozen=True)
class Task:
    """What is to be run. ``intent``: what makes a command the same, with its ``verb``; ``argv``: how to type it again.

    ``hosts`` are those that will be touched, ``services`` those whose locks are taken, ``limit`` the operator's
    pattern. ``wanted`` is the run to continue, when ``opsctl resume`` says it.
    """

    fleet: Fleet
    hosts: tuple[Host, ...]
    intent: Mapping[str, Any]
    services: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    limit: str = ""
    wanted: str = ""

    @property
    def verb(self) -> str:
        return str(self.intent["verb"])


@dataclass(frozen=True)
class Work:
    """A run that may begin: ``hosts`` without those on hold."""

    run: Run
    emit: Emit
    hosts: tuple[Host, ...]
    held: Mapping[str, Hold]


@contextmanager
def running(task: Task, listener: Emit) -> Iterator[Work]:
    """Holds, locks, journal; yields what a verb works with, and writes down how that ended.

    Raises:
        LockedError: ``host.on_hold``, ``lock.held``, ``run.unfinished``.
        UsageError: ``resume.is_over``, ``resume.no_such_run``: so is what was to be continued.
        RefusedError: the gateway does not answer.
        PausedError: ``host.busy``.
    """
    emit = _Emit(listener)
    hosts, held = holding.leave_out(task.hosts, holding.read(task.fleet, task.hosts), task.limit)
    name = new_name()
    holder = me(name, task.verb)
    locks = _locks(task, hosts, holder, emit)
    locks.take()
    try:
        runs = read_runs(task.fleet, optional=task.verb in (PROVISION, ROLLBACK, STAGE))
        decision = judge.decide(runs, task.intent, {host.name for host in hosts}, wanted=task.wanted)
        if isinstance(decision, Blocked):
            raise judge.blocked(decision.run, utc(decision.run.began))
        if isinstance(decision, Continue):
            name = decision.run.run
            locks.rename(name)
        with _journal(task, hosts, name, decision, holder, locks, emit) as run:
            holding.show(held, emit)
            busy.wait_until_idle(locks, WAITS_FOR.get(task.verb, ("ansible",)), emit, run.check)
            yield Work(run, emit, hosts, held)
    finally:
        locks.drop()


def read_runs(fleet: Fleet, *, optional: bool = False, limit: int = 0) -> tuple[Known, ...]:
    """The gateway's runs, newest first. ``optional``: none, when it does not answer or has no agent.

    What it missed of them, and lies here, is sent to it before.

    Raises:
        OpsctlError: what the gateway says.
    """
    gateway = gateway_of(fleet)
    try:
        with Session(fleet, gateway) as session:
            def read() -> tuple[Known, ...]:
                more = ["--limit", str(limit)] if limit else []
                return judge.known(ask(session, ["runs", *more], host=gateway.name))

            runs = read()
            late = leftovers.send(fleet, session, runs, gateway.name)
            if late:
                _take_back(fleet, judge.taken_back(read(), late))
            return read() if late else runs
    except OpsctlError as error:
        if optional and error.code in (*SILENT, *NOT_YET):
            return ()
        raise


def is_unfinished(fleet: Fleet, intent: Mapping[str, Any]) -> bool:
    """Whether a run that wanted the same did not end; a gateway that does not answer knows of none."""
    return any(run.unfinished and run.intent == intent for run in read_runs(fleet, optional=True))


def close_run(fleet: Fleet, run: Known, why: str, by: str) -> None:
    """Nobody is to resume it any more.

    Raises:
        LockedError: ``run.diverged``: somebody wrote to it meanwhile.
        OpsctlError: the gateway does not answer.
    """
    gateway = gateway_of(fleet)
    line = Journal.line({"event": "RunClosed", "by": by, "why": why})
    with Session(fleet, gateway) as session:
        ask(session, ["run-append", "--run", run.run, "--from", str(run.lines)], host=gateway.name, stdin=line.encode())


def _take_back(fleet: Fleet, pairs: Sequence[tuple[Known, Known]]) -> None:
    """Closes updates whose rollback was over before the gateway answered again."""
    for run, rollback in pairs:
        with contextlib.suppress(OpsctlError):  # somebody goes on with it, or the gateway is away again
            close_run(fleet, run, f"taken back by {rollback.run}", rollback.by)


def utc(seconds: float) -> str:
    """``2026-11-22 03:15 UTC``."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


@contextmanager
def _journal(task: Task, hosts: Sequence[Host], name: str, decision: Begin | Continue, holder: Holder, locks: Locks,
             emit: _Emit) -> Iterator[Run]:
    """The run with its journal begun; its last line says how it ended, whatever happens."""
    journal = Journal(task.fleet, name, emit, decision.run.lines if isinstance(decision, Continue) else 0)
    closer = _Closer(task.fleet, decision, holder, name, emit)

    staging = task.verb == STAGE

    def safe() -> bool:
        """What every phase waits for: locked, and written down. Whether the gateway has it."""
        locks.check()
        if staging:
            _gather(journal)
            return False
        return journal.sync()

    def about_to() -> None:
        if safe():
            closer.close()

    run = Run(name, make_directory(task.fleet.directory, name), locks.check, about_to)
    locks.meanwhile = lambda: _gather(journal)
    code, word = int(ExitCode.UNEXPECTED), ""
    try:
        journal.write(_first_line(task, hosts, name, decision, holder))
        journal.sync(at_once=True)
        emit.keep(journal, safe, locks.known)  # a phase that only looks may be refused yet: it closes nothing
        emit(RunStarted(task.verb, name, tuple(host.name for host in hosts)))
        if isinstance(decision, Continue):
            emit(Note(f"continues run {name} of {decision.run.by}, begun {utc(decision.run.began)}"))
        yield run
        code = int(ExitCode.DONE)
        closer.close()
        rest = judge.not_covered(decision, {host.name for host in task.hosts}, {host.name for host in task.fleet.hosts})
        if rest:
            code = int(ExitCode.PAUSED)
            emit(Note(f"run {name} is not over: it is for {', '.join(rest)} too; opsctl resume {name}", "warning"))
    except OpsctlError as error:
        code, word = int(error.exit_code), error.code
        raise
    except Declined:
        code, word = int(ExitCode.INTERRUPTED), DECLINED
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        code, word = int(ExitCode.INTERRUPTED), "interrupted"
        raise
    finally:
        emit.keep(None, None)
        declined = word == DECLINED
        _end(journal, judge.ends_as(decision, code, declined=declined), word, holder,
             closes=declined and isinstance(decision, Begin))


def _end(journal: Journal, code: int, word: str, holder: Holder, *, closes: bool) -> None:
    """The last line. One who lost the lock writes it here only: on the gateway the run may be somebody else's now."""
    try:
        journal.write({"event": "RunEnded", "exit_code": code, "code": word, "by": holder.who})
        if closes:
            journal.write({"event": "RunClosed", "by": holder.who, "why": DECLINED})
        if word not in (LOST, DIVERGED):
            journal.sync(at_once=True)
    except LockedError:  # somebody closed it: that is said there already
        return
    finally:
        journal.close()


def _gather(journal: Journal) -> None:
    try:
        journal.sync()
    except LockedError:  # the next act hears it
        return


def _first_line(task: Task, hosts: Sequence[Host], name: str, decision: Begin | Continue, holder: Holder
                ) -> dict[str, Any]:
    who = {key: value for key, value in holder.as_document().items() if key != "token"}
    names = [host.name for host in hosts]
    about = {"run": name, "verb": task.verb, "argv": list(task.argv), "hosts": names, "by": holder.who, "holder": who}
    if isinstance(decision, Continue):
        return {"event": "RunContinued", "line": decision.run.lines, **about}
    return {"event": "RunBegan", **about, "intent": dict(task.intent), "service": str(task.intent.get("service", ""))}


def _locks(task: Task, hosts: Sequence[Host], holder: Holder, emit: Emit) -> Locks:
    """A stage needs none: it changes nothing that serves, and the hosts know which one they are at."""
    staging = task.verb == STAGE
    return Locks(task.fleet, () if staging else hosts, () if staging else task.services, holder, emit,
                 allow_bare=task.verb == PROVISION, gateway_optional=task.verb == ROLLBACK)


class _Closer:
    """Closes the runs that this one takes back when it is about to act, not before: it may be refused yet.

    One that could not be closed is tried again before the next act, and at the end when all went well. A stage closes
    those that were cut off when it has done the same; one that is at work all the same goes on.
    """

    def __init__(self, fleet: Fleet, decision: Begin | Continue, holder: Holder, run: str, emit: Emit) -> None:
        self._fleet = fleet
        self._runs = decision.closes
        self._why = f"{'done' if holder.verb == STAGE else 'taken back'} by {run}"
        self._by = holder.who
        self._emit = emit
        self._told: set[str] = set()

    def close(self) -> None:
        self._runs = tuple(run for run in self._runs if not self._close(run))

    def _close(self, run: Known) -> bool:
        """Whether there is nothing left to try: also where somebody else goes on with it."""
        try:
            close_run(self._fleet, run, self._why, self._by)
        except OpsctlError as error:
            if run.run not in self._told:
                self._emit(Note(f"run {run.run} could not be closed: {error.message}", "warning"))
            self._told.add(run.run)
            return isinstance(error, LockedError)
        self._emit(Note(f"run {run.run} ({run.verb} by {run.by}) is closed: {self._why}"))
        return True


class _Emit:
    """Writes the journal before the listener hears of an event; a phase does not begin before the gateway has it.

    What only moves a progress bar (``Progress``, ``TaskStarted``) is heard but not kept. Any event ends who emits it
    when a heartbeat has found a lock gone: a play of Ansible's has no acts of its own to ask before.
    """

    def __init__(self, listener: Emit) -> None:
        self._listener = listener
        self._journal: Journal | None = None
        self._about_to: Any = None
        self._known: Callable[[], None] = nothing
        self._one = threading.RLock()

    def keep(self, journal: Journal | None, about_to: Any, known: Callable[[], None] = nothing) -> None:
        with self._one:
            self._journal, self._about_to, self._known = journal, about_to, known

    def __call__(self, event: Event) -> None:
        with self._one:
            if self._journal is not None and not isinstance(event, Progress | TaskStarted):
                self._journal.write(as_document(event))
            self._listener(event)
            about_to, known = self._about_to, self._known
        known()
        if isinstance(event, PhaseStarted) and about_to is not None:
            about_to()
