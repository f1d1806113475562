"""From the CPU time of an instance to the load of its GPUs, and back to how much CPU time it may have. Pure.

A GPU is fully busy at its maximum clock when its instance computes ``FULL_LOAD_CPUS`` seconds a second. At a lower
clock it is fully busy with less, and the instance may have no more: that is what slows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

FULL_LOAD_CPUS = 0.5  # low, so that one engine of several on two cores can make its GPU fully busy
SMOOTHING_S = 1.0
MEMORY_S = 10.0  # how long the rate of an instance at full clock is remembered
FULL_SHARE = 0.995  # from here on nothing is held back
MEMORY_LOAD = 0.6  # how busy memory is for a GPU that is fully busy


@dataclass(frozen=True, slots=True)
class Use:
    """What an instance does: CPU seconds a second, smoothed; ``free_rate`` was its rate when nothing held it back."""

    rate: float = 0.0
    free_rate: float = 0.0


def observe(use: Use, cpu_s: float, seconds: float, share: float) -> Use:
    """After ``seconds`` in which the instance computed ``cpu_s``, on GPUs at ``share`` of their clock."""
    if seconds <= 0:
        return use
    now = cpu_s / seconds
    rate = use.rate + (now - use.rate) * -math.expm1(-seconds / SMOOTHING_S)
    if share < FULL_SHARE:
        return replace(use, rate=rate)
    kept = use.free_rate * math.exp(-seconds / MEMORY_S)
    return Use(rate, max(rate, kept))


def load_of(use: Use, share: float) -> float:
    """How busy the instance keeps each of its GPUs, 0 to 1, at the clock they have."""
    return min(1.0, use.rate / (FULL_LOAD_CPUS * max(share, 0.01)))


def cpu_limit(use: Use, share: float) -> float | None:
    """CPU seconds a second that the instance may have; None: as many as it likes."""
    if share >= FULL_SHARE:
        return None
    return share * max(FULL_LOAD_CPUS, use.free_rate)


def visible_gpus(setting: str | None, uuids: Sequence[str]) -> tuple[int, ...]:
    """Indexes of the GPUs that a process sees, from its CUDA_VISIBLE_DEVICES, as CUDA reads it.

    None: all. Indexes, or UUIDs or the beginning of one; the first that is none of these ends the list.
    """
    if setting is None:
        return tuple(range(len(uuids)))
    found: list[int] = []
    for word in (part.strip() for part in setting.split(",")):
        if word.isdigit() and int(word) < len(uuids):
            found.append(int(word))
            continue
        matches = [index for index, uuid in enumerate(uuids) if word.startswith("GPU-") and uuid.startswith(word)]
        if len(matches) != 1:
            break
        found.append(matches[0])
    return tuple(dict.fromkeys(found))
