"""Compares a systemd unit with ``sandbox.json``: what a unit that runs an engine on GPUs must never have, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rule = Mapping[str, Any]


def rules() -> list[Rule]:
    """``option``, ``reason``, ``source`` and ``unless`` (allowed values) or ``unless_contains`` (needed words)."""
    document = json.loads((Path(__file__).parent / "sandbox.json").read_text(encoding="utf-8"))
    forbidden: list[Rule] = document["forbidden"]
    return forbidden


def violations(unit: str, forbidden: Sequence[Rule]) -> list[Rule]:
    """The rules that a unit's text breaks. The last setting of an option counts, as for systemd."""
    settings: dict[str, str] = {}
    for line in unit.splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and not key.startswith(("#", ";")):
            settings[key.strip()] = value.strip()
    return [rule for rule in forbidden if not _allowed(settings.get(rule["option"]), rule)]


def _allowed(value: str | None, rule: Rule) -> bool:
    if value is None:
        return not rule.get("required", False)
    if "unless_contains" in rule:
        return set(rule["unless_contains"]) <= set(value.split())
    return value in rule["unless"]
