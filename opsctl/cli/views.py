"""Views of the event stream. They listen and never decide.

``LiveView`` is a table on a terminal, one row a host; ``PlainView`` is timestamped lines for pipes and CI.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from opsctl.engines.events import (
    Event,
    Note,
    PhaseStarted,
    Progress,
    RunFinished,
    RunStarted,
    TaskResult,
    TaskStarted,
)

LOG_CONTEXT_LINES = 20
STYLE = {"ok": "green", "changed": "yellow", "skipped": "dim", "failed": "bold red", "unreachable": "bold red"}
LEVEL_STYLE = {"info": "", "warning": "yellow", "error": "bold red"}


def human_bytes(count: float) -> str:
    """``1536`` -> ``1.5 kB`` (decimal units, as disks and networks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(count: float) -> str:
    """``7 s``, ``12 min``, ``3 h 5 min``."""
    if count < 120:
        return f"{count:.0f} s"
    minutes = round(count / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def progress_words(event: Progress) -> str:
    """``12.0 MB of 80.0 MB, 15 %, 9.1 MB/s, 7 s left``."""
    if event.unit == "seconds":
        return human_seconds(event.done)
    if not event.done and not event.total:
        return "working"
    show = human_bytes if event.unit == "bytes" else str
    words = show(event.done)
    if event.total:
        words += f" of {show(event.total)}, {100 * event.done // event.total} %"
    if event.per_second > 0:
        rate = human_bytes(event.per_second) if event.unit == "bytes" else f"{event.per_second:.1f}"
        words += f", {rate}/s"
        if event.total > event.done:
            words += f", {human_seconds((event.total - event.done) / event.per_second)} left"
    return words


class View(ABC):
    @abstractmethod
    def show(self, event: Event) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class PlainView(View):
    """One timestamped line for what a person reading a log wants: phases, changes, failures, coarse progress."""

    PROGRESS_EVERY_S = 5.0

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_progress: dict[str, float] = {}

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, style=style or None)

    def show(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._line(f"{event.verb}: run {event.run} on {', '.join(event.hosts)}")
            case PhaseStarted():
                self._line(f"== {event.name}", "bold")
            case TaskResult(status="ok" | "skipped"):
                pass
            case TaskResult():
                about = f" ({event.item})" if event.item else ""
                message = f": {event.message}" if event.message else ""
                self._line(f"{event.host:<10} {event.status:<11} {event.task}{about}{message}", STYLE[event.status])
                for line in event.detail[-LOG_CONTEXT_LINES:]:
                    self._console.print(f"           | {line}", markup=False, highlight=False, style="dim")
            case Progress():
                key = event.host + event.subject
                now = time.monotonic()
                finished = bool(event.total) and event.done >= event.total
                if finished or now - self._last_progress.get(key, -self.PROGRESS_EVERY_S) >= self.PROGRESS_EVERY_S:
                    self._last_progress[key] = now
                    self._line(f"{event.host:<10} {event.subject}: {progress_words(event)}")
            case Note():
                self._line(f"{event.host:<10} {event.message}" if event.host else event.message,
                           LEVEL_STYLE[event.level])
            case RunFinished():
                self._line(f"finished in {event.seconds:.1f} s, {event.changed} changed")
            case TaskStarted():
                pass

    def close(self) -> None:
        pass


@dataclass
class _Row:
    ok: int = 0
    changed: int = 0
    failed: int = 0
    now: str = ""


class LiveView(View):
    """A table that redraws in place: a row a host, the phase above it, notes and changes scrolling past."""

    def __init__(self, console: Console) -> None:
        self._plain = PlainView(console)
        self._rows: dict[str, _Row] = {}
        self._phase = ""
        self._task = ""
        self._progress: dict[str, Progress] = {}
        self._live = Live(console=console, refresh_per_second=8, transient=True, get_renderable=self._render)
        self._started = False

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for host, row in self._rows.items():
            counts = Text.assemble((f"{row.ok} ok", "green"), "  ", (f"{row.changed} changed", "yellow"), "  ",
                                   (f"{row.failed} failed", "bold red") if row.failed else "")
            table.add_row(Text(host, "bold"), counts, Text(row.now, "dim"))
        parts: list[RenderableType] = [Text(f"{self._phase}  {self._task}".strip(), "bold cyan"), table]
        parts += [Text(f"{event.host:<10} {event.subject}: {progress_words(event)}") for event in
                  self._progress.values()]
        return Group(*parts)

    def show(self, event: Event) -> None:
        if not self._started:
            self._started = True
            self._live.start()
        match event:
            case RunStarted():
                self._rows = {host: _Row() for host in event.hosts}
                self._plain.show(event)
            case PhaseStarted():
                self._phase, self._task = event.name, ""
                self._progress.clear()
                self._plain.show(event)
            case TaskStarted():
                self._task = event.task
                if event.host:
                    self._rows.setdefault(event.host, _Row()).now = event.task
            case TaskResult():
                row = self._rows.setdefault(event.host, _Row())
                row.ok += event.status in ("ok", "changed")
                row.changed += event.status == "changed"
                row.failed += event.status in ("failed", "unreachable")
                row.now = event.task
                self._progress = {key: one for key, one in self._progress.items() if one.host != event.host}
                self._plain.show(event)
            case Progress():
                self._progress[event.host + event.subject] = event
                if event.total and event.done >= event.total:
                    self._progress.pop(event.host + event.subject)
                    self._plain.show(event)
            case Note() | RunFinished():
                self._plain.show(event)

    def close(self) -> None:
        if self._started:
            self._live.stop()
            self._started = False


def choose_view(console: Console, *, quiet_terminal: bool = False) -> View:
    """The live table on a terminal, plain lines in a pipe, under ``CI`` or with ``--json``."""
    if console.is_terminal and not quiet_terminal and not os.environ.get("CI"):
        return LiveView(console)
    return PlainView(console)
