"""What a guard did over some time, from one document of it after the other: steps, and a report at the end. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from opsctl.agent.guard.model import WORDS, Rung
from opsctl.guarding.rows import margin, slowed_by, worst


@dataclass(frozen=True)
class Step:
    """An instance came to another rung, weight or word. ``at_s`` counts from the beginning of the story."""

    at_s: float
    instance: str
    rung: int
    word: str
    weight: int
    clocks: str
    margin_c: float | None
    why: str

    @property
    def words(self) -> str:
        """``7.5 s  chat.0  slowed  weight 30 %, clocks 80 %, margin -1 °C: GPU 0 ...``."""
        left = "" if self.margin_c is None else f", margin {self.margin_c:.0f} °C"
        clocks = f", clocks {self.clocks}" if self.clocks else ""
        return (f"{self.at_s:6.1f} s  {self.instance}  {self.word:<8} weight {self.weight:>3} %{clocks}{left}"
                + (f": {self.why}" if self.why else ""))


@dataclass(frozen=True)
class Report:
    """``first_s``: until the first step down; ``normal_s``: from the mending until all were normal; None: never."""

    first_s: float | None
    deepest: Mapping[str, str]
    hardware_s: float
    normal_s: float | None
    least_margin_c: float | None
    hottest_c: float | None
    stopped: tuple[str, ...]
    latched: tuple[str, ...]
    lost: tuple[int, ...]
    setter: str = ""  # what was wrong with it

    def as_document(self) -> dict[str, Any]:
        return asdict(self)


class Story:
    """Takes documents in the order of time, the first one before anything happens."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._now: dict[str, tuple[int, int, str, bool]] = {}
        self._deepest: dict[str, int] = {}
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._slow = False
        self._hardware_s = 0.0
        self._margins: list[float] = []
        self._hottest: list[float] = []
        self._stopped: dict[str, None] = {}
        self._latched: dict[str, None] = {}
        self._lost: dict[int, None] = {}
        self._normal_since_s: float | None = None
        self._setter = ""

    def see(self, at_s: float, answer: Mapping[str, Any]) -> list[Step]:
        """The steps that this document adds."""
        self._measure(at_s, answer)
        new = []
        for one in answer["instances"]:
            now = (one["rung"], one["weight"], one["down"], one["latched"])
            before = self._now.get(one["instance"])
            self._now[one["instance"]] = now
            self._deepest[one["instance"]] = max(self._deepest.get(one["instance"], 0), one["rung"])
            self._stopped |= {one["instance"]: None} if one["stopped"] else {}
            self._latched |= {one["instance"]: None} if one["latched"] else {}
            if before is None or before == now:
                continue
            if self._first_s is None and (one["rung"] > before[0] or one["weight"] < before[1]):
                self._first_s = at_s
            new.append(_step(at_s, one, answer))
        self.steps += new
        return new

    @property
    def normal(self) -> bool:
        """All instances are as they should be."""
        return all(rung == 0 and weight == 100 and not down for rung, weight, down, _ in self._now.values())

    def report(self, mended_s: float) -> Report:
        since = self._normal_since_s
        return Report(
            self._first_s, {name: WORDS[Rung(rung)] for name, rung in self._deepest.items()},
            round(self._hardware_s, 2), None if since is None else round(max(0.0, since - mended_s), 1),
            min(self._margins, default=None), max(self._hottest, default=None), tuple(self._stopped),
            tuple(self._latched), tuple(self._lost), self._setter)

    def _measure(self, at_s: float, answer: Mapping[str, Any]) -> None:
        if self._slow and self._last_s is not None:
            self._hardware_s += at_s - self._last_s
        self._last_s = at_s
        self._setter = answer["setter"] or self._setter
        self._slow = any(slowed_by(gpu) == "hardware" for gpu in answer["gpus"])
        self._lost |= {gpu["index"]: None for gpu in answer["gpus"] if gpu["state"] == "lost"}
        self._margins += [left for gpu in answer["gpus"] if (left := margin(gpu)) is not None]
        self._hottest += [gpu["temperature_c"] for gpu in answer["gpus"] if gpu["temperature_c"] is not None]
        down = any(one["rung"] or one["weight"] < 100 or one["down"] for one in answer["instances"])
        if down:
            self._normal_since_s = None
        elif self._normal_since_s is None:
            self._normal_since_s = at_s


def _step(at_s: float, one: Mapping[str, Any], answer: Mapping[str, Any]) -> Step:
    gpus = [gpu for gpu in answer["gpus"] if gpu["instance"] == one["instance"]]
    clocks = "" if one["clock_percent"] is None else f"{one['clock_percent']} %"  # the setter may need a moment yet
    why = one["down"] if one["down"] and not one["reasons"] else next(iter(one["reasons"]), "")
    return Step(round(at_s, 2), one["instance"], one["rung"], WORDS[Rung(one["rung"])], one["weight"],
                clocks if one["acts"] or not clocks else f"{clocks} only decided", margin(worst(gpus) or {}), why)


def report_lines(report: Report, *, for_s: float, real: bool) -> list[str]:
    """The report as sentences; ``real``: it happened, and was not only reckoned."""
    first = "it did not react" if report.first_s is None else f"first reaction after {report.first_s:.1f} s"
    lines = [first, "deepest rung: " + ", ".join(f"{name} {word}" for name, word in report.deepest.items())]
    if report.least_margin_c is not None:
        lines.append(f"least margin {report.least_margin_c:.0f} °C; hottest {report.hottest_c or 0:.0f} °C")
    about = "about " if real else ""
    lines.append(f"in hardware slowdown: {about}{report.hardware_s:.1f} s")
    if report.setter:
        lines.append(f"setter: {report.setter}: clocks and stops had no effect")
    if report.stopped:
        lines.append(f"stopped by the guard: {', '.join(report.stopped)}")
    if report.lost:
        lines.append(f"switched off by the hardware: {', '.join(f'GPU {index}' for index in report.lost)}")
    if report.latched:
        lines.append(f"latched: {', '.join(report.latched)}; opsctl guard unlatch lets it climb")
    back = "not back to normal" if report.normal_s is None else f"back to normal {report.normal_s:.0f} s"
    return [*lines, f"{back} after the end of {for_s:.0f} s of bad cooling"]
