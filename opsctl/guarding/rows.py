"""What hosts say of their guard as rows: an instance each for ``opsctl guard status``, a GPU each for ``opsctl top``.

Pure. Numbers stay numbers here; ``opsctl/cli/guard_view.py`` and ``top_view.py`` make words and bars of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from opsctl.agent.guard.model import WORDS, Rung
from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.placements import place

if TYPE_CHECKING:
    from opsctl.guarding.looking import Answer

STALE_S = 15.0  # of the last good sample; as status_gpus
NEAR_C = 8.0  # a margin that is worth a colour
HARDWARE = ("hardware slowdown", "hardware thermal slowdown", "power brake")
DRIVER = "thermal slowdown"
LEVELS = ("good", "warning", "bad")
FULL = 100


@dataclass(frozen=True)
class InstanceRow:
    """One instance; ``rung`` None: nobody knows. ``gpu`` is the index of its worst one; ``level``: one of LEVELS."""

    host: str
    instance: str
    rung: int | None = None
    word: str = "unknown"
    weight: int | None = None
    clocks: str = ""
    gpu: int | None = None
    margin_c: float | None = None
    time_to_slowdown_s: float | None = None
    mode: str = ""
    why: str = ""
    down: str = ""
    latched: bool = False
    stopped: bool = False
    level: str = "good"

    def as_document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GpuRow:
    """One GPU. ``slowed_by``: ``guard``, ``driver`` or ``hardware``, or empty; ``note`` what else is to be said."""

    host: str
    index: int
    model: str = ""
    instance: str = ""
    state: str = "ok"
    temperature_c: float | None = None
    margin_c: float | None = None
    memory_margin_c: float | None = None
    slope_c_per_s: float | None = None
    time_to_slowdown_s: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    clock_mhz: float | None = None
    clock_max_mhz: float | None = None
    clock_limit_mhz: float | None = None
    slowed_by: str = ""
    utilisation_percent: float | None = None
    memory_used_mib: float | None = None
    memory_total_mib: float | None = None
    rung: int | None = None
    word: str = ""
    weight: int | None = None
    latched: bool = False
    note: str = ""
    level: str = "good"

    def as_document(self) -> dict[str, Any]:
        return asdict(self)


def margin(gpu: Mapping[str, Any]) -> float | None:
    """The lesser of what a GPU's core and memory have left; None: it tells neither."""
    return min((value for value in (gpu.get("margin_c"), gpu.get("memory_margin_c")) if value is not None),
               default=None)


def worst(gpus: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The GPU with the least margin; a lost one before all, one that tells nothing last."""
    def badness(gpu: Mapping[str, Any]) -> tuple[bool, float]:
        left = margin(gpu)
        return gpu["state"] == "ok", float("inf") if left is None else left
    return min(gpus, key=badness, default=None)


def mode_words(document: Mapping[str, Any]) -> str:
    """``enforces``, ``observes``, ``observes, 18 h more``: what it does now and, on a host's first day, how long."""
    if document["mode"] != "auto":
        return "enforces" if document["enforcing"] else "observes"
    if document["enforcing"]:
        return "enforces (auto)"
    left_s = max(0.0, (document["observe_s"] or 0.0) - document["observed_s"])
    return f"observes (auto, {hours(left_s)} more)" if document["observe_s"] is not None else "auto"


def hours(seconds: float) -> str:
    """``18 h``, ``25 min``, ``40 s``."""
    if seconds >= 5400:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def clock_words(instance: Mapping[str, Any], gpus: Sequence[Mapping[str, Any]]) -> str:
    """``at most 80 %, 1584 MHz``; ``80 % not acted on``, in observe mode; ``not in force``, where the setter fails."""
    percent = instance["clock_percent"]
    limits = [one["clock_limit_mhz"] for one in gpus if one.get("clock_limit_mhz") is not None]
    if percent is None:
        return f"at most {min(limits)} MHz" if limits else ""
    if not instance["acts"]:
        return f"{percent} % only decided"
    return f"at most {percent} %, {min(limits)} MHz" if limits else f"{percent} % not in force"


def instance_rows(fleet: Fleet, hosts: Sequence[Host], answers: Mapping[str, Answer]) -> list[InstanceRow]:
    """A row for each instance on ``hosts`` that has GPUs, in the order of the hosts; the others have no guard."""
    placed = place(fleet)
    found = []
    for host in hosts:
        answer = answers[host.name]
        names = [placement.instance for placement in placed if placement.host == host.name
                 and (fleet.service(placement.service).gpus_per_instance or _knows(answer, placement.instance))]
        if isinstance(answer, OpsctlError):
            word = "unreachable" if answer.code == "host.unreachable" else "unknown"
            found += [InstanceRow(host.name, name, word=word, why=answer.message, level="bad") for name in names]
            continue
        told = {one["instance"]: one for one in answer["instances"]}
        found += [_instance_row(host.name, told[name], answer) if name in told else
                  InstanceRow(host.name, name, mode=mode_words(answer), level="bad",
                              why=answer["words"] or "its guard does not know it: opsctl provision") for name in names]
    return found


def _knows(answer: Answer, instance: str) -> bool:
    return not isinstance(answer, OpsctlError) and any(one["instance"] == instance for one in answer["instances"])


def _instance_row(host: str, one: Mapping[str, Any], answer: Mapping[str, Any]) -> InstanceRow:
    gpus = [gpu for gpu in answer["gpus"] if gpu["instance"] == one["instance"]]
    hottest = worst(gpus) or {}
    times = [gpu["time_to_slowdown_s"] for gpu in gpus if gpu["time_to_slowdown_s"] is not None]
    rung = Rung(one["rung"])
    return InstanceRow(
        host, one["instance"], int(rung), WORDS[rung], one["weight"], clock_words(one, gpus), hottest.get("index"),
        margin(hottest), min(times, default=None), mode_words(answer), "; ".join(_why(one, answer)),
        one["down"], one["latched"], one["stopped"], instance_level(one, answer))


def _why(one: Mapping[str, Any], answer: Mapping[str, Any]) -> list[str]:
    """The worst first: what makes the rest doubtful, then what to do something about, then the guard's own reason."""
    said = [answer["words"]] if answer["words"] else []
    if is_old(answer):
        said.append(f"the GPUs were last seen {answer['sample_age_s']:.0f} s ago")
    if one["down"]:
        said.append(f"down: {one['down']}")
    if one["stopped"]:
        said.append("stopped by the guard")
    if one["latched"]:
        said.append("flapped, and is kept here")
    said += one["reasons"][:1] if one["rung"] or one["wanted"] else []
    return [*said, *([f"setter: {answer['setter']}"] if answer["setter"] else [])]


def instance_level(one: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
    if one["down"] or one["stopped"] or one["rung"] >= Rung.STOP or answer["words"]:
        return "bad"
    warned = one["rung"] or one["wanted"] or one["latched"] or answer["setter"] or is_old(answer)
    return "warning" if warned else "good"


def is_old(answer: Mapping[str, Any]) -> bool:
    return answer["sample_age_s"] is not None and answer["sample_age_s"] > STALE_S


def gpu_rows(hosts: Sequence[Host], answers: Mapping[str, Answer | None], *, by_margin: bool = False) -> list[GpuRow]:
    """A row for each GPU, in the order of the hosts, or the least margin first; GPUs that are lost before all.

    An answer of None: the host has not said anything yet, and has no row.
    """
    found = []
    for host in hosts:
        answer = answers.get(host.name)
        if answer is not None and not isinstance(answer, OpsctlError):
            instances = {one["instance"]: one for one in answer["instances"]}
            found += [_gpu_row(host.name, gpu, instances.get(gpu["instance"]), answer)
                      for gpu in sorted(answer["gpus"], key=lambda one: one["index"])]
    return sorted(found, key=_heat) if by_margin else found


def _heat(row: GpuRow) -> tuple[bool, float, str, int]:
    left = margin(asdict(row))
    return row.state == "ok", float("inf") if left is None else left, row.host, row.index


def _gpu_row(host: str, gpu: Mapping[str, Any], one: Mapping[str, Any] | None, answer: Mapping[str, Any]) -> GpuRow:
    same = {key: gpu.get(key) for key in (
        "temperature_c", "margin_c", "memory_margin_c", "slope_c_per_s", "time_to_slowdown_s", "power_w",
        "power_limit_w", "clock_mhz", "clock_max_mhz", "clock_limit_mhz", "utilisation_percent", "memory_used_mib",
        "memory_total_mib")}
    notes = list(gpu["reasons"])
    if gpu.get("power_limit_set_w") is not None:
        notes.append(f"guard: at most {gpu['power_limit_set_w']:.0f} W")
    if answer["words"] or is_old(answer):
        notes.append("old" if answer["sample_age_s"] is None else f"{answer['sample_age_s']:.0f} s old")
    return GpuRow(
        host, gpu["index"], str(gpu.get("model") or "").removeprefix("NVIDIA "), gpu["instance"], gpu["state"],
        **same,
        slowed_by=slowed_by(gpu), rung=None if one is None else one["rung"],
        word="" if one is None else WORDS[Rung(one["rung"])], weight=None if one is None else one["weight"],
        latched=bool(one and one["latched"]), note=", ".join(notes), level=_gpu_level(gpu, one, answer))


def slowed_by(gpu: Mapping[str, Any]) -> str:
    """Who keeps a GPU's clocks down now; the hardware before the driver before the guard."""
    if any(reason in HARDWARE for reason in gpu["reasons"]):
        return "hardware"
    if DRIVER in gpu["reasons"]:
        return "driver"
    return "guard" if gpu.get("clock_limit_mhz") is not None else ""


def _gpu_level(gpu: Mapping[str, Any], one: Mapping[str, Any] | None, answer: Mapping[str, Any]) -> str:
    left = margin(gpu)
    if gpu["state"] != "ok" or slowed_by(gpu) == "hardware" or (one is not None and one["rung"] >= Rung.STOP):
        return "bad"
    warned = (left is not None and left <= 0) or slowed_by(gpu) or (one is not None and one["rung"]) or is_old(answer)
    return "warning" if warned or answer["words"] else "good"


def silent(hosts: Sequence[Host], answers: Mapping[str, Answer | None]) -> list[dict[str, str]]:
    """Hosts without an answer, or whose guard says nothing: ``{"host", "code", "words"}``."""
    found = []
    for host in hosts:
        answer = answers.get(host.name)
        if isinstance(answer, OpsctlError):
            found.append({"host": host.name, "code": answer.code, "words": answer.message})
        elif answer is not None and answer["words"]:
            found.append({"host": host.name, "code": "guard.silent", "words": answer["words"]})
    return found


def note(instance: str, answer: Mapping[str, Any]) -> str:
    """``guard: slowed, weight 30 %, clocks at most 80 %, 1584 MHz; ...``; empty when it does nothing to it."""
    one = next((one for one in answer["instances"] if one["instance"] == instance), None)
    if answer["words"]:
        return str(answer["words"])
    if one is None or (not one["rung"] and one["weight"] == FULL and not one["latched"] and not one["stopped"]):
        return ""
    gpus = [gpu for gpu in answer["gpus"] if gpu["instance"] == instance]
    clocks = clock_words(one, gpus)
    said = f"guard: {WORDS[Rung(one['rung'])]}, weight {one['weight']} %" + (f", clocks {clocks}" if clocks else "")
    return "; ".join([said, *_why(one, answer)])


def wrong(guards: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """What ``status --strict`` counts of the guards' documents by host: as ``status.wrong``."""
    found = []
    for host, answer in guards.items():
        if answer["words"]:
            found.append({"host": host, "instance": "", "what": "guard silent"})
        for one in answer["instances"]:
            rung = Rung(one["rung"])
            below = rung or one["weight"] < FULL
            what = [f"guard: {WORDS[rung]} ({one['weight']} %)"] if below and not one["stopped"] else []
            what += ["guard: latched"] if one["latched"] else []
            what += ["stopped by the guard"] if one["stopped"] else []
            found += [{"host": host, "instance": one["instance"], "what": said} for said in what]
    return found
