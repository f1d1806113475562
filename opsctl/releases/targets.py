"""Which release a rollback goes to, and which one may not be served again. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsctl.agent.ledger import BAD, SERVE, Line, bad_digests, tip
from opsctl.agent.manifest import directory_name
from opsctl.errors import OpsctlError, RefusedError

State = Mapping[str, Any] | OpsctlError


@dataclass(frozen=True)
class Skipped:
    """A release that a rollback did not take, and why, in words."""

    version: str
    reason: str


@dataclass(frozen=True)
class Target:
    """Where a rollback goes; ``skipped`` are later releases that were passed over."""

    version: str
    digest: str
    skipped: tuple[Skipped, ...] = ()

    @property
    def release(self) -> str:
        """``v1-0123456789ab``."""
        return directory_name(self.version, self.digest)


def rollback_target(lines: Sequence[Line], states: Mapping[str, State], version: str = "") -> Target:
    """Where a rollback goes: the newest earlier release that is not bad and that every host has with its engine.

    ``states`` are documents of ``opsctl-host state``, or why a host gave none, by host: those with an instance of the
    service. Earlier means before the ledger's tip, whatever was served how often. ``version``: only that one will do.

    Raises:
        RefusedError: ``rollback.no_target``: there is none; every candidate is named with its reason.
    """
    now = tip(lines)
    if now is None:
        raise RefusedError("rollback.no_target", "the ledger names no release yet: there is nothing to go back from.",
                           hint="opsctl provision brings the first one")
    bad = bad_digests(lines)
    skipped: list[Skipped] = []
    incomplete: list[str] = []
    for line in candidates(lines, now):
        if version not in ("", line.version):
            continue
        if line.digest in bad:
            skipped.append(Skipped(line.version, f"is bad: {reason_of(lines, line.digest)}"))
            continue
        lacking = [reason for host, state in states.items() if (reason := _lacks(host, state, line.digest))]
        if not lacking:
            return Target(line.version, line.digest, tuple(skipped))
        incomplete.append(line.version)
        skipped.append(Skipped(line.version, ", ".join(lacking)))
    if not skipped:
        which = f"release {version}" if version else "release"
        raise RefusedError("rollback.no_target", f"the ledger has no {which} before {now.version}.",
                           hint="opsctl update-model --version VERSION goes to any release that was imported")
    words = "; ".join(f"{one.version} {one.reason}" for one in skipped)
    hint = f"opsctl stage --version {incomplete[0]}, then the same again" if incomplete else \
        f"opsctl update-model --version {skipped[0].version} --allow-bad serves a bad one all the same"
    raise RefusedError("rollback.no_target", f"there is no release before {now.version} to go back to: {words}.",
                       hint=hint)


def candidates(lines: Sequence[Line], now: Line) -> list[Line]:
    """Releases that were served before ``now``, each once, the latest first."""
    seen = {now.digest}
    found = []
    for line in reversed(lines[:now.number]):
        if line.action == SERVE and line.digest not in seen:
            seen.add(line.digest)
            found.append(line)
    return found


def check_not_bad(lines: Sequence[Line], digest: str, allow_bad: bool) -> None:
    """Refuses a release that somebody marked.

    Raises:
        RefusedError: ``release.bad``: who marked it, when and why.
    """
    if allow_bad or digest not in bad_digests(lines):
        return
    mark = _mark(lines, digest)
    raise RefusedError("release.bad", f"{mark.version} was marked bad by {reason_of(lines, digest)}.",
                       hint="--allow-bad serves it all the same, and takes the mark away")


def reason_of(lines: Sequence[Line], digest: str) -> str:
    """``ann@desk, 2026-11-22 03:15 UTC: rolled back to v1``, of a release that is marked."""
    mark = _mark(lines, digest)
    note = f": {mark.note}" if mark.note else ""
    return f"{mark.by}, {mark.at[:16].replace('T', ' ')} UTC{note}"


def _mark(lines: Sequence[Line], digest: str) -> Line:
    return next(line for line in reversed(lines) if line.digest == digest and line.action == BAD)


def _lacks(host: str, state: State, digest: str) -> str:
    """Why a host could not serve a release at once; empty when it could."""
    if isinstance(state, OpsctlError):
        return f"{host} does not answer"
    stored = next((release for release in state["releases"] if release["digest"] == digest), None)
    if stored is None:
        return f"is not on {host}"
    if not stored["complete"]:
        return f"is not whole on {host}"
    # an agent that does not say it is an older one: it staged releases with their engines too
    return "" if stored.get("engine_built", True) else f"has no engine built on {host}"
