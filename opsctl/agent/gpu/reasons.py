"""The bits of NVML's clock event reasons, in our labels and in words. Source: nvml.h, ``nvmlClocksEventReason*``."""

from __future__ import annotations

REASONS = (("idle", 0x1), ("app_clocks", 0x2), ("sw_power_cap", 0x4), ("hw_slowdown", 0x8), ("sync_boost", 0x10),
           ("sw_thermal_slowdown", 0x20), ("hw_thermal_slowdown", 0x40), ("hw_power_brake", 0x80), ("display", 0x100),
           ("board_limit", 0x200), ("reliability", 0x400))
WORDS = {"sw_power_cap": "power cap", "hw_slowdown": "hardware slowdown", "sw_thermal_slowdown": "thermal slowdown",
         "hw_thermal_slowdown": "hardware thermal slowdown", "hw_power_brake": "power brake",
         "board_limit": "voltage limit", "reliability": "reliability limit", "sync_boost": "follows a slower GPU"}


def bits(mask: int) -> dict[str, int]:
    """0 or 1 for each reason."""
    return {name: int(bool(mask & bit)) for name, bit in REASONS}


def words(mask: int) -> list[str]:
    """What slows it down, for people; idle and chosen clocks do not. An explained hardware slowdown goes without."""
    found = [name for name, bit in REASONS if mask & bit and name in WORDS]
    if {"hw_thermal_slowdown", "hw_power_brake"} & set(found):
        found = [name for name in found if name != "hw_slowdown"]
    return [WORDS[name] for name in found]
