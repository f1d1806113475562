"""The ledger as the controller reads and writes it: on the gateway, and in every host's copy while that is down.

``read_books`` says which lines count, ``write_lines`` adds some. ``merge`` decides and is pure. A copy only ever grows:
what was written while the gateway was down is handed to it by whoever finds it up again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from opsctl.agent import ledger
from opsctl.agent.ledger import BAD, Line
from opsctl.engines.events import Emit, Note, TaskResult
from opsctl.engines.session import Session, on_each
from opsctl.errors import LockedError, OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.fleet.placements import gateway as gateway_of
from opsctl.releases.remote import ask

# The gateway is down, or was installed anew and has no agent yet. Anything else it says is a person's to mend.
SILENT = ("host.unreachable", "host.connection_lost", "host.timed_out", "host.no_answer")
GATEWAY = "gateway"
Lines = tuple[Line, ...]


@dataclass(frozen=True)
class Books:
    """The lines that count. ``source`` is ``gateway`` or the host whose copy was the longest.

    ``silence`` says why the gateway did not answer, empty when it did.
    """

    service: str
    lines: Lines
    source: str
    gateway_up: bool
    silence: str = ""


@dataclass(frozen=True)
class Merged:
    """``source`` empty: nobody has any line. ``diverged``: hosts whose copy says something else than ``lines``."""

    lines: Lines
    source: str
    diverged: tuple[str, ...] = ()


def keepers(fleet: Fleet, service: str) -> tuple[Host, ...]:
    """Hosts that keep a copy of a service's ledger; of a service that left services.yml, all that may have one."""
    groups = {one.group for one in fleet.services if one.name == service} or {one.group for one in fleet.services}
    return tuple(host for host in fleet.hosts if groups & set(host.groups))


def merge(gateway: Lines | None, copies: Mapping[str, Lines]) -> Merged:
    """Which lines count: the longest of those that begin with what the gateway says, None when it is silent. Pure."""
    lines, source = (gateway, GATEWAY) if gateway is not None else ((), "")
    for host, copy in copies.items():
        if len(copy) > len(lines) and ledger.is_prefix(lines, copy):
            lines, source = copy, host
    return Merged(lines, source, tuple(host for host, copy in copies.items() if not ledger.is_prefix(copy, lines)))


def read_books(fleet: Fleet, service: Service | str, emit: Emit, *, looking: bool = False) -> Books:
    """The ledger of a service, or of a name that left services.yml: the gateway's, or the longest copy when it is down.

    Lines that were written while the gateway was down are handed to it first, unless the caller is only ``looking``:
    then nothing is written, and copies that contradict the gateway are told and left out.

    Raises:
        LockedError: ``ledger.diverged``: two copies contradict each other.
        RefusedError: ``ledger.unreadable``: the gateway does not answer, and no host that does has a copy.
        OpsctlError: what else the gateway said.
    """
    gateway, service = gateway_of(fleet), _name(service)
    main, copies, silence = _ask(fleet, gateway, service, emit)
    merged = merge(main, copies)
    if merged.diverged:
        error = _diverged(service, merged, copies)
        if not looking:
            raise error
        emit(Note(f"{error.message} {error.hint}", "warning"))
    if main is None and not merged.source:
        raise RefusedError("ledger.unreadable", f"the gateway does not answer, and no host that does has a copy of the "
                           f"ledger of {service}: {silence}",
                           hint="copies come with the first update-model; until then the gateway is needed")
    if main is not None and merged.source != GATEWAY and not looking:
        with Session(fleet, gateway) as session:
            ask(session, ["ledger-put", "--service", service], host=gateway.name, stdin=ledger.to_bytes(merged.lines))
        emit(Note(f"got {_counted(len(merged.lines) - len(main))} of the ledger of {service} that "
                  f"{merged.source} kept while it was down", host=gateway.name))
        merged = Merged(merged.lines, GATEWAY)
    return Books(service, merged.lines, merged.source, main is not None, silence)


def write_lines(fleet: Fleet, service: Service | str, books: Books, lines: Sequence[Line], emit: Emit) -> Books:
    """Writes ``lines`` after those of ``books``; gives the books as they are now. Said already: nothing to do.

    The gateway first, which numbers and dates them itself, then every host's copy; with the gateway down the copies
    alone. Each takes all of them in one write, or none. A host that does not answer gets its copy with the next write.

    Raises:
        LockedError: ``ledger.moved``: somebody else wrote meanwhile.
        RefusedError: a line contradicts the ledger, or names a release that neither gateway nor ledger knows.
        OpsctlError: the connection broke on the way, so the lines may be there; or nobody took it.
    """
    service = _name(service)
    if books.gateway_up:
        try:
            books = _append(fleet, books, lines, emit)
        except RefusedError as error:
            if error.code != "host.unreachable":
                raise
            books = Books(service, books.lines, books.source, gateway_up=False, silence=error.message)
    if not books.gateway_up:
        books = _extended(books, lines, emit)
    took = _put_copies(fleet, books, emit)
    if not books.gateway_up and not took:
        raise OpsctlError("ledger.not_written", f"neither the gateway nor a host took the new line of the ledger of "
                          f"{service}.", hint="opsctl status; what serves goes on serving")
    if not books.gateway_up:
        emit(Note(f"the gateway does not answer: the ledger of {service} was written on {', '.join(took)}, and the "
                  "gateway gets it from there by the next command that finds it up", "warning"))
    return books


def words(line: Line) -> str:
    """``serve v2``, ``v2 is bad``."""
    return f"{line.version} is bad" if line.action == BAD else f"serve {line.version}"


def _ask(fleet: Fleet, gateway: Host, service: str, emit: Emit
         ) -> tuple[Lines | None, dict[str, Lines], str]:
    """The gateway's lines or None, every copy that there is, and why the gateway was silent."""
    keeping = {host.name for host in keepers(fleet, service)}

    def look(session: Session) -> dict[bool, Lines]:
        """By whether it is a copy."""
        host = session.host.name
        kinds = [False] * (host == gateway.name) + [True] * (host in keeping)
        found = {}
        for copy in kinds:
            verb = ["ledger-show", "--service", service, *["--copy"] * copy]
            found[copy] = tuple(map(ledger.line_of, ask(session, verb, host=host)["lines"]))
        return found

    asked = [host for host in fleet.hosts if host.name == gateway.name or host.name in keeping]
    main: Lines | None = None
    copies: dict[str, Lines] = {}
    silence = ""
    for name, answer in on_each(fleet, asked, look).items():
        if isinstance(answer, OpsctlError):
            if name == gateway.name:
                if answer.code not in SILENT:
                    raise answer
                silence = answer.message
            elif answer.code not in SILENT:
                emit(Note(f"its copy of the ledger was left out: {answer.message} {answer.hint}", "warning", name))
            continue
        main = answer.get(False, main)
        copies |= {name: answer[True]} if answer.get(True) else {}
    return main, copies, silence


def _append(fleet: Fleet, books: Books, lines: Sequence[Line], emit: Emit) -> Books:
    gateway = gateway_of(fleet)
    with Session(fleet, gateway) as session:
        done = ask(session, ["ledger-extend", "--service", books.service, "--after", str(len(books.lines))],
                   host=gateway.name, stdin=ledger.to_bytes(lines))
        for line, added in zip(lines, done["added"], strict=True):
            emit(TaskResult(gateway.name, f"ledger of {books.service}: {words(line)}", "changed" if added else "ok"))
        found = ask(session, ["ledger-show", "--service", books.service], host=gateway.name)["lines"]
    return Books(books.service, tuple(map(ledger.line_of, found)), GATEWAY, gateway_up=True)


def _extended(books: Books, lines: Sequence[Line], emit: Emit) -> Books:
    """The same books with ``lines`` behind: what the gateway would have made of them."""
    known = list(books.lines)
    for line in lines:
        new = not ledger.says(known, line)
        if new:
            known.append(replace(line, number=len(known) + 1))
            ledger.check(known[:-1], known[-1])
        emit(TaskResult("copies", f"ledger of {books.service}: {words(line)}", "changed" if new else "ok"))
    return Books(books.service, tuple(known), books.source, gateway_up=False, silence=books.silence)


def _put_copies(fleet: Fleet, books: Books, emit: Emit) -> list[str]:
    """Brings every host's copy up to date; gives the hosts that have it."""
    verb = ["ledger-put", "--copy", "--service", books.service]
    content = ledger.to_bytes(books.lines)
    answers = on_each(fleet, keepers(fleet, books.service),
                      lambda session: ask(session, verb, host=session.host.name, stdin=content))
    for name, answer in answers.items():
        if isinstance(answer, OpsctlError):
            emit(Note(f"did not take its copy of the ledger, it gets it with the next line: {answer.message}",
                      "info" if answer.code in SILENT else "warning", name))
    return [name for name, answer in answers.items() if not isinstance(answer, OpsctlError)]


def _diverged(service: str, merged: Merged, copies: Mapping[str, Lines]) -> LockedError:
    host = merged.diverged[0]
    copy = copies[host]
    number = next(at for at, line in enumerate(copy) if merged.lines[at:at + 1] != (line,))
    said = words(merged.lines[number]) if number < len(merged.lines) else "nothing"
    where = "the gateway" if merged.source == GATEWAY else merged.source
    return LockedError(
        "ledger.diverged", f"line {number + 1} of the ledger of {service} says '{words(copy[number])}' on {host} and "
        f"'{said}' on {where}: two people wrote while they could not see each other.",
        hint=f"when {where} is right, remove /var/lib/opsctl/ledger/{service}.jsonl on {', '.join(merged.diverged)}")


def _name(service: Service | str) -> str:
    return service if isinstance(service, str) else service.name


def _counted(lines: int) -> str:
    return "1 line" if lines == 1 else f"{lines} lines"
