"""What the agent tells the load balancer of an instance. Pure.

Only ever ``up N%`` or ``down #reason``, with a newline: ``drain``, ``maint`` and ``ready`` are the operator's words,
and ``ready`` would undo the operator's drain each second. Without the blank before ``#`` HAProxy does not read
``down``.
"""

from __future__ import annotations

from dataclasses import dataclass

ALIVE = ("active", "reloading")


@dataclass(frozen=True)
class Facts:
    """What is known of one instance. ``active`` is systemd's ActiveState, empty when systemd has not answered yet."""

    placed: bool
    release: str = ""
    active: str = ""
    draining: bool = False
    unfinished: bool = False  # its start ended with an earlier boot: nothing ever saw this release serve
    tried: bool = False  # a first start or cutover is at work: no gate has passed yet
    weight: int = 100  # percent; the least over all owners of drains, and the guard
    cannot: str = ""  # why the guard knows that it cannot serve
    stopped: bool = False  # by the guard


def answer(facts: Facts) -> str:
    """``up 100%``, ``up 0%``, ``down #no release`` ... without the newline."""
    if not facts.placed:
        return "down #unknown instance"
    if not facts.release:
        return "down #no release"
    if facts.unfinished:
        return "down #unfinished start"
    if facts.active == "deactivating" or ((facts.draining or facts.tried) and facts.active in (*ALIVE, "")):
        return "up 0%"
    if facts.active in ALIVE or not facts.active:
        # Not knowing the unit is no reason to take an instance away: the load balancer checks the engine itself.
        return f"down #{facts.cannot}" if facts.cannot else f"up {facts.weight}%"
    stopped = "down #stopped by the guard" if facts.stopped else "down #stopped"
    return {"activating": "down #starting", "failed": "down #failed"}.get(facts.active, stopped)
