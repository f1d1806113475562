"""What the guard keeps in files: its memory over a restart, and the orders of people.

``state.json`` is the agent's own: each instance's memory with the boot it is of, and for how long this host was
observed. ``guard-orders.json`` is written by ``opsctl-host`` (root) and only read here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from opsctl.agent.durable import write_atomically
from opsctl.agent.guard.model import Memory, Mode, Rung

SCHEMA = "opsctl.guard-state/v1"
MODES = ("auto", "observe", "enforce")


@dataclass(frozen=True)
class Orders:
    """``unlatch``: by instance, when a person ordered it, in seconds since 1970."""

    mode: Mode = "auto"
    unlatch: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """``unlatched``: the orders that were carried out, by instance. ``limits``: the last by GPU, as MHz and watts."""

    observed_s: float = 0.0
    memories: Mapping[str, Memory] = field(default_factory=dict)
    unlatched: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)


def read_orders(path: Path) -> Orders:
    """No file: none were given.

    Raises:
        ValueError: the file is not what opsctl-host writes; the orders that were known stay in force.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Orders()
    mode = document.get("mode") if isinstance(document, dict) else None
    if mode not in MODES:
        raise ValueError(f"{path}: mode is {mode!r}, expected {', '.join(MODES)}")
    unlatch = {str(name): float(at) for name, at in (document.get("unlatch") or {}).items()}
    return Orders(cast("Mode", mode), unlatch)


def read(path: Path, boot: str) -> Kept:
    """What is kept; after a boot clocks, units and rungs begin anew, a latch stays. Nothing that can be read: empty."""
    try:
        document = json.loads(path.read_bytes())
        memories = {str(name): memory(one) for name, one in document["memories"].items()}
        observed, same = float(document["observed_s"]), bool(boot) and document["boot"] == boot
        unlatched = {str(name): float(at) for name, at in document["unlatched"].items()}
        limits = {str(uuid): (mhz, watts) for uuid, (mhz, watts) in document["limits"].items()} if same else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Kept()
    if not same:
        memories = {name: Memory(latched=one.latched) for name, one in memories.items()}
    return Kept(observed, memories, unlatched, limits)


def write(path: Path, kept: Kept, boot: str) -> None:
    """Lasts through a power cut. Raises OSError."""
    write_atomically(path, json.dumps({
        "schema": SCHEMA, "boot": boot, "observed_s": kept.observed_s, "unlatched": dict(kept.unlatched),
        "limits": dict(kept.limits),
        "memories": {name: dataclasses.asdict(one) for name, one in kept.memories.items()}}))


def memory(document: Mapping[str, Any]) -> Memory:
    """Of what ``write`` made; keys that nobody knows any more are left out. Raises ValueError, TypeError."""
    names = {one.name for one in dataclasses.fields(Memory)}
    known = {name: value for name, value in document.items() if name in names}
    for name, value in known.items():  # tuples come back as lists
        if isinstance(value, list):
            known[name] = tuple(value)
    return replace(Memory(**known), rung=Rung(known.get("rung", Rung.NORMAL)))
