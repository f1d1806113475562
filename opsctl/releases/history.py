"""The ledger as rows for a person: what was to be served from when, by whom, and what was bad. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from opsctl.agent.ledger import BAD, SERVE, Line, bad_digests, tip


def history(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One row a line, oldest first. ``now``: it is what the fleet should serve; ``bad``: its release is marked."""
    last, bad = tip(lines), bad_digests(lines)
    return [{**asdict(line), "release": line.release, "now": last is not None and line.number == last.number,
             "bad": line.action == SERVE and line.digest in bad} for line in lines]


def mark(row: dict[str, Any]) -> str:
    """The last column: ``serving now``, ``bad``, or nothing."""
    if row["action"] == BAD:
        return ""
    return ", ".join(["serving now"] * row["now"] + ["bad"] * row["bad"])
