"""What lies in the journals of this machine and never reached the gateway, which was away when a run ended.

Whoever reads the gateway's runs sends it: nobody is kept waiting then by a run that is over. The gateway takes only
what follows on what it has: the same words twice, or those of a run that somebody else has continued, change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet
from opsctl.releases.remote import Channel, ask
from opsctl.runs.journal import DIVERGED, FILE, TIMEOUT_S
from opsctl.runs.judge import Known
from opsctl.runs.locking import LOST

SECOND = len("20261122-031500")  # of a run's name; what follows says nothing about when it was


def send(fleet: Fleet, session: Channel, runs: Sequence[Known], gateway: str) -> tuple[str, ...]:
    """Sends what ``runs``, those of the gateway, lack; gives the names of those that have more lines now."""
    sent = []
    for name, only_ended in wanting(runs, _names(fleet.directory)):
        found = last_part((fleet.directory / ".opsctl" / "runs" / name / FILE).read_text(errors="replace"))
        known = next((run.lines for run in runs if run.run == name), 0)
        if found is None or found[0] + len(found[1]) <= known or (only_ended and not has_ended(found[1])):
            continue
        first, lines = found
        try:
            ask(session, ["run-append", "--run", name, "--from", str(first)], host=gateway,
                stdin="".join(lines).encode(), timeout_s=TIMEOUT_S)
        except OpsctlError:  # it went on elsewhere, or there is a gap before it: then these words are history
            continue
        sent.append(name)
    return tuple(sent)


def wanting(runs: Sequence[Known], here: Collection[str]) -> list[tuple[str, bool]]:
    """Which journals of this machine may matter: of runs that did not end, and of those that are not known. Pure.

    Those before the oldest that is known were swept long ago, or ended before the gateway had an agent. With each:
    whether it matters only if it ended. One that did not, from before everything that waits, was overtaken by what
    came after it: it must not come back and wait.
    """
    waiting = {run.run for run in runs if run.unfinished}
    known = {run.run for run in runs}
    oldest, since = min(known, default="")[:SECOND], min(waiting, default="~")[:SECOND]
    return [(name, name[:SECOND] < since) for name in sorted(here) if known and name[:SECOND] >= oldest
            and (name in waiting or name not in known)]


def has_ended(lines: Sequence[str]) -> bool:
    """Whether the last of these lines of a journal say so. Pure."""
    return any(json.loads(line).get("event") == "RunEnded" for line in lines)


def last_part(text: str) -> tuple[int, list[str]] | None:
    """The lines of the last time that the run was at work here, and the number of the first one. Pure.

    None: that is not known, or it lost its locks, and what it wrote is about somebody else's run.
    """
    lines = [f"{line}\n" for line in text.split("\n")[:-1]]
    try:
        documents: list[dict[str, Any]] = [json.loads(line) for line in lines]
    except ValueError:
        return None
    starts = [at for at, line in enumerate(documents) if line.get("event") in ("RunBegan", "RunContinued")]
    if not starts or any(line.get("event") == "RunEnded" and line.get("code") in (LOST, DIVERGED)
                         for line in documents[starts[-1]:]):
        return None
    start = documents[starts[-1]]
    first = 0 if start["event"] == "RunBegan" else start.get("line")
    return None if first is None else (int(first), lines[starts[-1]:])


def _names(directory: Path) -> list[str]:
    return [path.parent.name for path in (directory / ".opsctl" / "runs").glob(f"*/{FILE}")]
