"""Turns what is known into the families that ``series.py`` lists, and those into a page for Prometheus.

prometheus_client is loaded at the first scrape; without it the page says so, and nothing else of the agent minds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opsctl.agent.gpu import reasons
from opsctl.agent.gpu.reader import View
from opsctl.agent.gpu.series import GPU, GPU_LABELS, HOST, HOST_LABEL, MIG, MIG_LABELS, Series
from opsctl.agent.gpu.verdict import Verdict, unseen_uuids
from opsctl.agent.gpu.xids import Xids, words_of

if TYPE_CHECKING:
    from prometheus_client import Metric

Value = tuple[dict[str, str], float]


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
    """Every series that has a value now, in the table's order, with its labels. Pure."""
    gpus = [enriched(known, gpu) for gpu in told_gpus(known)]
    for one in GPU:
        found = [({**labels_of(gpu), **more}, value) for gpu in gpus for more, value in entries(one, gpu)]
        if one in MIG:  # of a GPU that is cut its parts alone, as DCGM has it: who adds up counts nothing twice
            found = [({**labels_of(gpu), **more}, value)
                     for gpu in gpus if not gpu.get("mig") for more, value in entries(one, gpu)]
            found += [({**labels_of(gpu), **part_labels(part)}, value)
                      for gpu in gpus for part in gpu.get("mig", ()) for _, value in entries(one, part)]
        if found:
            yield one, [({**labels, HOST_LABEL: known.host}, value) for labels, value in found]
    host = host_numbers(known)
    for one in HOST:
        found = entries(one, host)
        if found:
            yield one, [({**labels, HOST_LABEL: known.host}, value) for labels, value in found]


def told_gpus(known: Known) -> list[dict[str, Any]]:
    """Those of the last sample while it counts; of the others only who they are, if they had errors."""
    fresh = known.view.fresh(known.now)
    found = known.view.gpus_now() if fresh else []
    there = {gpu.get("pci") for gpu in found}
    for pci in sorted(known.xids.addresses() - there):
        of_old = known.view.gpus.get(pci, {})
        found.append({key: of_old[key] for key in ("index", "uuid", "name") if key in of_old} | {
            "pci": pci, "state": "gone"})
    return found


def enriched(known: Known, gpu: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with what does not come from NVML."""
    pci = gpu.get("pci", "")
    errors = known.xids.of(pci)
    more: dict[str, Any] = {"xid_counts": {xid: one.count for xid, one in errors.items()},
                            "xid_times": {xid: one.at for xid, one in errors.items()}}
    if gpu["state"] != "gone":
        last = known.xids.last(pci)
        more |= {"xid_last": ({"err_code": str(last), "err_msg": words_of(last)}, last),
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


def entries(one: Series, gpu: Mapping[str, Any]) -> list[Value]:
    """The values of one series in a sample, with the label that tells them apart; none when it is not there."""
    value: Any = gpu
    for part in one.key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        return []
    if isinstance(value, tuple):  # with labels of its own
        return [(value[0], float(value[1]))]
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


class Found:
    """What prometheus_client asks at a scrape: values that were gathered before, in the agent's own loop."""

    def __init__(self, found: Sequence[tuple[Series, list[Value]]]) -> None:
        self._found = found

    def describe(self) -> list[Metric]:
        """Asked at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        from prometheus_client import Metric  # noqa: PLC0415 - the agent works without it

        for one, several in self._found:
            family = Metric(one.name, f"{one.help}{f' [{one.unit}]' if one.unit else ''}", one.kind)
            for labels, value in several:
                family.add_sample(one.name + ("_total" if one.kind == "counter" else ""), labels, value)
            yield family


def render(found: Sequence[tuple[Series, list[Value]]], query: str, headers: Mapping[str, str]
           ) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a page, as prometheus_client itself negotiates format and compression.

    Raises:
        ImportError: there is no prometheus_client.
    """
    from prometheus_client import CollectorRegistry, make_wsgi_app  # noqa: PLC0415 - the agent works without it

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Found(found))
    said: dict[str, Any] = {}

    def start_response(status: str, with_headers: list[tuple[str, str]]) -> None:
        said.update(status=int(status.split(maxsplit=1)[0]), headers=dict(with_headers))

    environment = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "QUERY_STRING": query,
                   "HTTP_ACCEPT": headers.get("accept", ""), "HTTP_ACCEPT_ENCODING": headers.get("accept-encoding", "")}
    body = b"".join(make_wsgi_app(registry)(environment, start_response))
    return said["status"], said["headers"], body
