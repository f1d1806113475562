"""Whether an engine has anything in flight, by its own word. A unit that does not run has nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from opsctl.agent import manifest as manifests
from opsctl.agent import probes, systemd
from opsctl.agent.paths import Paths
from opsctl.agent.settings import Placement
from opsctl.agent.systemd import Run, Unit
from opsctl.errors import OpsctlError
from opsctl.serving import adapter
from opsctl.serving.adapter import Adapter

POLL_S = 0.2
BETWEEN_TRIES = "auto-restart"  # systemd waits before it starts a unit again: there is no process


def is_idle(unit: Unit, running: int | None, waiting: int | None) -> bool:
    """An engine that does not say what it has may have anything: one that hangs is not idle. Pure."""
    if not unit.busy or unit.sub == BETWEEN_TRIES:
        return True
    return running == 0 and waiting == 0


def wait_until_idle(paths: Paths, placement: Placement, wait_s: float, run: Run = systemd.run,
                    clock: Callable[[], float] = time.monotonic,
                    pause: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Waits ``wait_s`` seconds at the most; ``{"instance", "unit", "running", "waiting", "idle"}``, what it saw last.

    Raises:
        OpsctlError: systemd does not answer.
    """
    until = clock() + wait_s
    while True:
        running, waiting = in_flight(paths, placement)
        unit = systemd.show([placement.unit], run)[placement.unit]  # afterwards: what just ended answers nothing
        idle = is_idle(unit, running, waiting)
        if idle or clock() >= until:
            return {"instance": placement.instance, "unit": unit.active, "running": running, "waiting": waiting,
                    "idle": idle}
        pause(POLL_S)


def in_flight(paths: Paths, placement: Placement) -> tuple[int | None, int | None]:
    """Running and waiting requests of the engine; None where it does not say."""
    engine = engine_of(paths, placement)
    return (None, None) if engine is None else probes.in_flight(placement, engine)


def engine_of(paths: Paths, placement: Placement) -> Adapter | None:
    """By the manifest of what the instance serves; None when that cannot be read or this agent does not know it."""
    try:
        current = paths.current(placement.service, placement.index)
        return adapter(manifests.parse((current / manifests.MANIFEST).read_bytes()).engine.name)
    except (OSError, OpsctlError):
        return None
