"""The journal of a run: one JSON line an event, in ``<fleet>/.opsctl/runs/<run>/``."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opsctl.engines.events import Emit, Event, Progress, TaskStarted, as_document

PRIVATE = 0o700


@dataclass(frozen=True)
class Run:
    """One run of a verb: its name and where it keeps its journal and logs."""

    name: str
    directory: Path


@contextmanager
def journaled(fleet_directory: Path, listener: Emit) -> Iterator[tuple[Run, Emit]]:
    """Yields a new run and an ``Emit`` that writes its journal before ``listener`` hears of an event.

    What only moves a progress bar (``Progress``, ``TaskStarted``) is heard but not kept.
    """
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    directory = fleet_directory / ".opsctl" / "runs" / name
    (fleet_directory / ".opsctl").mkdir(mode=PRIVATE, exist_ok=True)
    directory.mkdir(parents=True, mode=PRIVATE)
    with (directory / "journal.ndjson").open("a", encoding="utf-8") as file:

        def emit(event: Event) -> None:
            if not isinstance(event, Progress | TaskStarted):
                file.write(json.dumps({"t": round(time.time(), 3), **as_document(event)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            listener(event)

        yield Run(name, directory), emit
