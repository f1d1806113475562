"""Who may go on, and with which run. Pure: no I/O, no clock; processes and heartbeats are passed in.

A lock is honoured as long as its holder's heart beats. The one exception is a process of our own, on this machine, that
is gone: nobody has to wait a minute for oneself. Runs that did not end are continued by the same command and stand in
the way of every other one on their hosts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from opsctl.errors import ExitCode, LockedError, UsageError
from opsctl.runs.identity import Holder, holder_of

STALE_S = 60.0
UNFINISHED = (int(ExitCode.PAUSED), int(ExitCode.INTERRUPTED))
REFUSALS = (int(ExitCode.USAGE), int(ExitCode.CONFIGURATION), int(ExitCode.LOCKED), int(ExitCode.REFUSED))
RESUMABLE = (*UNFINISHED, int(ExitCode.MIXED), int(ExitCode.UNEXPECTED))
STAGE, UPDATE, ROLLBACK = "stage", "update-model", "rollback"


class Verdict(StrEnum):
    """``gone``: our own process of this machine, which lives no more; it may be taken over at once."""

    FREE = "free"
    MINE = "mine"
    GONE = "gone"
    STALE = "stale"
    HELD = "held"


def lock(holder: Holder | None, me: Holder, *, lives: bool, beat_s: float) -> Verdict:
    """May ``me`` take a lock? ``lives``: what ``identity.alive`` says of its holder; ``beat_s``: since its beat."""
    if holder is None:
        return Verdict.FREE
    if holder.token == me.token:
        return Verdict.MINE
    if _same_place(holder, me) and (holder.boot != me.boot or not lives):
        return Verdict.GONE
    return Verdict.STALE if beat_s > STALE_S else Verdict.HELD


def _same_place(holder: Holder, me: Holder) -> bool:
    """Whether the holder's process could be seen from here. A machine id alone is shared by clones and containers."""
    if not me.machine_id or (holder.namespace and holder.namespace != me.namespace):
        return False
    return (holder.user, holder.machine_id, holder.machine) == (me.user, me.machine_id, me.machine)


@dataclass(frozen=True)
class Known:
    """A run of the gateway's journal. ``exit_code``: None until it has ended; ``closed``: why it is over for good.

    ``hosts`` are those of all its starts, ``argv`` of the last that was for all of them. ``began`` and ``at``, when its
    last line was written, are in seconds since 1970; ``holder`` is the process that began it.
    """

    run: str
    verb: str = ""
    intent: Mapping[str, Any] = field(default_factory=dict)
    argv: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    service: str = ""
    by: str = ""
    began: float = 0.0
    exit_code: int | None = None
    code: str = ""
    closed: str = ""
    lines: int = 0
    holder: Holder | None = None
    at: float = 0.0

    @property
    def unfinished(self) -> bool:
        """Somebody was at it and it did not come to an end."""
        return not self.closed and (self.exit_code is None or self.exit_code in UNFINISHED)

    @property
    def resumable(self) -> bool:
        """``opsctl resume`` may take it up; a failure that left a mixed fleet too, though it stands in nobody's way."""
        return not self.closed and (self.exit_code is None or self.exit_code in RESUMABLE)

    @property
    def state(self) -> str:
        """``unfinished``, ``closed`` or ``done``."""
        return "closed" if self.closed else "unfinished" if self.unfinished else "done"


def known(document: Mapping[str, Any]) -> tuple[Known, ...]:
    """The runs of a gateway's ``runs`` document, newest first."""
    return tuple(_known(one) for one in document["runs"])


@dataclass(frozen=True)
class Continue:
    """The same was wanted before and did not end: go on under its name. ``closes``: as of ``Begin``."""

    run: Known
    closes: tuple[Known, ...] = ()


@dataclass(frozen=True)
class Blocked:
    """Another run did not end on a host of ours."""

    run: Known


@dataclass(frozen=True)
class Begin:
    """A new run. ``closes``: unfinished ones that it takes back, or the same stages that were cut off."""

    closes: tuple[Known, ...] = ()


Decision = Continue | Blocked | Begin


def decide(runs: Sequence[Known], intent: Mapping[str, Any], hosts: Collection[str], *, wanted: str = "") -> Decision:
    """What becomes of a command that wants ``intent`` on ``hosts``.

    ``wanted``: the run that ``opsctl resume`` names.

    Raises:
        UsageError: ``resume.is_over``, ``resume.no_such_run``: that one ended, maybe while its operator was asked.
    """
    verb = intent["verb"]
    open_runs = [run for run in runs if run.unfinished]
    same = [run for run in open_runs if run.intent == intent]
    chosen = _named(runs, wanted) if wanted else same[0] if same else None
    if verb == STAGE:  # it has no lock: the same one may be at work still, and hosts go on with it in any case
        return Continue(chosen) if wanted and chosen else Begin(tuple(same))
    closes = []
    for run in open_runs:
        if run.verb == STAGE or run is chosen or (run in same and not wanted):
            continue
        if verb == ROLLBACK and run.verb in (UPDATE, ROLLBACK) and run.service == intent["service"]:
            closes.append(run)
        elif set(run.hosts) & set(hosts):
            return Blocked(run)
    return Continue(chosen, tuple(closes)) if chosen else Begin(tuple(closes))


def _named(runs: Sequence[Known], name: str) -> Known:
    for run in runs:
        if run.run == name:
            if not run.resumable:
                raise is_over(run)
            return run
    raise UsageError("resume.no_such_run", f"the gateway knows no run {name}, or does not answer.",
                     hint="opsctl runs lists them")


def not_covered(decision: Continue | Begin, hosts: Collection[str], fleet: Collection[str]) -> list[str]:
    """The hosts of a continued run that a start for ``hosts`` leaves as they are, of those that the fleet has. Pure."""
    run = decision.run.hosts if isinstance(decision, Continue) else ()
    return [host for host in run if host not in hosts and host in fleet]


def is_over(run: Known) -> UsageError:
    """The error for one that cannot be resumed."""
    why = run.closed or f"it ended with exit code {run.exit_code}"
    return UsageError("resume.is_over", f"run {run.run} is over: {why}.", hint=f"anew: opsctl {' '.join(run.argv)}")


def taken_back(runs: Sequence[Known], late: Collection[str]) -> list[tuple[Known, Known]]:
    """The unfinished updates that a rollback among ``late`` took back when the gateway was away, each with it. Pure.

    One that somebody has been at since the rollback began is not.
    """
    done = [run for run in runs if run.run in late and run.verb == ROLLBACK and run.exit_code == 0]
    return [(run, back) for back in done for run in runs
            if run.unfinished and run.verb in (UPDATE, ROLLBACK) and run.service == back.service
            and 0 < run.at < back.began]


def ends_as(decision: Continue | Begin, code: int, *, declined: bool = False) -> int:
    """The exit code that a journal gets. Who was refused did nothing: what they continued is as it was."""
    if not isinstance(decision, Continue) or not (declined or code in REFUSALS):
        return code
    if decision.run.exit_code is not None:
        return decision.run.exit_code
    return code if declined else int(ExitCode.PAUSED)


def blocked(run: Known, since: str) -> LockedError:
    """The error for a run in the way; ``since``: in words."""
    how = "did not end" if run.exit_code is None else f"ended with exit code {run.exit_code}"
    what = f"{run.verb} of {run.service}" if run.service else run.verb
    return LockedError("run.unfinished", f"{what} by {run.by}, begun {since}, {how} on "
                       f"{', '.join(run.hosts[:5])}{' and others' if len(run.hosts) > 5 else ''} (run {run.run}).",
                       hint=f"opsctl resume {run.run} ends it; opsctl lock break {run.run} gives it up")


def _known(document: Mapping[str, Any]) -> Known:
    began, ended, closed = (document.get(name) or {} for name in ("began", "ended", "closed"))
    holder = began.get("holder")
    intent = began.get("intent")
    return Known(
        str(document["run"]), str(began.get("verb", "")), intent if isinstance(intent, dict) else {},
        tuple(map(str, document.get("argv") or began.get("argv", ()))),  # an older agent: of the first start
        tuple(map(str, document.get("hosts") or began.get("hosts", ()))),
        str(began.get("service") or ""), str(began.get("by", "")), float(began.get("t") or 0),
        int(ended["exit_code"]) if "exit_code" in ended else None, str(ended.get("code") or ""),
        str(closed.get("why") or closed.get("by") or "") if closed else "", int(document.get("lines") or 0),
        holder_of(holder) if isinstance(holder, dict) else None, float(document.get("at") or 0))
