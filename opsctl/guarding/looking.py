"""Asks hosts how their guard stands: ``look`` once, ``Watcher`` again and again over sessions that stay open."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError
from opsctl.fleet import placements
from opsctl.fleet.model import Fleet, Host
from opsctl.releases.remote import interpret

# As ``opsctl-host guard``, for a fifth of its time on the host's processors (docs/guard.md).
QUICK = ["/opt/opsctl/agent/bin/python3", "-I", "-m", "opsctl.agent.guard_view"]
TIMEOUT_S = 10.0
AT_ONCE = 32  # hosts that are asked at the same time; as many logins does a jump host bear
LEAVE_S = 0.5  # all threads together have so long to end; then the process ends without them
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)  # before a host that did not answer is asked again

Answer = Mapping[str, Any] | OpsctlError


def watched(fleet: Fleet, hosts: Sequence[Host]) -> tuple[Host, ...]:
    """Those of ``hosts`` that have GPUs or serve with them; if none does, those that serve, or all. Pure."""
    with_gpus = {host.name for host in placements.with_gpus(fleet)}
    serving = {placement.host for placement in placements.place(fleet)}
    return (tuple(host for host in hosts if host.name in with_gpus or host.gpus)
            or tuple(host for host in hosts if host.name in serving) or tuple(hosts))


def look(fleet: Fleet, hosts: Sequence[Host]) -> dict[str, Answer]:
    """The document of ``opsctl-host guard`` of each host, or why there is none."""
    return on_each(fleet, hosts, ask)


def ask(session: Session) -> Mapping[str, Any]:
    """One host's document. No root is needed.

    Raises:
        OpsctlError: ``guard.not_provisioned``, or why it does not answer.
    """
    name = session.host.name
    done = session.run(QUICK, sudo=False, timeout_s=TIMEOUT_S)
    if done.returncode in (1, 126, 127) and ("not found" in done.stderr or "No module named" in done.stderr
                                             or "No such file" in done.stderr):
        raise OpsctlError("guard.not_provisioned", f"{name} has no agent with a guard.",
                          hint=f"opsctl provision --limit {name}")
    return interpret(done, "guard", name)


@dataclass(frozen=True)
class Heard:
    """A host's last word and when it came, by our monotonic clock. ``answer`` None: none yet."""

    answer: Answer | None = None
    at_s: float = 0.0


class Watcher:
    """Asks each host every ``every_s`` seconds, in a thread a host; one that hangs holds up no other."""

    def __init__(self, fleet: Fleet, hosts: Sequence[Host], every_s: float) -> None:
        self._fleet = fleet
        self._every_s = every_s
        self._heard = {host.name: Heard() for host in hosts}
        self._turns = threading.Semaphore(AT_ONCE)
        self._ended = threading.Event()
        self._sessions: dict[str, Session] = {}
        self._threads = [threading.Thread(target=self._watch, args=(host,), name=f"watch-{host.name}", daemon=True)
                         for host in hosts]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Closes the sessions; a thread that waits for a host ends with it."""
        self._ended.set()
        for session in list(self._sessions.values()):
            session.close()
        until = time.monotonic() + LEAVE_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def heard(self) -> dict[str, Heard]:
        return dict(self._heard)

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _watch(self, host: Host) -> None:
        failures = 0
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                with self._turns:
                    answer: Answer = ask(self._session(host))
                failures = 0
            except OpsctlError as error:
                answer = error
                failures += 1
                self._drop(host)
            if self._ended.is_set():
                return
            now = time.monotonic()
            self._heard[host.name] = Heard(answer, now)
            pause_s = PAUSES_S[min(failures, len(PAUSES_S)) - 1] if failures else self._every_s
            self._ended.wait(max(0.05, began + pause_s - now) if not failures else pause_s)

    def _session(self, host: Host) -> Session:
        if host.name not in self._sessions:
            self._sessions[host.name] = Session(self._fleet, host)
        return self._sessions[host.name]

    def _drop(self, host: Host) -> None:
        """A connection that broke is opened anew next time."""
        session = self._sessions.pop(host.name, None)
        if session is not None:
            session.close()
