"""What the guard and the GPU reader last said, put together for whoever looks: ``opsctl-host guard``, ``state``.

It reads two small files and imports next to nothing, because ``opsctl top`` runs it on every host each second or two:

    /opt/opsctl/agent/bin/python -m opsctl.agent.guard_view
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsctl.agent.paths import Paths

SCHEMA = "opsctl.guard/v1"
SILENT_S = 5.0  # the keeper writes each second, also while NVML hangs
MODES = ("auto", "observe", "enforce")
LOOK = "systemctl status opsctl-agent"
# What the guard's document has of a GPU, as the reader's own calls it: for an agent that has no guard yet.
OF_READER = ("uuid", "index", "model", "instance", "state", "temperature_c", "margin_c", "margin_source", "power_w",
             "utilisation_percent", "memory_used_mib", "memory_total_mib", "reasons")
OF_GUARD = ("memory_margin_c", "slope_c_per_s", "time_to_slowdown_s", "clock_mhz", "clock_max_mhz", "clock_limit_mhz",
            "power_limit_set_w")


def look(paths: Paths, now: float) -> dict[str, Any] | None:
    """The guard's document with ``age_s``, ``sample_age_s`` (null: not known), ``words``, empty when it is young, and
    ``ordered``, the mode of the last order: the guard reads orders a few seconds late, and ``mode`` is what it goes by.

    None: neither guard nor reader ever said anything here. ``now`` is the boot clock's.
    """
    said, reader = _document(paths.guard, "gpus", "instances"), _document(paths.gpus, "devices")
    if said is None and reader is None:
        return None
    devices = {one["uuid"]: one for one in (reader or {"devices": ()})["devices"]}
    sample_age_s = _age(reader, "good_at_boot_s", now)
    if said is None:
        gpus = [{**{key: one.get(key) for key in OF_READER}, **dict.fromkeys(OF_GUARD),
                 "power_limit_w": one.get("power_limit_w")} for one in devices.values()]
        return {**nothing(paths, f"no guard speaks here: {LOOK}; opsctl provision brings one"), "gpus": gpus,
                "sample_age_s": sample_age_s}
    age_s = _age(said, "at_boot_s", now)
    words = ""
    if age_s is None or age_s > SILENT_S:
        since = "" if age_s is None else f" for {age_s:.0f} s"
        words = f"the guard said nothing{since}: {LOOK}"
    gpus = [{**one, "power_limit_w": devices.get(one.get("uuid"), {}).get("power_limit_w")} for one in said["gpus"]]
    return {**{key: value for key, value in said.items() if key != "at_boot_s"}, "gpus": gpus, "age_s": age_s,
            "ordered": orders(paths)["mode"], "sample_age_s": sample_age_s, "words": words}


def nothing(paths: Paths, words: str) -> dict[str, Any]:
    """The document of a host whose guard says nothing; its mode is what an operator ordered."""
    ordered = orders(paths)["mode"]
    return {"schema": SCHEMA, "mode": ordered, "ordered": ordered, "enforcing": False, "observed_s": 0.0,
            "observe_s": None, "setter": "", "gpus": [], "instances": [], "age_s": None, "sample_age_s": None,
            "words": words}


def orders(paths: Paths) -> dict[str, Any]:
    """What an operator told the guard; where nobody did, or the file is none of ours: ``auto``."""
    found = _document(paths.guard_orders) or {}
    mode, unlatch = found.get("mode"), found.get("unlatch")
    return {"mode": mode if mode in MODES else "auto", "unlatch": dict(unlatch) if isinstance(unlatch, dict) else {},
            "by": str(found.get("by", "")), "at": found.get("at")}


def _document(path: Path, *lists: str) -> dict[str, Any] | None:
    """None: no file, or none of ours, which has these ``lists``."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and all(isinstance(found.get(key), list) for key in lists) else None


def _age(document: Mapping[str, Any] | None, key: str, now: float) -> float | None:
    at = (document or {}).get(key)
    return round(max(0.0, now - at), 1) if isinstance(at, (int, float)) else None


def answer(paths: Paths, now: float) -> dict[str, Any]:
    """As ``look``, and where there is nothing to see, the words that say so."""
    return look(paths, now) or nothing(paths, f"no GPU was seen here, and no guard speaks: {LOOK}")


def main() -> int:
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    sys.stdout.write(json.dumps(answer(Paths(), now)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
