"""Documents of a guard as the agent writes them (``/run/opsctl/agent/guard.json``), for tests of what reads them."""

from __future__ import annotations

from typing import Any

from opsctl.agent.guard.model import Policy

# Numbers of these tests' own: those of the guard are tuned by others.
POLICY = Policy(
    less_margin_c=3.0, slowed_margin_c=-1.0, least_margin_c=-2.0, stop_margin_c=-4.0, stop_now_margin_c=-7.0,
    memory_less_margin_c=4.0, memory_slowed_margin_c=1.0, memory_least_margin_c=-1.0, memory_climb_margin_c=6.0,
    slowed_time_s=4.0, least_time_s=2.0, climb_margin_c=8.0, climb_dwell_s=30.0, stop_after_s=2.0, less_weight=70,
    slowed_weight=30, least_weight=1, slowed_clock_percent=80, least_clock_percent=35, flap_descents=4,
    flap_window_s=1800.0, hold_age_s=5.0, halve_age_s=15.0, least_age_s=45.0)
WALL = 1_795_384_800.0  # 2026-11-22 22:00:00 UTC
GPU_0, GPU_1 = "GPU-11111111-1111-1111-1111-111111111111", "GPU-22222222-2222-2222-2222-222222222222"


def gpu(index: int = 0, /, **changes: Any) -> dict[str, Any]:
    return {"uuid": (GPU_0, GPU_1)[index], "index": index, "model": "NVIDIA H200", "instance": "chat.0", "state": "ok",
            "temperature_c": 61.0, "margin_c": 26.0, "margin_source": "margin_api", "memory_margin_c": 30.0,
            "slope_c_per_s": 0.0, "time_to_slowdown_s": None, "power_w": 412.3, "clock_mhz": 1980,
            "clock_max_mhz": 1980, "clock_limit_mhz": None, "power_limit_set_w": None, "utilisation_percent": 93,
            "memory_used_mib": 122_880.0, "memory_total_mib": 143_771.0, "reasons": []} | changes


def instance(**changes: Any) -> dict[str, Any]:
    return {"instance": "chat.0", "service": "chat", "rung": 0, "word": "normal", "wanted": 0, "weight": 100,
            "down": "", "clock_percent": None, "stop": "", "acts": True, "latched": False, "stopped": False,
            "since_s": 7200.0, "pool": {"others": 1, "min_serving": 1, "words": ""}, "reasons": [], "moves": [],
            "moves_total": {"down": 0, "up": 0}} | changes


def document(*, gpus: list[dict[str, Any]] | None = None, instances: list[dict[str, Any]] | None = None,
             **changes: Any) -> dict[str, Any]:
    """As the keeper writes it, at boot second 5000."""
    return {"schema": "opsctl.guard/v1", "at_boot_s": 5000.0, "mode": "auto", "enforcing": True, "observed_s": 90_000.0,
            "observe_s": 86_400.0, "setter": "", "gpus": [gpu(0), gpu(1)] if gpus is None else gpus,
            "instances": [instance()] if instances is None else instances} | changes


def seen(age_s: float | None = 0.4, sample_age_s: float | None = 0.6, words: str = "", **changes: Any
         ) -> dict[str, Any]:
    """As ``opsctl-host guard`` passes it on."""
    found = document(**changes)
    found.pop("at_boot_s")
    found["gpus"] = [{"power_limit_w": 700.0, **one} for one in found["gpus"]]
    return {**found, "ordered": found["mode"], "age_s": age_s, "sample_age_s": sample_age_s, "words": words}


def hot(index: int = 0, margin_c: float = -1.0, **changes: Any) -> dict[str, Any]:
    """A GPU that the driver slows down and the guard has limited."""
    return gpu(index, **{"temperature_c": 87.0 - margin_c, "margin_c": margin_c, "slope_c_per_s": 0.4,
                         "time_to_slowdown_s": 2.5, "clock_mhz": 1584, "clock_limit_mhz": 1584,
                         "reasons": ["thermal slowdown"], **changes})


def slowed(**changes: Any) -> dict[str, Any]:
    """An instance at rung 2."""
    return instance(**{
        "rung": 2, "word": "slowed", "wanted": 2, "weight": 30, "clock_percent": 80, "since_s": 12.0,
        "reasons": ["GPU 0: margin -1 °C, at most -1 °C: slowed"],
        "moves": [{"at": WALL - 20, "from": 0, "to": 1, "words": "GPU 0: margin 3 °C, at most 3 °C: less"},
                  {"at": WALL - 12, "from": 1, "to": 2, "words": "GPU 0: margin -1 °C, at most -1 °C: slowed"}],
        "moves_total": {"down": 2, "up": 0}, **changes})
