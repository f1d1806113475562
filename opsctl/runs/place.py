"""One lock at one place: how it is tried for, by the host's agent or by a folder where there is none yet.

Who may take it is decided in ``judge.py``; ``locking.py`` holds all locks of a run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opsctl.engines.session import Session
from opsctl.errors import LockedError, OpsctlError
from opsctl.fleet.model import Host
from opsctl.releases.remote import ask
from opsctl.runs import bare, judge
from opsctl.runs.identity import Holder, alive, holder_of
from opsctl.runs.journal import NO_AGENT
from opsctl.runs.judge import Verdict

HOST = "host"
TIMEOUT_S = 15.0
PROCESS_GONE, NO_BEAT = "that process is gone", "no heartbeat for a minute"

How = Literal["none", "agent", "bare"]


@dataclass
class Place:
    """One lock. ``how``: by the agent, by a folder where there is none yet, or not held: nobody answers there."""

    host: Host
    name: str
    session: Session
    how: How = "none"
    tried_s: float = 0.0  # of the boot clock of this machine
    quiet: bool = False
    only_one: threading.Lock = field(default_factory=threading.Lock)

    @property
    def words(self) -> str:
        """``gpu-1``, ``service chat``."""
        return self.host.name if self.name == HOST else self.name.replace("-", " ", 1)


@dataclass(frozen=True)
class Taken:
    """What came of trying. ``holder``: who has it when we have not; ``before``: whom it was taken from, and ``why``."""

    holder: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    why: str = ""


def attempt(place: Place, ours: Holder, *, allow_bare: bool) -> Taken:
    """Tries for the lock, once. ``allow_bare``: by a folder on a host that has no agent yet.

    Raises:
        OpsctlError: the host or the gateway does not answer, or its agent refuses.
    """
    try:
        taken = _by_agent(place, ours)
        if taken.holder is None and allow_bare and place.name == HOST and place.how != "agent":
            taken = _without_folder(place, ours, taken)
        place.how = "agent" if taken.holder is None else place.how
        return taken
    except OpsctlError as error:
        if error.code != NO_AGENT or not allow_bare or place.name != HOST:
            raise
    return _by_folder(place, ours)


def _by_agent(place: Place, ours: Holder) -> Taken:
    verb = ["lock-take", "--name", place.name]
    stdin = json.dumps(ours.as_document()).encode()
    answer = ask(place.session, verb, host=place.host.name, stdin=stdin, timeout_s=TIMEOUT_S)
    if answer["taken"]:
        why = {"stale": NO_BEAT, "reboot": "no heartbeat since that host booted"}
        return Taken(before=answer.get("before"), why=why.get(answer["how"], ""))
    holder = answer["holder"]
    if _verdict(ours, holder) is not Verdict.GONE:
        return Taken(holder)
    answer = ask(place.session, [*verb, "--over", holder["run"]], host=place.host.name, stdin=stdin,
                 timeout_s=TIMEOUT_S)
    return Taken(before=holder, why=PROCESS_GONE) if answer["taken"] else Taken(answer["holder"])


def _by_folder(place: Place, ours: Holder) -> Taken:
    owner = bare.owner(place.session)
    if (owner is None or not owner.token) and bare.take(place.session, ours):
        place.how = "bare"
        return Taken()
    owner = owner or bare.owner(place.session) or bare.Owner({"verb": "provision", "user": "somebody"}, 0.0)
    told = {**owner.holder, "beat_s": owner.beat_s, "since": ""}
    verdict = _verdict(ours, told)
    if verdict is Verdict.MINE:
        place.how = "bare"
        bare.renew(place.session, ours)
        return Taken()
    if verdict is Verdict.HELD or not bare.take(place.session, ours, over=owner):
        return Taken(told)
    place.how = "bare"
    return Taken(before=told, why=PROCESS_GONE if verdict is Verdict.GONE else NO_BEAT)


def _without_folder(place: Place, ours: Holder, taken: Taken) -> Taken:
    """The agent has come, by us or by somebody who was killed since: the folder of before has had its day."""
    owner = bare.owner(place.session)
    if owner is None:
        return taken
    told = {**owner.holder, "beat_s": owner.beat_s, "since": ""}
    if _verdict(ours, told) is Verdict.HELD:
        ask(place.session, ["lock-drop", "--name", place.name, "--token", ours.token], host=place.host.name)
        return Taken(told)
    bare.drop(place.session, owner.token)
    return taken


def _verdict(ours: Holder, document: dict[str, Any]) -> Verdict:
    holder = holder_of(document)
    return judge.lock(holder, ours, lives=alive(holder), beat_s=float(document.get("beat_s") or 0))


def held_by(places: Sequence[Place], document: dict[str, Any]) -> LockedError:
    holder = holder_of(document)
    where = ", ".join(place.words for place in places)
    return LockedError("lock.held", f"{where}: locked by {holder_words(document)}.",
                       hint="wait until it has ended; if it never will: "
                       + (f"opsctl lock break {holder.run}" if holder.run else f"rm -r {bare.PLACE} there, as root"))


def holder_words(document: dict[str, Any]) -> str:
    """``ann@laptop for update-model (run 2026..., since 2026-...; last heartbeat 3 s ago)``."""
    holder = holder_of(document)
    facts = [f"run {holder.run}" if holder.run else "", f"since {document['since']}" if document.get("since") else ""]
    beat = f"last heartbeat {float(document.get('beat_s') or 0):.0f} s ago"
    return f"{holder.who} for {holder.verb} ({', '.join(fact for fact in facts if fact)}; {beat})"
