"""The words of the guard. Plain data: temperatures in Celsius, times in seconds of the boot clock.

A margin is signed: degrees until the driver begins to slow the GPU down; 0 or less: it does. The hardware halves the
clocks at ``slowdown_margin_c`` and switches the GPU off at ``shutdown_margin_c``, both negative.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal


class Rung(IntEnum):
    """A step of the ladder; the higher, the less the instance does."""

    NORMAL = 0
    LESS = 1  # weight 70 %
    SLOWED = 2  # clocks 80 %, weight 30 %
    LEAST = 3  # clocks at the safe minimum, weight 1 %
    STOP = 4  # an orderly stop: the engine finishes what it has
    STOP_NOW = 5

    @property
    def word(self) -> str:
        return WORDS[self]


WORDS = {Rung.NORMAL: "normal", Rung.LESS: "less", Rung.SLOWED: "slowed", Rung.LEAST: "least", Rung.STOP: "stop",
         Rung.STOP_NOW: "stop-now"}
Mode = Literal["auto", "observe", "enforce"]  # auto: observes on a host's first day, then enforces


@dataclass(frozen=True)
class Reading:
    """One GPU at a moment; None: it has no such number. ``state`` is ``ok``, ``lost`` or ``unreadable``."""

    uuid: str
    index: int
    at_s: float
    state: str = "ok"
    temperature_c: float | None = None
    margin_c: float | None = None
    margin_source: str = ""  # margin_api, fields, thresholds, configured
    slowdown_margin_c: float = -2.0
    shutdown_margin_c: float = -8.0
    memory_margin_c: float | None = None  # to the memory's own maximum
    reasons: int = 0  # bits of NVML's clock event reasons
    clock_max_mhz: int | None = None


@dataclass(frozen=True)
class Trend:
    """Where a GPU is going. ``time_to_slowdown_s``: until the hardware slows it down; None: it does not go there."""

    slope_c_per_s: float | None = None
    time_to_slowdown_s: float | None = None


@dataclass(frozen=True)
class Pool:
    """The service's other instances, as its load balancers see them.

    ``others``: how many get requests at a weight above 1 %, the least that any load balancer says; None: a page could
    not be read. ``words`` say why.
    """

    others: int | None = None
    min_serving: int = 1
    words: str = ""


@dataclass(frozen=True)
class Situation:
    """What is known of one instance now. ``age_s`` is that of the last good sample.

    ``missing``: UUIDs of its GPUs that are lost or not there, while the samples are young. ``alive``: its unit runs.
    """

    now_s: float
    readings: tuple[Reading, ...]
    trends: Mapping[str, Trend]
    age_s: float
    missing: tuple[str, ...] = ()
    pool: Pool = field(default_factory=Pool)
    alive: bool = True
    enforcing: bool = True


@dataclass(frozen=True)
class Memory:
    """What the guard remembers of an instance from one decision to the next."""

    rung: Rung = Rung.NORMAL
    since_s: float = 0.0  # when it came to this rung
    calm_since_s: float | None = None  # since when it might climb
    descents_s: tuple[float, ...] = ()  # times of the last ways down from normal, for flapping
    latched: bool = False  # it flapped: it does not climb until a person says so
    stopped: bool = False  # the guard stopped its unit
    climbed: bool = False  # since its last way down: the next one counts
    stop_counted_s: float | None = None  # of descents_s, the one that this way down has for its stop
    told_stop_s: float | None = None  # when its unit was last told to stop, until it did or has not


@dataclass(frozen=True)
class Decision:
    """What to do. ``wanted`` is the rung that heat alone asks for; ``rung`` what it came to.

    ``weight`` per cent, between 1 and 100; ``down``: not empty, the instance cannot serve, and why. ``clock_percent``:
    of the highest clock; None: leave the clocks to the driver. In observe mode clocks and stops are decided, and
    ``acts`` is False: whoever carries it out leaves them alone. ``start``: the unit that the guard stopped is to
    run again; never in observe mode. ``stop`` is said for some seconds, and again each minute while it helps.
    """

    rung: Rung
    wanted: Rung
    weight: int
    down: str = ""
    clock_percent: int | None = None
    stop: Literal["", "drain", "now"] = ""
    start: bool = False
    acts: bool = True
    reasons: tuple[str, ...] = ()  # sentences for a person, the worst first


@dataclass(frozen=True)
class Policy:
    """The numbers of the guard; ``/etc/opsctl/guard.toml`` may say others, key by key.

    Where they come from: docs/guard.md, and ``python -m tests.bench.guard``, which tries them on the simulated plant.
    """

    less_margin_c: float = 3.0
    # Below 0 they are told for limits of -2 (slowdown) and -8 (shutdown), and stretched to a GPU's own.
    slowed_margin_c: float = -1.5
    least_margin_c: float = -2.0
    stop_margin_c: float = -4.0
    stop_now_margin_c: float = -7.0
    memory_climb_margin_c: float = 6.0
    memory_less_margin_c: float = 2.0
    memory_slowed_margin_c: float = -2.0
    memory_least_margin_c: float = -4.0
    jump_margin_c: float = 10.0  # a slope counts from here on; further away it is a load that begins
    slowed_time_s: float = 3.0  # jump there when the slowdown is nearer
    least_time_s: float = 2.0
    climb_margin_c: float = 8.0  # up again only with this, and no rising slope
    climb_dwell_s: float = 30.0  # for each rung
    stop_after_s: float = 2.0  # at LEAST for so long before a stop, so that load balancers and other hosts have seen it
    less_weight: int = 70
    slowed_weight: int = 30
    least_weight: int = 1
    slowed_clock_percent: int = 80
    slowed_clock_step_percent: int = 15  # SLOWED is slower by this for each way down after the first
    least_clock_percent: int = 35
    flap_descents: int = 4
    flap_window_s: float = 1800.0
    hold_age_s: float = 5.0
    halve_age_s: float = 15.0
    least_age_s: float = 45.0
    fallback_max_operating_c: float = 83.0  # where a GPU tells neither margin nor thresholds
    observe_s: float = 86400.0
