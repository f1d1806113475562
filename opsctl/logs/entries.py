"""Journals of many hosts as one: what to ask journalctl for, what its lines mean, in which order they stand. Pure.

Each host's own clock dates its lines; ``opsctl doctor`` measures how far those are apart.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from opsctl.errors import UsageError
from opsctl.fleet.model import Host, Placement

LINES = 100  # of each host, when nothing was said
MOST_LINES = 50_000  # of each host, however long --since is
FIELDS = "MESSAGE,PRIORITY,_SYSTEMD_UNIT,UNIT"
INSTANCE_UNIT = re.compile(r"inference@(?P<instance>.+)\.service")
SUFFIX = re.compile(r"\.(service|socket|timer|mount|target|path|slice|scope)$")
DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|min|h|d)")
SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
# Escape sequences and other control characters: a log line must not paint on the terminal of who reads it.
UNPRINTABLE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b.?|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Entry:
    """One entry of a journal. ``t_us``: microseconds since 1970 by the host's clock; ``priority`` as syslog's, 0..7."""

    host: str
    t_us: int
    unit: str
    instance: str  # chat.0, or the unit's name without its suffix
    priority: int
    text: str
    cursor: str = ""

    def as_document(self) -> dict[str, Any]:
        moment = datetime.fromtimestamp(self.t_us / 1e6, timezone.utc)
        return {"t": moment.isoformat(timespec="microseconds").replace("+00:00", "Z"), "host": self.host,
                "instance": self.instance, "unit": self.unit, "priority": self.priority, "text": self.text}


@dataclass(frozen=True)
class Since:
    """From when on: seconds before this moment, or a moment in UTC; neither: no bound."""

    seconds: float = 0.0
    moment: str = ""

    def argument(self, elapsed_s: float = 0.0) -> str:
        """As ``journalctl --since`` takes it, ``elapsed_s`` seconds after the verb began; empty: no bound."""
        if self.moment:
            return f"{self.moment} UTC"
        return f"-{self.seconds + elapsed_s:.0f}s" if self.seconds else ""


def read_since(text: str) -> Since:
    """``90s``, ``10m``, ``1h``, ``2d``, or ``2026-11-22 03:10`` (UTC).

    Raises:
        UsageError: ``logs.bad_since``.
    """
    duration = DURATION.fullmatch(text.strip())
    if duration and float(duration[1]) > 0:
        return Since(seconds=float(duration[1]) * SECONDS[duration[2]])
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        moment = None
    if not text.strip():
        return Since()
    if moment is None:
        raise UsageError("logs.bad_since", f"--since {text!r} is neither a duration nor a time.",
                         hint="30s, 10m, 1h, 2d, or '2026-11-22 03:10' in UTC")
    if moment.tzinfo is not None:
        moment = moment.astimezone(timezone.utc)
    return Since(moment=moment.strftime("%Y-%m-%d %H:%M:%S"))


def units(hosts: Sequence[Host], placements: Sequence[Placement], instance: str, names: Sequence[str]
          ) -> dict[str, tuple[str, ...]]:
    """Whose journals to read, by host: ``names`` of each, else the units of the instances that ``instance`` names.

    ``instance`` may be a glob (``chat.*``); empty: all. Hosts without any are left out.

    Raises:
        UsageError: nothing is left.
    """
    if names and instance:
        raise UsageError("logs.unit_and_instance", "--unit and --instance do not go together.", hint="one of the two")
    if names:
        return {host.name: tuple(name if SUFFIX.search(name) else f"{name}.service" for name in names)
                for host in hosts}
    found = {host.name: tuple(f"inference@{one.instance}.service" for one in placements if one.host == host.name
                              and fnmatch.fnmatchcase(one.instance, instance or "*")) for host in hosts}
    found = {host: mine for host, mine in found.items() if mine}
    if not found:
        there = sorted({one.instance for one in placements})
        what = f"no instance {instance}" if instance else "no instance"
        raise UsageError("logs.no_instance", f"there is {what} on {', '.join(host.name for host in hosts)}.",
                         hint=(f"instances: {', '.join(there)}; " if there else "") + "--unit NAME reads another unit")
    return found


def arguments(names: Sequence[str], *, lines: int | None = None, since: str = "", cursor: str = "",
              follow: bool = False) -> list[str]:
    """The argument vector of journalctl. ``lines``: at most so many, the newest; None: all that there are."""
    chosen = ["journalctl", "--quiet", "--no-pager", "--all", "--output=json", f"--output-fields={FIELDS}",
              *(f"--unit={name}" for name in names)]
    if cursor:
        chosen.append(f"--after-cursor={cursor}")
    elif since:
        chosen.append(f"--since={since}")
    if lines is not None:
        chosen.append(f"--lines={lines}")
    elif follow:
        chosen.append("--no-tail")  # else following begins with the newest ten
    return [*chosen, "--follow"] if follow else chosen


def parse(host: str, line: str) -> Entry | None:
    """One line of ``journalctl -o json``; None when it is none."""
    try:
        raw = json.loads(line)
        t_us = int(raw["__REALTIME_TIMESTAMP"])
    except (ValueError, KeyError, TypeError):
        return None
    own, about = (_text(raw.get(key)) for key in ("_SYSTEMD_UNIT", "UNIT"))
    unit = about or own  # what systemd says of a unit (started, failed) belongs to that one
    priority = _text(raw.get("PRIORITY"))
    return Entry(host, t_us, unit, instance_of(unit), int(priority) if priority.isdigit() else 6,
                 _text(raw.get("MESSAGE")), str(raw.get("__CURSOR", "")))


def instance_of(unit: str) -> str:
    """``chat.0`` for ``inference@chat.0.service``, ``opsctl-agent`` for ``opsctl-agent.service``."""
    found = INSTANCE_UNIT.fullmatch(unit)
    return found["instance"] if found else SUFFIX.sub("", unit)


def _text(value: Any) -> str:
    """A field's text. journalctl writes bytes that are no UTF-8 as numbers, and a field that came twice as a list."""
    if isinstance(value, list):
        if all(isinstance(one, int) for one in value):
            return bytes(value).decode("utf-8", "replace")
        return "\n".join(map(_text, value))
    return "" if value is None else str(value)


def merge(entries: Mapping[str, Sequence[Entry]]) -> list[Entry]:
    """All hosts' entries by time. Those of one host stay in their order, also where its clock was set back."""
    keyed = []
    for number, mine in enumerate(entries.values()):
        latest = 0
        for position, entry in enumerate(mine):
            latest = max(latest, entry.t_us)
            keyed.append((latest, number, position, entry))
    return [entry for *_, entry in sorted(keyed, key=lambda one: one[:3])]


def printable(text: str) -> str:
    """``text`` without what would move a terminal's cursor or colours."""
    return UNPRINTABLE.sub("", text)


def entries_of(host: str, lines: Iterable[str]) -> list[Entry]:
    return [entry for entry in (parse(host, line) for line in lines) if entry is not None]


@dataclass
class Place:
    """How far a host's journal was read. ``read``: it was asked once, so what has no cursor had nothing."""

    units: tuple[str, ...]
    read: bool = False
    cursor: str = ""

    def arguments(self, lines: int | None, since: str) -> list[str]:
        """Where following begins or goes on: after the last line that was heard, without gaps or doubles."""
        if self.cursor:
            return arguments(self.units, cursor=self.cursor, follow=True)
        return arguments(self.units, lines=None if self.read else lines, since=since, follow=True)
