"""The state of a fleet as plain rows: what ``opsctl status`` shows. ``rows`` is pure; ``look`` asks the hosts.

The ledger is asked for beside them: a gateway that does not answer keeps nobody waiting, and then nothing is said of
instances that are behind it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from opsctl import status_gpus
from opsctl.agent import ledger
from opsctl.agent.drains import FULL
from opsctl.agent.ledger import SERVE, Line
from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet, Host, Placement
from opsctl.fleet.placements import gateway, place
from opsctl.guarding import rows as guarding
from opsctl.runs.holding import Hold, holds_of

HOST_PROGRAM = "/opt/opsctl/agent/bin/opsctl-host"
SERVING = "serving"
CHANGING = "changing"
UP = "up"  # a host that has no instance, and answers
AS_IT_SHOULD_BE = frozenset({SERVING, UP})
CUT_OFF = "down #unfinished"  # the voice of an instance whose change ended with an earlier boot
LEDGER_PATIENCE_S = 1.0  # beyond what the hosts took

Ledgers = Mapping[str, Sequence[Line]]


@dataclass(frozen=True)
class Row:
    """One instance, or one host without any. ``running`` and ``waiting`` count requests; None: not known.

    ``weight`` is the part of its requests, in percent, that drains leave it.
    """

    host: str
    groups: tuple[str, ...]
    instance: str = ""
    release: str = ""
    state: str = ""
    running: int | None = None
    waiting: int | None = None
    note: str = ""
    weight: int | None = None

    def as_document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Seen:
    """What hosts and gateway said at one look.

    ``silent`` are services whose ledger did not answer: nothing is known of who is behind there. ``gpus`` are those of
    hosts that have any (``status_gpus.gpus_of``), ``guards`` what the guard says of hosts that have one.
    """

    rows: list[Row]
    silent: tuple[str, ...] = ()
    gpus: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    guards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def look(fleet: Fleet, hosts: Sequence[Host]) -> Seen:
    """Asks hosts and gateway at once."""
    beside = Beside(lambda: _ledgers(fleet))
    states = gather(fleet, hosts)
    ledgers = beside.answer(LEDGER_PATIENCE_S) or {}
    return Seen(rows(fleet, hosts, states, ledgers),
                tuple(one.name for one in fleet.services if one.name not in ledgers), status_gpus.gpus_of(states),
                {name: state["guard"] for name, state in states.items()
                 if not isinstance(state, OpsctlError) and state.get("guard")})


def gather(fleet: Fleet, hosts: Sequence[Host], timeout_s: float = 15.0) -> dict[str, Mapping[str, Any] | OpsctlError]:
    """Asks every host for ``opsctl-host state --json``; a host without the agent answers an empty mapping."""

    def ask(session: Session) -> Mapping[str, Any]:
        answer = session.run([HOST_PROGRAM, "state", "--json"], timeout_s=timeout_s)
        if answer.returncode in (1, 126, 127) and "not found" in answer.stderr:
            return {}
        if answer.returncode:
            raise OpsctlError("status.agent", f"opsctl-host state failed with exit code {answer.returncode}.",
                              log_tail=answer.stderr.splitlines()[-5:])
        state: Mapping[str, Any] = json.loads(answer.stdout)
        return state

    return on_each(fleet, hosts, ask)


class Beside:
    """Calls ``function`` in a thread that nobody has to wait for."""

    def __init__(self, function: Callable[[], Ledgers]) -> None:
        self._function = function
        self._answer: Ledgers | None = None
        self._thread = threading.Thread(target=self._call, name="beside", daemon=True)
        self._thread.start()

    def answer(self, patience_s: float) -> Ledgers | None:
        """None: there was none within ``patience_s``, or none at all."""
        self._thread.join(patience_s)
        return self._answer

    def _call(self) -> None:
        try:
            self._answer = self._function()
        except OpsctlError:
            self._answer = None


def _ledgers(fleet: Fleet) -> Ledgers:
    found: dict[str, Sequence[Line]] = {}
    with Session(fleet, gateway(fleet)) as session:
        for service in fleet.services:
            answer = session.run([HOST_PROGRAM, "ledger-show", "--service", service.name])
            if answer.returncode == 0:
                found[service.name] = tuple(map(ledger.line_of, json.loads(answer.stdout)["lines"]))
    return found


def rows(fleet: Fleet, hosts: Sequence[Host], states: Mapping[str, Mapping[str, Any] | OpsctlError],
         ledgers: Ledgers | None = None) -> list[Row]:
    """One row an instance that is placed, and one for each host that serves nothing."""
    placed = place(fleet)
    found: list[Row] = []
    for host in hosts:
        mine = [placement for placement in placed if placement.host == host.name]
        state = states[host.name]
        if isinstance(state, OpsctlError):
            what = "unreachable" if state.code == "host.unreachable" else "error"
            found += [Row(host.name, host.groups, placement.instance, state=what, note=state.message)
                      for placement in mine] or [Row(host.name, host.groups, state=what, note=state.message)]
        elif not state:
            found += [Row(host.name, host.groups, placement.instance, state="not provisioned") for placement in mine] \
                or [Row(host.name, host.groups, state="not provisioned")]
        else:
            found += [_instance_row(host, placement, state, (ledgers or {}).get(placement.service, ()))
                      for placement in mine] or [
                Row(host.name, host.groups, state=UP)]
    holds = _holds(fleet, hosts, states)
    return [_with_hold(row, holds[row.host]) if row.host in holds else row for row in found]


def _holds(fleet: Fleet, hosts: Sequence[Host], states: Mapping[str, Mapping[str, Any] | OpsctlError]
           ) -> dict[str, Hold]:
    """Holds by host: as the gateway says when it was asked and answers, else as each host says of itself."""
    told = {host.name: holds_of(state) for host in hosts
            if not isinstance(state := states[host.name], OpsctlError) and "holds" in state}
    main = gateway(fleet).name
    return told[main] if main in told else {name: known[name] for name, known in told.items() if name in known}


def _with_hold(row: Row, hold: Hold) -> Row:
    """Runs leave its host alone: that stands in the note."""
    return replace(row, note=f"{row.note}; {hold.words}" if row.note else f"{row.host}: {hold.words}")


def _instance_row(host: Host, placement: Placement, state: Mapping[str, Any], lines: Sequence[Line]) -> Row:
    for instance in state["instances"]:
        if instance["instance"] == placement.instance:
            row = Row(host.name, host.groups, placement.instance, instance["release"] or "", instance_state(instance),
                      instance["running"], instance["waiting"], _change_words(host, instance), instance.get("weight"))
            row = _with_ledger(_with_drains(row, state.get("drains", ())), instance["digest"], lines)
            return _with_guard(row, state.get("guard"))
    return Row(host.name, host.groups, placement.instance, state="not provisioned",
               note="the host does not know this instance yet: opsctl provision")


def _with_drains(row: Row, drains: Sequence[Mapping[str, Any]]) -> Row:
    """An instance that serves and gets nothing is ``drained``; who drains it stands in the note."""
    mine = [drain for drain in drains if drain["instance"] == row.instance]
    if not mine:
        return row
    note = f"{row.note}; " if row.note else f"{row.host} {row.instance}: "
    note += ", ".join(drain_words(drain) for drain in mine)
    weight = min(int(drain["weight"]) for drain in mine)
    return replace(row, state="drained" if weight == 0 and row.state == SERVING else row.state, note=note,
                   weight=weight)


def _with_guard(row: Row, guard: Mapping[str, Any] | None) -> Row:
    """What the guard does to an instance, or that nobody knows it, stands in the note."""
    words = guarding.note(row.instance, guard) if guard else ""
    if not words:
        return row
    return replace(row, note=f"{row.note}; {words}" if row.note else f"{row.host} {row.instance}: {words}")


def _with_ledger(row: Row, digest: str, lines: Sequence[Line]) -> Row:
    """An instance on an earlier release than the ledger's is ``behind``, on one that it does not name ``ahead``."""
    tip = ledger.tip(lines)
    if tip is None or not digest or digest == tip.digest:
        return row
    served = any(line.digest == digest for line in lines if line.action == SERVE)
    words = f"{row.host} {row.instance}: the ledger says {tip.version}"
    return replace(row, state=("behind" if served else "ahead") if row.state == SERVING else row.state,
                   note=f"{row.note}; the ledger says {tip.version}" if row.note else words)


def _change_words(host: Host, instance: Mapping[str, Any]) -> str:
    """What to do about an instance that is ``changing``; a host does not say whether anybody still works on it."""
    if not instance.get("unfinished"):
        return ""
    name = instance["instance"]
    undo = f"opsctl-host work-undo {name} undoes it"
    if str(instance.get("voice", "")).startswith(CUT_OFF):
        return f"{host.name} {name}: a change of its release was cut off: {undo}"
    return (f"{host.name} {name}: its release is being changed (opsctl-host cutover-status {name}); when nobody works "
            f"on it, {undo}")


def drain_words(drain: Mapping[str, Any]) -> str:
    """``0 % by operator:ann (new kernel)``."""
    why = f" ({drain['reason']})" if drain.get("reason") else ""
    ends = f", ends in {drain['lease_s']:.0f} s unless renewed" if drain.get("lease_s") is not None else ""
    return f"{drain['weight']} % by {drain['owner']}{why}{ends}"


def instance_state(instance: Mapping[str, Any]) -> str:
    """``serving``, ``no release``, ``starting``, ``failed``, ``stopped`` ... from the unit and its health.

    ``changing``, whatever the unit does: a cutover or first start is not done or undone.
    """
    unit = instance["unit"]
    if instance.get("unfinished"):
        return CHANGING
    if not instance["release"]:
        return "no release"
    if unit == "active":
        return SERVING if instance["health"] == "healthy" else "starting"
    if unit == "deactivating":
        return "draining"
    return {"inactive": "stopped", "activating": "starting"}.get(unit, str(unit))


def wrong(found: Sequence[Row], silent: Sequence[str] = (), gpus: Mapping[str, Mapping[str, Any]] | None = None,
          guards: Mapping[str, Mapping[str, Any]] | None = None) -> list[dict[str, str]]:
    """What is not as it should be: ``{"host", "instance", "what"}`` for each; nothing when all is well. Pure.

    Only a host that is up, an instance that serves with all its weight, a guard that has nothing to do, and GPUs that
    are all there and were just seen are well: what nobody knows is not.
    ``silent`` are services whose ledger did not answer; one of which nothing is shown does not count.
    """
    bad = [{"host": row.host, "instance": row.instance, "what": _wrong_word(row)} for row in found
           if row.state not in AS_IT_SHOULD_BE or (row.weight is not None and row.weight < FULL)]
    bad += status_gpus.wrong(gpus or {}) + guarding.wrong(guards or {})
    shown = {row.instance.rpartition(".")[0] for row in found}
    return bad + [{"host": "", "instance": service, "what": "ledger did not answer"} for service in silent
                  if service in shown]


def _wrong_word(row: Row) -> str:
    return f"serving at {row.weight} %" if row.state == SERVING else row.state


def wrong_words(bad: Sequence[Mapping[str, str]]) -> str:
    """One line: ``2 wrong: gpu-1 chat.0 failed, gpu-2 unreachable``."""
    return f"{len(bad)} wrong: " + ", ".join(" ".join(filter(None, (one["host"], one["instance"], one["what"])))
                                             for one in bad)


def endpoints(fleet: Fleet) -> dict[str, list[str]]:
    """Where clients send requests, by service: ``{"chat": ["http://10.0.0.2:8000/v1"]}``."""
    return {service.name: [f"http://{host.service_address}:{service.listen}/v1" for host in fleet.group("lb")]
            for service in fleet.services}
