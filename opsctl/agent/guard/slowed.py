"""Whether an instance's GPUs are slower than they could be just now: then no speed that is measured says anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsctl.agent import guard_view
from opsctl.agent.drains import boot_clock
from opsctl.agent.paths import Paths

HEAT = ("thermal slowdown", "hardware slowdown", "hardware thermal slowdown", "power brake")


def by_what(document: Mapping[str, Any] | None, instance: str) -> str:
    """In words, from the guard's document; empty when nothing does, or nobody can say. Pure."""
    if document is None or document["words"]:
        return ""
    found = []
    for gpu in document["gpus"]:
        if gpu["instance"] != instance:
            continue
        if gpu.get("clock_limit_mhz") or gpu.get("power_limit_set_w"):
            limit = f"{gpu['clock_limit_mhz']} MHz" if gpu.get("clock_limit_mhz") else f"{gpu['power_limit_set_w']} W"
            found.append(f"the guard holds GPU {gpu['index']} at {limit}")
        found += [f"GPU {gpu['index']}: {reason}" for reason in gpu["reasons"] if reason in HEAT]
    return "; ".join(found)


def now(paths: Paths, instance: str) -> str:
    """What ``by_what`` finds at this moment."""
    return by_what(guard_view.look(paths, boot_clock()), instance)
