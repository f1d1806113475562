"""Hosts that are to be left alone for a while: "RMA until Friday". The gateway says which; while it is down, the host.

``put`` and ``remove`` write both. A run skips held hosts and shows them; a host that was named, or a run that would be
left with none, is refused. The ledger is written all the same: such a host is behind until the next update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsctl.engines.events import Emit, Note
from opsctl.engines.session import Session, on_each
from opsctl.errors import LockedError, OpsctlError
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.placements import gateway as gateway_of
from opsctl.fleet.select import SEPARATOR
from opsctl.releases.books import SILENT
from opsctl.releases.remote import ask
from opsctl.runs.journal import NOT_YET


@dataclass(frozen=True)
class Hold:
    """``since`` and ``until``: UTC, ISO 8601; ``until`` is empty when nobody said."""

    host: str
    by: str
    message: str
    since: str
    until: str = ""

    @property
    def words(self) -> str:
        """``on hold by ann since 2026-11-22 03:15 until 2026-11-24 03:15: RMA``."""
        until = f" until {_minute(self.until)}" if self.until else ""
        why = f": {self.message}" if self.message else ""
        return f"on hold by {self.by} since {_minute(self.since)}{until}{why}"


def read(fleet: Fleet, hosts: Sequence[Host]) -> dict[str, Hold]:
    """The holds of a fleet by host; of ``hosts`` as they say themselves while the gateway does not answer.

    Raises:
        OpsctlError: what else the gateway says.
    """
    gateway = gateway_of(fleet)
    try:
        with Session(fleet, gateway) as session:
            return holds_of(ask(session, ["holds"], host=gateway.name))
    except OpsctlError as error:
        if error.code not in (*SILENT, *NOT_YET):
            raise
    found: dict[str, Hold] = {}
    others = [host for host in hosts if host.name != gateway.name]
    answers = on_each(fleet, others, lambda session: ask(session, ["holds"], host=session.host.name))
    for name, answer in answers.items():
        if not isinstance(answer, OpsctlError):
            found |= {host: hold for host, hold in holds_of(answer).items() if host == name}
    return found


def holds_of(document: Mapping[str, Any]) -> dict[str, Hold]:
    """The holds of a ``holds`` document by host. Pure."""
    return {str(one["host"]): Hold(str(one["host"]), str(one["by"]), str(one["message"]), str(one["since"]),
                                   str(one["until"] or "")) for one in document["holds"]}


def leave_out(hosts: Sequence[Host], holds: Mapping[str, Hold], limit: str) -> tuple[tuple[Host, ...], dict[str, Hold]]:
    """The hosts that a run may touch, and the holds of the others. Pure.

    Raises:
        LockedError: ``host.on_hold``: a held host was named in ``limit``, or none is left.
    """
    held = {host.name: holds[host.name] for host in hosts if host.name in holds}
    named = [held[part] for part in (one.strip() for one in SEPARATOR.split(limit)) if part in held]
    if named or (held and len(held) == len(hosts)):
        first = (named or list(held.values()))[0]
        others = [name for name in held if name != first.host and not named]
        also = f"; so {'is' if len(others) == 1 else 'are'} {', '.join(others)}" if others else ""
        raise LockedError("host.on_hold", f"{first.host} is {first.words}{also}.",
                          hint=f"opsctl release {first.host} ends it; {first.by} knows why it is there")
    return tuple(host for host in hosts if host.name not in held), held


def show(held: Mapping[str, Hold], emit: Emit) -> None:
    """One word for each host that a run leaves alone."""
    for name, hold in held.items():
        emit(Note(f"left alone, {hold.words}", "warning", name))


def put(fleet: Fleet, host: Host, by: str, message: str, for_s: float | None, emit: Emit) -> bool:
    """Holds a host, on the gateway and on itself as far as they answer. False: it was held just so.

    Raises:
        OpsctlError: nobody took it.
    """
    verb = ["hold-put", "--host", host.name, "--by", by, "--message", message]
    return _write(fleet, host, [*verb, *([] if for_s is None else ["--for-s", f"{for_s:g}"])], emit)


def remove(fleet: Fleet, host: Host, emit: Emit) -> bool:
    """Ends the hold of a host. False: there was none.

    Raises:
        OpsctlError: the gateway did not answer: it would hold it again.
    """
    return _write(fleet, host, ["hold-remove", "--host", host.name], emit, gateway_needed=True)


def _write(fleet: Fleet, host: Host, verb: Sequence[str], emit: Emit, *, gateway_needed: bool = False) -> bool:
    gateway = gateway_of(fleet)
    places = [gateway] if gateway.name == host.name else [gateway, host]
    answers = on_each(fleet, places, lambda session: ask(session, verb, host=session.host.name))
    main = answers[gateway.name]
    took = [answer for answer in answers.values() if not isinstance(answer, OpsctlError)]
    if isinstance(main, OpsctlError) and (gateway_needed or not took or main.code not in SILENT):
        raise main
    for name, answer in answers.items():
        if isinstance(answer, OpsctlError):
            what = "the gateway does not answer, and this counts only until it does; then say it again" if \
                name == gateway.name else "does not answer; the gateway knows, and that is what counts"
            emit(Note(f"{what}: {answer.message}", "warning", name))
    return any(answer["changed"] for answer in took)


def _minute(text: str) -> str:
    return text[:16].replace("T", " ")
