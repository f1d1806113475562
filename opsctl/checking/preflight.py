"""The part of ``opsctl check`` that goes before ``provision`` and ``plan``: who is refused, and what is told.

``look`` is one more command of a session that is open anyway; ``judge`` is pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from opsctl.checking.hosts import ask_probe, wanted_of
from opsctl.checking.model import Finding, Wanted, provision
from opsctl.checking.table import CHECKS, REACHABLE, findings_for
from opsctl.engines.events import Emit, Note
from opsctl.engines.session import Session
from opsctl.errors import OpsctlError, RefusedError, UsageError
from opsctl.fleet.model import Fleet

ALLOW = "--allow-finding"
MUTE = ("check.no_probe", "host.timed_out")  # it answers, and cannot tell: no reason to refuse it


def check_allowed(ids: Iterable[str]) -> frozenset[str]:
    """The ids that the operator typed.

    Raises:
        UsageError: ``check.no_such_finding``.
    """
    known = {check.id for check in CHECKS} | {REACHABLE}
    for one in ids:
        if one not in known:
            near = sorted(name for name in known if one.partition("-")[0] in name)
            raise UsageError("check.no_such_finding", f"{ALLOW} {one}: no check has that id.",
                             hint=f"ids: {', '.join(near or sorted(known))}")
    return frozenset(ids)


def look(session: Session, fleet: Fleet, *, sudo: bool = True) -> tuple[Finding, ...]:
    """What is to be said of a host before it is provisioned. Its own sources are asked only where a provision asks.

    Raises:
        OpsctlError: it does not answer any more.
    """
    wanted = wanted_of(fleet, session.host)
    try:
        captured = ask_probe(session, wanted, apt=wanted.package_source == "upstream", sudo=sudo)
    except OpsctlError as error:
        if error.code == "check.no_python":
            return (_mute(error, wanted.host, stops=True),)
        if error.code in MUTE:
            return (_mute(error, wanted.host, stops=False),)
        raise
    return findings_for(wanted.host, captured, wanted)


def tell(found: Mapping[str, Sequence[Finding]], allowed: Collection[str], emit: Emit) -> None:
    """Says of every host what will hurt, a line each, and refuses where a provision would break.

    Raises:
        RefusedError: ``check.stops_provision``; nothing was changed.
    """
    told = worth_telling(found)
    for host, finding in told:
        if not finding.stops_provision:
            emit(Note(f"{finding.id}: {finding.what}", "warning", host))
        elif finding.id in allowed:
            emit(Note(f"{finding.id}: {finding.what} (goes on all the same: {ALLOW})", "warning", host))
    if any(not finding.stops_provision for _, finding in told):
        names = ",".join(dict.fromkeys(host for host, _ in told))
        emit(Note(f"how each of these is mended: opsctl check --limit {names}"))
    if (refusal := judge(found, allowed)) is not None:
        raise refusal


def judge(found: Mapping[str, Sequence[Finding]], allowed: Collection[str]) -> RefusedError | None:
    """The refusal of what would break, when there is something; the first of all stands in its sentence. Pure."""
    stopping = [(host, finding) for host, findings in found.items() for finding in findings
                if finding.stops_provision and finding.id not in allowed]
    if not stopping:
        return None
    host, first = stopping[0]
    also = f" ({len(stopping) - 1} more below)" if len(stopping) > 1 else ""
    names = " ".join(f"{ALLOW} {name}" for name in dict.fromkeys(finding.id for _, finding in stopping))
    return RefusedError("check.stops_provision", f"{host}: {first.id}: {first.what}{also}.",
                        hint=f"{first.fix}; nothing was changed. Who knows better adds {names}",
                        log_tail=[f"{name}: {sentence(finding)}" for name, finding in stopping[1:]])


def worth_telling(found: Mapping[str, Sequence[Finding]]) -> list[tuple[str, Finding]]:
    """WARN and FIX, by host; without what the provision mends by itself, which it is about to do. Pure."""
    return [(host, finding) for host, findings in found.items() for finding in findings
            if finding.verdict in ("fix", "warn") and not mended(host, finding)]


def mended(host: str, finding: Finding) -> bool:
    """Whether what mends it is the provision itself."""
    return not finding.stops_provision and provision(Wanted(host)) in finding.fix


def sentence(finding: Finding) -> str:
    return f"{finding.id}: {finding.what}" + (f"; {finding.fix}" if finding.fix else "")


def _mute(error: OpsctlError, host: str, *, stops: bool) -> Finding:
    return Finding(REACHABLE, "the way to the host", "fix", error.message.removeprefix(f"{host}: ").rstrip("."),
                   error.hint, stops)
