"""Turns what is known into the families that ``series.py`` lists; ``page.py`` writes them down. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsctl.agent.gpu import reasons
from opsctl.agent.gpu.page import Value, label, label_text
from opsctl.agent.gpu.reader import View
from opsctl.agent.gpu.series import GPU, GPU_LABELS, GUARD, HOST, MIG, MIG_LABELS, Series
from opsctl.agent.gpu.verdict import Verdict, unseen_uuids
from opsctl.agent.gpu.xids import Xids, grade_of, words_of

Entry = tuple[dict[str, str], float]  # labels that tell the values of one series of one GPU apart


@dataclass(frozen=True)
class Known:
    """All that a scrape may want, at one moment (``now``: the boot clock, seconds)."""

    host: str
    version: str
    view: View
    verdict: Verdict
    xids: Xids
    expected: Sequence[str]
    owners: Mapping[str, str]  # instance by UUID
    now: float
    guard: Mapping[str, Any] | None = None  # its document, as guard/told.py writes it


def values(known: Known) -> Iterator[tuple[Series, list[Value]]]:
    """Every series that has a value now, in the table's order, with its labels."""
    gpus = [enriched(known, gpu) for gpu in told_gpus(known)]
    of_gpu = [(gpu, label_text(labels_of(gpu))) for gpu in gpus]
    of_part = [(part, f"{labels},{label_text(part_labels(part))}")
               for gpu, labels in of_gpu for part in gpu.get("mig", ())]
    whole = [(gpu, labels) for gpu, labels in of_gpu if not gpu.get("mig")]
    for one in GPU:
        # of a GPU that is cut its parts alone, as DCGM has it: who adds up counts nothing twice
        yield from _family(one, [*whole, *of_part] if one in MIG else of_gpu, known.host)
    for several, numbers in ((GUARD, guard_numbers(known)), (HOST, host_numbers(known))):
        for one in several:
            yield from _family(one, [(numbers, "")], known.host)


def _family(one: Series, things: Sequence[tuple[Mapping[str, Any], str]], host: str
            ) -> Iterator[tuple[Series, list[Value]]]:
    host_text = ",".join(label(name, host) for name in one.host_labels)
    found = []
    for thing, labels in things:
        before = f"{labels},{host_text}" if labels else host_text
        found += [(f"{before},{label_text(more)}" if more else before, value) for more, value in entries(one, thing)]
    if found:
        yield one, found


def told_gpus(known: Known) -> list[dict[str, Any]]:
    """Those of the last sample while it counts; of the others only who they are, if they had errors."""
    fresh = known.view.fresh(known.now)
    found = known.view.gpus_now() if fresh else []
    there = {gpu.get("pci") for gpu in found}
    for pci in sorted(known.xids.addresses() - there):
        of_old = known.view.gpus.get(pci, {})
        found.append({key: of_old[key] for key in ("index", "uuid", "name") if key in of_old} | {
            "pci": pci, "state": "gone"})
    there = {gpu.get("uuid") for gpu in found}
    for gpu in (known.guard or {}).get("gpus", ()):  # what we set stays set while nothing is read
        if gpu["uuid"] not in there and (gpu["clock_limit_mhz"] or gpu["power_limit_set_w"]):
            of_old = {one.get("uuid", ""): one["pci"] for one in known.view.gpus.values()}
            found.append({"index": gpu["index"], "uuid": gpu["uuid"], "name": gpu["model"],
                          "pci": of_old.get(gpu["uuid"], ""), "state": "gone"})
    return found


def enriched(known: Known, gpu: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with what does not come from NVML."""
    pci = gpu.get("pci", "")
    errors = known.xids.of(pci)
    more: dict[str, Any] = {"xid_counts": [(_xid_labels(xid), one.count) for xid, one in errors.items()],
                            "xid_times": [(_xid_labels(xid), known.xids.wall(one.at)) for xid, one in errors.items()]}
    of_guard = {one["uuid"]: one for one in (known.guard or {}).get("gpus", ())}.get(gpu.get("uuid", ""), {})
    # of a GPU that nobody sees only what was set is true
    more["guard"] = {key: value for key, value in of_guard.items()
                     if gpu["state"] == "ok" or key in ("clock_limit_mhz", "power_limit_set_w")}
    if gpu["state"] != "gone":
        last = known.xids.last(pci)
        more |= {"xid_last": [({"err_code": str(last), "err_msg": words_of(last)}, last)],
                 "lost": int(gpu["state"] != "ok")}
    if gpu["state"] == "ok":
        more["info"] = {"driver_version": (known.view.sample or {}).get("driver", ""),
                        "cuda_version": (known.view.sample or {}).get("cuda", ""),
                        "vbios": gpu.get("vbios", ""), "serial": gpu.get("serial", ""), "minor": gpu.get("minor", "")}
        if "reasons" in gpu:
            more["reason_bits"] = reasons.bits(gpu["reasons"])
        if "margin_source" in gpu:
            more["margin_sources"] = {gpu["margin_source"]: 1}
    owner = known.owners.get(gpu.get("uuid", ""))
    if owner:
        more["instance"] = {"service": owner.rpartition(".")[0], "inference_instance": owner}
    return {**gpu, **more}


def host_numbers(known: Known) -> dict[str, Any]:
    """The host's own values, by the keys of the table."""
    view, now = known.view, known.now
    numbers: dict[str, Any] = {"expected": len(known.expected), "states": {known.verdict.state: 1},
                               "version": {known.version: 1}}
    if known.verdict.state == "none":
        return numbers
    numbers |= {"sample_age_s": view.age(now), "call_age_s": view.call_age(now), "samples": view.samples,
                "restarts": view.restarts}
    if view.fresh(now) and view.sample is not None:
        numbers |= {"seen": sum(gpu["state"] == "ok" for gpu in view.gpus_now()), "took_s": view.sample["took_s"],
                    "missing": len(unseen_uuids(view, known.expected))}
    return numbers


def guard_numbers(known: Known) -> dict[str, Any]:
    """The guard's own values and those of its instances, by the keys of the table; {} where there is no guard."""
    told = known.guard
    if told is None:
        return {}
    named = [({"service": one["service"], "inference_instance": one["instance"]}, one) for one in told["instances"]]
    return {
        "enforcing": int(told["enforcing"]), "setter_up": int(not told["setter"]),
        "rungs": [(labels, one["rung"]) for labels, one in named],
        "weights": [(labels, one["weight"]) for labels, one in named],
        "latched": [(labels, int(one["latched"])) for labels, one in named],
        "stopped": [(labels, int(one["stopped"])) for labels, one in named],
        "moves": [({**labels, "direction": direction}, count)
                  for labels, one in named for direction, count in sorted(one["moves_total"].items())],
    }


def _xid_labels(xid: int) -> dict[str, str]:
    grade = grade_of(xid)
    return {"xid": str(xid), "action": grade.action, "severity": grade.severity}


def entries(one: Series, gpu: Mapping[str, Any]) -> list[Entry]:
    """The values of one series in a sample, with the labels that tell them apart; none when it is not there."""
    value: Any = gpu
    for part in one.path:
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        return []
    if isinstance(value, list):  # with labels of their own
        return [(labels, float(number)) for labels, number in value]
    if not isinstance(value, Mapping):
        return [({}, float(value))]
    if not one.label:  # a table of labels: an info series
        return [({str(key): str(text) for key, text in value.items()}, 1.0)]
    return [({one.label: str(key)}, float(number)) for key, number in value.items() if number is not None]


def labels_of(gpu: Mapping[str, Any]) -> dict[str, str]:
    """The labels of one GPU, as dcgm-exporter orders them; its ``device`` is the index, not the node's minor number."""
    device = f"nvidia{gpu['index']}" if "index" in gpu else ""
    texts = (str(gpu.get("index", "")), gpu.get("uuid", ""), gpu.get("pci", ""), device, gpu.get("name", ""))
    return dict(zip(GPU_LABELS, texts, strict=True))


def part_labels(part: Mapping[str, Any]) -> dict[str, str]:
    """What tells the parts of a GPU apart that was cut by MIG."""
    return dict(zip(MIG_LABELS, (str(part["profile"]), str(part["id"])), strict=True))
