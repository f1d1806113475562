"""GPUs in ``opsctl status``: a line for each host, or for each GPU, the worst first; and what is wrong with them. Pure.

They come from ``opsctl-host state`` (``gpus``; docs/exporter.md has the document).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsctl.errors import OpsctlError

STALE_S = 15.0
MIB_PER_GIB = 1024
GPU_STATES = frozenset({"ok", "lost", "unreadable", "missing"})  # of a host whose GPUs can be seen

States = Mapping[str, Mapping[str, Any] | OpsctlError]


@dataclass(frozen=True)
class Line:
    """One line of the table, all in words. ``level``: ``good``, ``warning`` or ``bad``."""

    host: str
    gpus: str  # "8 x H200", or "GPU 3 H200"
    temperature: str = ""
    power: str = ""
    utilisation: str = ""
    memory: str = ""
    note: str = ""
    level: str = "good"
    instance: str = ""  # of one GPU


def gpus_of(states: States) -> dict[str, dict[str, Any]]:
    """By host, what hosts with GPUs say of them; ``stale`` says that the numbers are old."""
    found = {}
    for host, state in states.items():
        if not isinstance(state, OpsctlError) and state.get("gpus"):
            told = dict(state["gpus"])
            found[host] = {**told, "stale": is_stale(told)}
    return found


def is_stale(told: Mapping[str, Any]) -> bool:
    age_s = told.get("age_s")
    return told["state"] not in GPU_STATES or age_s is None or age_s > STALE_S


def lines(gpus: Mapping[str, Mapping[str, Any]], *, each: bool = False) -> list[Line]:
    """A line for each host, of its worst GPU; with ``each`` one for each GPU."""
    found = []
    for host, told in gpus.items():
        devices = sorted(told["devices"], key=badness)
        if not devices or (told["stale"] and not each):
            found.append(_host_line(host, told, None))
        elif each:
            found += [_device_line(host, told, one) for one in devices]
            found += [Line(host, uuid, note="missing", level="bad") for uuid in told["missing"]]
        else:
            found.append(_host_line(host, told, devices[0]))
    return found


def badness(device: Mapping[str, Any]) -> tuple[Any, ...]:
    """A key that sorts the worst GPU first: lost, slowed down, with errors, least margin, hottest."""
    margin = device["margin_c"]
    return (device["state"] == "ok", not is_hot(device), not device["xids"], not device["words"],
            1000 if margin is None else margin, -(device["temperature_c"] or 0), device["index"])


def is_hot(device: Mapping[str, Any]) -> bool:
    """Its hardware or driver slows it down, for heat or because power fails, or is about to."""
    return ((device["margin_c"] is not None and device["margin_c"] <= 0)
            or any("thermal" in reason or "brake" in reason for reason in device["reasons"]))


def wrong(gpus: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Lost and missing GPUs, and hosts that cannot see theirs: as ``status.wrong``."""
    found = []
    for host, told in gpus.items():
        what = [f"GPU {one['index']} {one['state']}" for one in told["devices"] if one["state"] != "ok"]
        if told["stale"]:
            what = [f"GPUs {_stale_word(told)}"]
        elif told["missing"]:
            what.append(f"{len(told['missing'])} of {told['expected']} GPUs missing")
        found += [{"host": host, "instance": "", "what": one} for one in what]
    return found


def seen_wrong(told: Mapping[str, Any], instance: str, placed: Sequence[str]) -> str:
    """What is wrong with the GPUs of an instance, empty when nothing is: it has those placed to it, and no others."""
    if told["stale"]:
        return f"{_stale_word(told)}: {told['words']}"
    there = {one["uuid"]: one for one in told["devices"]}
    for uuid in placed:
        if uuid not in there:
            return f"no {uuid}"
        if there[uuid]["state"] != "ok":
            return f"{uuid} {there[uuid]['words']}"
    used = [uuid for uuid, one in there.items() if instance in one["users"]]
    foreign = [uuid for uuid in used if uuid not in placed]
    if foreign:
        return f"{instance} computes on {', '.join(foreign)}"
    left_out = [uuid for uuid in placed if uuid not in used]
    # one that computes on none is an engine of the CPU, or has not begun: whether it serves is looked at elsewhere
    return f"{instance} does not compute on {', '.join(left_out)}" if used and left_out else ""


def model(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``H100 80GB HBM3``."""
    return name.removeprefix("NVIDIA ").removeprefix("GeForce ").removeprefix("Tesla ")


def _host_line(host: str, told: Mapping[str, Any], worst: Mapping[str, Any] | None) -> Line:
    models = sorted({model(one["model"]) for one in told["devices"] if one["model"]})
    count = len(told["devices"]) or told["expected"]
    title = f"{count} x {' and '.join(models) or 'GPU'}"
    if told["stale"]:
        age = "" if told["age_s"] is None else f", last seen {told['age_s']:.0f} s ago"
        return Line(host, title, note=f"{_stale_word(told)}{age}: {told['words']}", level="bad")
    if worst is None:
        return Line(host, title, note=told["words"], level="bad")
    notes = [f"{len(told['missing'])} of {told['expected']} missing"] if told["missing"] else []
    shown = _device_line(host, told, worst)
    if shown.note:
        notes.append(f"GPU {worst['index']}: {shown.note}" if count > 1 else shown.note)
    return Line(host, title, shown.temperature, shown.power, shown.utilisation, shown.memory, "; ".join(notes),
                "bad" if told["missing"] else shown.level)


def _device_line(host: str, told: Mapping[str, Any], one: Mapping[str, Any]) -> Line:
    title = f"GPU {one['index']} {model(one['model'])}".rstrip()
    errors = list(map(_xid_words, one["xids"]))
    if one["state"] != "ok":
        return Line(host, title, note=", ".join([f"{one['state']}: {one['words']}", *errors]), level="bad",
                    instance=one["instance"])
    notes = [*one["reasons"], *errors, *filter(None, [one["words"]])]
    if told["stale"]:
        notes.insert(0, _stale_word(told))
    margin = "" if one["margin_c"] is None else f" (margin {one['margin_c']:.0f})"
    temperature = "" if one["temperature_c"] is None else f"{one['temperature_c']:.0f} °C{margin}"
    return Line(host, title, temperature, _of(one["power_w"], one["power_limit_w"], "W"),
                "" if one["utilisation_percent"] is None else f"{one['utilisation_percent']:.0f} %",
                _of(_gib(one["memory_used_mib"]), _gib(one["memory_total_mib"]), "GiB"), ", ".join(notes),
                "warning" if is_hot(one) or errors or one["words"] or told["stale"] else "good", one["instance"])


def _xid_words(xid: Mapping[str, Any]) -> str:
    return f"XID {xid['xid']} x {xid['count']}" if xid["count"] > 1 else f"XID {xid['xid']}"


def _of(value: float | None, limit: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:.0f}/{limit:.0f} {unit}" if limit is not None else f"{value:.0f} {unit}"


def _gib(mib: float | None) -> float | None:
    return None if mib is None else mib / MIB_PER_GIB


def _stale_word(told: Mapping[str, Any]) -> str:
    return "stale" if told["state"] in GPU_STATES else str(told["state"]).replace("_", " ")
