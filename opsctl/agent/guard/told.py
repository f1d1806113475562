"""What the guard tells everybody: ``/run/opsctl/agent/guard.json``. The document is built here, pure, and passed on as
it is by ``opsctl-host guard``, to ``opsctl guard`` and ``opsctl top``, and to the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opsctl.agent.gpu import reasons
from opsctl.agent.guard.model import Decision, Memory, Mode, Pool, Reading, Trend

SCHEMA = "opsctl.guard/v1"
MOVES_KEPT = 20


@dataclass
class Course:
    """How one instance came to where it is. ``moves``: ``{"at", "from", "to", "words"}``, the newest last."""

    moves: list[dict[str, Any]] = field(default_factory=list)
    down: int = 0
    up: int = 0

    def moved(self, before: int, after: int, words: str, wall: float) -> None:
        self.moves = [*self.moves, {"at": wall, "from": before, "to": after, "words": words}][-MOVES_KEPT:]
        self.down += after > before
        self.up += after < before


def instance(name: str, memory: Memory, decision: Decision, pool: Pool, course: Course, now_s: float
             ) -> dict[str, Any]:
    """One instance; ``since_s`` is for how long it has been on its rung."""
    return {
        "instance": name, "service": name.rpartition(".")[0], "rung": int(decision.rung), "word": decision.rung.word,
        "wanted": int(decision.wanted), "weight": decision.weight, "down": decision.down,
        "clock_percent": decision.clock_percent, "stop": decision.stop, "acts": decision.acts,
        "latched": memory.latched, "stopped": memory.stopped, "since_s": round(max(0.0, now_s - memory.since_s), 1),
        "pool": {"others": pool.others, "min_serving": pool.min_serving, "words": pool.words},
        "reasons": list(decision.reasons), "moves": course.moves,
        "moves_total": {"down": course.down, "up": course.up},
    }


def gpu(sample: Mapping[str, Any], reading: Reading | None, trend: Trend, owner: str, limits: Mapping[str, Any]
        ) -> dict[str, Any]:
    """One GPU; null: it has none. ``limits``: what the guard has set on it, ``max_mhz`` and ``watts``."""
    number = sample.get
    return {
        "uuid": number("uuid", ""), "index": sample["index"], "model": number("name", ""), "instance": owner,
        "state": sample["state"], "temperature_c": number("temperature_c"),
        "margin_c": reading.margin_c if reading else None,
        "margin_source": reading.margin_source if reading else "",
        "memory_margin_c": reading.memory_margin_c if reading else None,
        "slope_c_per_s": _rounded(trend.slope_c_per_s), "time_to_slowdown_s": _rounded(trend.time_to_slowdown_s),
        "power_w": number("power_w"), "clock_mhz": number("clock_sm_mhz"), "clock_max_mhz": number("clock_sm_max_mhz"),
        "clock_limit_mhz": limits.get("max_mhz"), "power_limit_set_w": limits.get("watts"),
        "utilisation_percent": number("utilisation_percent"), "memory_used_mib": number("memory_used_mib"),
        "memory_total_mib": number("memory_total_mib"), "reasons": reasons.words(number("reasons", 0)),
    }


def document(now_s: float, mode: Mode, enforcing: bool, observed_s: float, observe_s: float, setter: str,
             gpus: Sequence[Mapping[str, Any]], instances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``setter``: empty, or what is wrong with it."""
    return {"schema": SCHEMA, "at_boot_s": now_s, "mode": mode, "enforcing": enforcing,
            "observed_s": round(observed_s, 1), "observe_s": observe_s, "setter": setter, "gpus": list(gpus),
            "instances": list(instances)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
