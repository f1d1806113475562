"""One command on many hosts: what ran, where, how it ended. ``fold`` is pure; ``execute`` asks the hosts.

The command goes into each host's system journal before it runs (``journalctl -t opsctl-audit``), as every act of an
operator does. A host whose journal takes no line is told of and does the work: it may be what has to be mended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opsctl.agent.audit import IDENTIFIER
from opsctl.engines.session import Completed, Session, on_each
from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet, Host

AUDIT_LIMIT = 32_768  # bytes of a line in the journal; logger cuts at 1 KiB unless it is told
AUDIT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Outcome:
    """How it went on one host. ``returncode`` is None where it did not run to its end: then ``error`` says why."""

    host: str
    seconds: float
    returncode: int | None = None
    stdout: str = ""
    stderr: str = ""
    error: Mapping[str, Any] | None = None
    audited: bool = True

    @property
    def good(self) -> bool:
        return self.returncode == 0

    def as_document(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def audit_line(argv: Sequence[str], user: str, by: str, *, sudo: bool) -> str:
    """The line for the host's journal; ``user`` logs in there, ``by`` is the operator here (``ann@laptop``)."""
    return json.dumps({"user": user, "verb": "exec", "by": by, "sudo": sudo, "argv": list(argv)}, sort_keys=True)


def audit_arguments(line: str) -> list[str]:
    return ["logger", "-t", IDENTIFIER, "-p", "user.notice", "--size", str(AUDIT_LIMIT), "--", line]


def execute(fleet: Fleet, hosts: Sequence[Host], argv: Sequence[str], by: str, *, sudo: bool, timeout_s: float
            ) -> list[Outcome]:
    """Runs ``argv`` on all hosts at once; an outcome each, in the order of ``hosts``."""
    began = time.monotonic()

    def run(session: Session) -> Outcome:
        line = audit_line(argv, session.host.user or by.partition("@")[0], by, sudo=sudo)
        audited = _audit(session, line)
        started = time.monotonic()
        try:
            done = session.run(argv, sudo=sudo, timeout_s=timeout_s)
        except OpsctlError as error:
            return Outcome(session.host.name, time.monotonic() - started, error=error.as_document(), audited=audited)
        return _outcome(session.host.name, time.monotonic() - started, done, audited)

    answers = on_each(fleet, hosts, run)
    return [answer if isinstance(answer, Outcome) else
            Outcome(name, time.monotonic() - began, error=answer.as_document(), audited=False)
            for name, answer in answers.items()]


def _audit(session: Session, line: str) -> bool:
    """Whether the host's journal took the line; one that hangs does not keep anybody from mending it."""
    try:
        return session.run(audit_arguments(line), sudo=False, timeout_s=AUDIT_TIMEOUT_S).returncode == 0
    except OpsctlError as error:
        if error.code != "host.timed_out":
            raise
        return False


def _outcome(host: str, seconds: float, done: Completed, audited: bool) -> Outcome:
    return Outcome(host, seconds, done.returncode, done.stdout, done.stderr, audited=audited)


def fold(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, ...]]:
    """Outcomes that say the same, together; those that are not good last, where a person looks first. Pure."""
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault((one.returncode, one.stdout, one.stderr, _same_error(one)), []).append(one)
    return sorted(map(tuple, groups.values()), key=lambda group: not group[0].good)


def _same_error(one: Outcome) -> str:
    """An error without its host's name: "gpu-1: it does not answer" is what gpu-2 says too."""
    return f"{one.error['code']} {str(one.error['message']).removeprefix(one.host)}" if one.error else ""


def heading(group: Sequence[Outcome]) -> str:
    """``gpu-1, gpu-2, gpu-4: exit 0, 0.1 to 0.3 s``."""
    fastest, slowest = min(one.seconds for one in group), max(one.seconds for one in group)
    seconds = f"{slowest:.1f} s" if f"{fastest:.1f}" == f"{slowest:.1f}" else f"{fastest:.1f} to {slowest:.1f} s"
    first = group[0]
    how = f"exit {first.returncode}" if first.error is None else str(first.error["code"])
    return f"{', '.join(one.host for one in group)}: {how}, {seconds}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """``3 of 4 hosts: exit 0``."""
    good = sum(one.good for one in outcomes)
    return f"{good} of {len(outcomes)} host{'s' * (len(outcomes) != 1)}: exit 0"
