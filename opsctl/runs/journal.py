"""The journal of a run: one JSON line an event, here and on the gateway, where whoever resumes finds it.

The copy here, ``<fleet>/.opsctl/runs/<run>/journal.ndjson``, is fsynced before anybody is told of an event. ``sync``
returns when the gateway has fsynced all of it too, and is called before each act; in between lines are gathered. A
gateway that does not answer is no reason to stop: its lines are kept and sent when it does.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsctl.engines.events import Emit, Note
from opsctl.engines.session import Session
from opsctl.errors import LockedError, OpsctlError
from opsctl.fleet.model import Fleet
from opsctl.fleet.placements import gateway as gateway_of
from opsctl.releases.remote import ask

PRIVATE = 0o700
TIMEOUT_S = 20.0
NO_AGENT = "host.no_answer"
NOT_YET = (NO_AGENT, "host.no_sudo")  # a host before its first provision, which brings both
FILE = "journal.ndjson"
DIVERGED = "run.diverged"
AGAIN_S = 10.0  # a gateway that did not answer is not asked at once again


def nothing() -> None:
    """For runs that have no locks and no gateway to tell."""


@dataclass(frozen=True)
class Run:
    """One run of a verb: its name and where it keeps its journal and logs.

    ``check`` raises when a lock of the run was lost. ``about_to`` does so too, and waits until the journal is safe: it
    is called before each act.
    """

    name: str
    directory: Path
    check: Callable[[], None] = nothing
    about_to: Callable[[], None] = nothing


def new_name() -> str:
    """``20261122-031500-1a2b``: names sort by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def make_directory(fleet_directory: Path, run: str) -> Path:
    """Where a run keeps its files on this machine."""
    directory = fleet_directory / ".opsctl" / "runs" / run
    (fleet_directory / ".opsctl").mkdir(mode=PRIVATE, exist_ok=True)
    directory.mkdir(parents=True, mode=PRIVATE, exist_ok=True)
    return directory


class Journal:
    """The journal of one run. ``lines``: how many the gateway has of it already, when the run is continued."""

    def __init__(self, fleet: Fleet, run: str, emit: Emit, lines: int = 0) -> None:
        self.run = run
        self.directory = make_directory(fleet.directory, run)
        self._gateway = gateway_of(fleet).name
        self._session = Session(fleet, gateway_of(fleet))
        self._emit = emit
        self._file = (self.directory / FILE).open("a", encoding="utf-8")
        self._pending: list[str] = []
        self._sent = lines
        self._told = False
        self._answered = lines > 0
        self._failed_at: float | None = None
        self._writing = threading.RLock()
        self._sending = threading.RLock()

    @staticmethod
    def line(document: Mapping[str, Any]) -> str:
        """As it lies in the journal: with the time, in seconds since 1970."""
        return json.dumps({"t": round(time.time(), 3), **document}, default=str) + "\n"

    def write(self, document: Mapping[str, Any]) -> None:
        """Adds a line; it is on this machine's disk when this returns."""
        line = self.line(document)
        with self._writing:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._pending.append(line)

    def sync(self, *, at_once: bool = False) -> bool:
        """Until all of it is fsynced on the gateway; False when that does not answer, which is told once.

        ``at_once``: also when it did not answer a moment ago.

        Raises:
            LockedError: ``run.diverged``: somebody else leads this run, or closed it.
        """
        with self._sending:
            if not at_once and self._failed_at is not None and time.monotonic() - self._failed_at < AGAIN_S:
                return False
            with self._writing:
                batch = list(self._pending)
            if not batch:
                return True
            try:
                ask(self._session, ["run-append", "--run", self.run, "--from", str(self._sent)], host=self._gateway,
                    stdin="".join(batch).encode(), timeout_s=TIMEOUT_S)
            except LockedError:
                raise
            except OpsctlError as error:
                self._failed_at = time.monotonic()
                self._miss(error)
                return False
            self._failed_at = None
            with self._writing:
                del self._pending[:len(batch)]
                self._sent += len(batch)
            if self._told:
                self._emit(Note("the gateway answers again and has the journal of this run", host=self._gateway))
            self._told, self._answered = False, True
            return True

    def close(self) -> None:
        self._file.close()
        self._session.close()

    def _miss(self, error: OpsctlError) -> None:
        """One word for all that is missed in a row; none before the gateway has an agent: this run may bring it."""
        if self._told or (error.code in NOT_YET and not self._answered):
            return
        self._told = True
        self._emit(Note(f"the journal of this run stays on this machine until the gateway takes it: {error.message}",
                        "warning", self._gateway))
