"""Asks and orders systemd: argument vectors and parsed answers; one function runs them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from opsctl.errors import OpsctlError

TIMEOUT_S = 30.0
ENVIRONMENT = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
PROPERTIES = ("Id", "LoadState", "ActiveState", "SubState", "NRestarts", "ActiveEnterTimestamp", "InvocationID",
              "Description")


@dataclass(frozen=True)
class Unit:
    """What systemd says of a unit. ``since`` is UTC, ISO 8601; empty when it never was active."""

    name: str
    load: str = "not-found"
    active: str = "inactive"
    sub: str = "dead"
    restarts: int = 0
    since: str = ""
    invocation: str = ""
    description: str = ""

    @property
    def busy(self) -> bool:
        return self.active in ("active", "activating", "deactivating", "reloading")


class Run(Protocol):
    """Runs an argument vector; raises OpsctlError when it cannot be run at all."""

    def __call__(self, argv: Sequence[str], timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]: ...


def run(argv: Sequence[str], timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """The one place that runs a program of systemd's."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False,
                              stdin=subprocess.DEVNULL, env=ENVIRONMENT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OpsctlError("host.systemd", f"{argv[0]} could not be run: {error}.",
                          hint="is systemd well on this host? systemctl is-system-running") from None


def show_arguments(units: Sequence[str]) -> list[str]:
    return ["systemctl", "show", "--no-pager", f"--property={','.join(PROPERTIES)}", "--", *units]


def parse_show(text: str, units: Sequence[str]) -> dict[str, Unit]:
    """``systemctl show`` of several units: blocks in the order asked, empty lines between them."""
    found = {name: Unit(name) for name in units}
    for name, block in zip(units, text.strip().split("\n\n"), strict=False):
        values: Mapping[str, str] = dict(line.partition("=")[::2] for line in block.splitlines())
        restarts = values.get("NRestarts", "0")
        found[name] = Unit(name, values.get("LoadState", ""), values.get("ActiveState", ""), values.get("SubState", ""),
                           int(restarts) if restarts.isdigit() else 0,
                           _iso(values.get("ActiveEnterTimestamp", "")), values.get("InvocationID", ""),
                           values.get("Description", ""))
    return found


def _iso(timestamp: str) -> str:
    """``Sun 2026-11-22 01:22:56 UTC`` -> ``2026-11-22T01:22:56Z``; anything else is no time."""
    words = timestamp.split()
    return f"{words[1]}T{words[2]}Z" if len(words) == 4 and words[3] == "UTC" else ""


def show(units: Sequence[str], run: Run = run) -> dict[str, Unit]:
    """The state of units by name; raises OpsctlError when systemd does not answer."""
    if not units:
        return {}
    done = run(show_arguments(units))
    if done.returncode:
        raise OpsctlError("host.systemd", f"systemctl show failed: {done.stderr.strip()}.",
                          hint="is systemd well on this host? systemctl is-system-running")
    return parse_show(done.stdout, units)


def log_tail(unit: str, lines: int = 20, run: Run = run) -> tuple[str, ...]:
    """The last lines that a unit wrote to the journal, oldest first."""
    done = run(["journalctl", "--unit", unit, "--lines", str(lines), "--output", "cat", "--no-pager", "--quiet"])
    return tuple(done.stdout.splitlines())
