"""All locks of a fleet, and how a run that will not come back is given up: its locks broken, its journal closed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opsctl.engines.events import Emit, Note, TaskResult
from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet
from opsctl.releases.remote import ask
from opsctl.runs import bare
from opsctl.runs.identity import Holder, holder_of, me
from opsctl.runs.journal import NO_AGENT, NOT_YET
from opsctl.runs.judge import Known
from opsctl.runs.running import close_run, read_runs

PROVISION_LOCK = "provision"  # the folder of a host without an agent


@dataclass(frozen=True)
class Found:
    """A lock as it lies on a host; ``beat_s``: seconds since it was last heard of."""

    host: str
    name: str
    holder: Holder
    since: str
    beat_s: float


@dataclass(frozen=True)
class Outcome:
    """What was broken, whether the run is closed now, and what did not work, a sentence each."""

    broken: tuple[Found, ...]
    closed: bool
    failed: tuple[str, ...] = ()


def all_locks(fleet: Fleet) -> tuple[list[Found], list[str]]:
    """The locks of all hosts, and the hosts that do not answer."""
    found: list[Found] = []
    silent: list[str] = []
    for name, answer in on_each(fleet, fleet.hosts, _locks).items():
        if isinstance(answer, OpsctlError):
            silent.append(name)
        else:
            found += answer
    return found, silent


def run_named(fleet: Fleet, name: str) -> Known | None:
    """A run of the gateway's; None when it knows of none, also because it has no agent yet.

    Raises:
        OpsctlError: it does not answer, and so nobody knows.
    """
    try:
        return next((run for run in read_runs(fleet) if run.run == name), None)
    except OpsctlError as error:
        if error.code not in NOT_YET:
            raise
        return None


def break_run(fleet: Fleet, locks: Sequence[Found], run: str, emit: Emit) -> Outcome:
    """Breaks ``locks`` of a run and closes it.

    The journal is read again after the locks are gone: a controller that lives has stopped writing, or will be refused.
    """
    broken: list[Found] = []
    failed = []
    hosts = [fleet.host(name) for name in dict.fromkeys(one.host for one in locks)]

    def act(session: Session) -> list[Found]:
        mine = [one for one in locks if one.host == session.host.name]
        return [one for one in mine if _break(session, one, run)]

    for name, answer in on_each(fleet, hosts, act).items():
        if isinstance(answer, OpsctlError):
            emit(TaskResult(name, "break its lock", "failed", answer.message, answer.log_tail))
            failed.append(f"{name}: {answer.message}")
            continue
        broken += answer
    try:
        known = run_named(fleet, run)
        closes = known is not None and known.resumable
        if known is not None and closes:
            close_run(fleet, known, "its locks were broken", me(run, "lock break").who)
    except OpsctlError as error:
        emit(Note(f"run {run} could not be closed: {error.message}", "warning"))
        return Outcome(tuple(broken), False, (*failed, f"run {run} could not be closed: {error.message}"))
    return Outcome(tuple(broken), closes, tuple(failed))


def _locks(session: Session) -> list[Found]:
    host = session.host.name
    try:
        listed = ask(session, ["locks"], host=host)["locks"]
        found = [Found(host, one["name"], holder_of(one["holder"]), one["holder"]["since"],
                       float(one["holder"]["beat_s"])) for one in listed]
    except OpsctlError as error:
        if error.code != NO_AGENT:
            raise
        found = []
    owner = bare.owner(session)
    if owner is not None:
        found.append(Found(host, PROVISION_LOCK, holder_of(owner.holder), "", owner.beat_s))
    return found


def _break(session: Session, one: Found, run: str) -> bool:
    if one.name == PROVISION_LOCK:
        return bare.drop(session, one.holder.token)
    return bool(ask(session, ["lock-break", "--name", one.name, "--run", run], host=one.host)["broken"])
