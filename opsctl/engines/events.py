"""The one stream of typed events that every engine speaks.

The live table, the plain log, ``--json`` and the run journal only listen to it; nothing is decided from a view.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "changed", "skipped", "failed", "unreachable"]
Level = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class RunStarted:
    verb: str
    run: str
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class PhaseStarted:
    """A part of a run that a person would name: ``Preflight``, ``base``, ``Stage chat v1``."""

    name: str
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskStarted:
    task: str
    host: str = ""  # empty: on every host of the phase


@dataclass(frozen=True)
class TaskResult:
    host: str
    task: str
    status: Status
    message: str = ""
    detail: tuple[str, ...] = ()  # the last lines of what failed, or a diff
    item: str = ""


@dataclass(frozen=True)
class Progress:
    """Work in bytes or counts. ``total`` 0 means unknown; ``per_second`` 0 means not measured yet."""

    subject: str
    done: int
    total: int
    unit: Literal["bytes", "items", "seconds"] = "bytes"
    per_second: float = 0.0
    host: str = ""


@dataclass(frozen=True)
class Note:
    message: str
    level: Level = "info"
    host: str = ""


@dataclass(frozen=True)
class RunFinished:
    exit_code: int
    changed: int = 0
    seconds: float = 0.0
    hosts: dict[str, dict[str, int]] = field(default_factory=dict)  # host -> ok/changed/failed/unreachable/skipped


Event = RunStarted | PhaseStarted | TaskStarted | TaskResult | Progress | Note | RunFinished
Emit = Callable[[Event], None]


def as_document(event: Event) -> dict[str, Any]:
    """``{"event": "TaskResult", ...}``: what the journal keeps and ``--events`` streams."""
    return {"event": type(event).__name__, **dataclasses.asdict(event)}


def one_at_a_time(emit: Emit) -> Emit:
    """An ``Emit`` for hosts that are worked on in threads: listeners hear one event after the other."""
    lock = threading.Lock()

    def locked(event: Event) -> None:
        with lock:
            emit(event)

    return locked


def discard(_: Event) -> None:
    """An ``Emit`` for callers that do not listen."""
