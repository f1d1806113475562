"""While Ansible works: names who keeps a host's packages locked. A task of Ansible's says nothing before it is over.

Only where a task takes long is anybody asked; what opsctl itself does with dpkg is left out by the host's own answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from types import TracebackType

from opsctl.engines.events import Emit, Event, Note, PhaseStarted, Progress, TaskResult, TaskStarted
from opsctl.engines.session import Session
from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet, Host
from opsctl.resources import resource

LONG_S = 3.0  # tasks that are over sooner wait for nobody
LOOK_EVERY_S = 3.0
TIMEOUT_S = 10.0
WORKERS = 8


class Slow:
    """Which hosts are at a task for long: heard from events, asked for with the time of now."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[str, float]] = {}
        self._one = threading.Lock()

    def hear(self, event: Event, now: float) -> None:
        with self._one:
            if isinstance(event, PhaseStarted):
                self._since.clear()
            elif isinstance(event, TaskStarted) and event.host:
                self._since[event.host] = (event.task, now)
            elif isinstance(event, TaskResult) and not event.item:  # an item of a loop is not the end of its task
                self._since.pop(event.host, None)

    def hosts(self, now: float) -> dict[str, float]:
        """Seconds by host, of those that are at one task for long."""
        with self._one:
            return {host: now - since for host, (_, since) in self._since.items() if now - since >= LONG_S}


class Watch:
    """Passes events on, and tells beside them who holds dpkg's lock on hosts whose task takes long.

    >>> with Watch(fleet, hosts, emit) as hear:
    ...     run_playbook(..., emit=hear)
    """

    def __init__(self, fleet: Fleet, hosts: Sequence[Host], emit: Emit,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._sessions = {host.name: Session(fleet, host) for host in hosts}
        self._emit = emit
        self._clock = clock
        self._slow = Slow()
        self._told: set[tuple[str, str]] = set()
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="watch")
        self._thread = threading.Thread(target=self._look_on, name="watch", daemon=True)
        self._program = (resource("roles") / "nvidia_driver" / "files" / "driver_facts.py").read_bytes()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._over.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for session in self._sessions.values():
            session.close()
        self._thread.join(TIMEOUT_S)

    def __call__(self, event: Event) -> None:
        self._slow.hear(event, self._clock())
        self._emit(event)

    def _look_on(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            slow = self._slow.hosts(self._clock())
            try:
                for name, who in zip(slow, self._pool.map(self._ask, slow), strict=True):
                    if who and not self._over.is_set():
                        self._tell(name, who, slow[name])
            except (OpsctlError, CancelledError, RuntimeError):  # the run's lock was lost, which ends it; or it is over
                return

    def _ask(self, name: str) -> str:
        try:
            said = self._sessions[name].run(["python3", "-", "holder"], stdin=self._program, timeout_s=TIMEOUT_S)
        except OpsctlError:  # it reboots, or is gone: whoever works there says so
            return ""
        return said.stdout.strip() if said.returncode == 0 else ""

    def _tell(self, name: str, who: str, seconds: float) -> None:
        if (name, who) not in self._told:
            self._told.add((name, who))
            self._emit(Note(f"waits for {who}, which holds dpkg's lock", "warning", name))
        self._emit(Progress("waiting for dpkg's lock", int(seconds), 0, "seconds", host=name))
