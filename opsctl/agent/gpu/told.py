"""What the agent tells the host's other programs: ``/run/opsctl/agent/gpus.json``, written anew each second.

``opsctl-host state`` passes it on with its age (``read``). Whoever reads it must look at the age: an agent that hangs
leaves its last word.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsctl.agent.gpu import reasons
from opsctl.agent.gpu.reader import View
from opsctl.agent.gpu.verdict import Verdict, missing_uuids
from opsctl.agent.gpu.xids import Xids

SILENT_S = 15.0
INSTANCE = re.compile(r"/inference@([^/]+)\.service")


def document(view: View, verdict: Verdict, xids: Xids, expected: Sequence[str], owners: Mapping[str, str], now: float
             ) -> dict[str, Any]:
    """Plain data, ``..._at_boot_s`` by the boot clock. ``owners`` says which instance a UUID is placed to."""
    sample = view.sample or {}
    return {
        "at_boot_s": now, "good_at_boot_s": view.good, "state": verdict.state, "words": verdict.words,
        "driver": sample.get("driver", ""), "expected": len(expected), "missing": missing_uuids(view, expected),
        "devices": [device(gpu, xids, owners, now) for gpu in view.gpus_now()] if view.good is not None else [],
    }


def device(gpu: Mapping[str, Any], xids: Xids, owners: Mapping[str, str], now: float) -> dict[str, Any]:
    """One GPU; a number that it does not have is null."""
    uuid = gpu.get("uuid", "")
    return {
        "index": gpu["index"], "uuid": uuid, "model": gpu.get("name", ""), "pci": gpu.get("pci", ""),
        "state": gpu["state"], "words": gpu["words"], "temperature_c": gpu.get("temperature_c"),
        "memory_temperature_c": gpu.get("memory_temperature_c"), "margin_c": gpu.get("margin_c"),
        "margin_source": gpu.get("margin_source"), "power_w": gpu.get("power_w"),
        "power_limit_w": gpu.get("power_limits_w", {}).get("enforced") if gpu["state"] == "ok" else None,
        "utilisation_percent": gpu.get("utilisation_percent"), "memory_used_mib": gpu.get("memory_used_mib"),
        "memory_total_mib": gpu.get("memory_total_mib"), "reasons": reasons.words(gpu.get("reasons", 0)),
        "xids": xids.recent(gpu.get("pci", ""), now), "instance": owners.get(uuid, ""),
        "pids": gpu.get("pids", []),
    }


def write(path: Path, what: Mapping[str, Any]) -> None:
    """By rename, for all to read. Not fsynced: it lies in memory and is old in a second."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(what), encoding="utf-8")
    beside.chmod(0o644)
    beside.rename(path)


def read(path: Path, expected: Sequence[str], now: float, proc: Path = Path("/proc")) -> dict[str, Any] | None:
    """As ``opsctl-host state`` tells it; None: this host has no GPUs.

    ``age_s`` is that of the last good sample. A device's ``users`` are what computes on it: instances, or programs.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        told = {**found, "age_s": None if found["good_at_boot_s"] is None else now - found["good_at_boot_s"]}
        silent_s = now - told.pop("at_boot_s")
        told.pop("good_at_boot_s")
        told["devices"] = [{**one, "users": users(one["pids"], proc)} for one in told["devices"]]
        none = told["state"] == "none"  # the agent's last word where there are no GPUs any more: it grows old
    except (OSError, ValueError, KeyError, TypeError):
        if not expected:
            return None
        return {"state": "no_agent", "words": "opsctl-agent tells nothing of the GPUs: systemctl status opsctl-agent",
                "driver": "", "expected": len(expected), "missing": [], "devices": [], "age_s": None}
    if none and not expected:
        return None
    if silent_s > SILENT_S:
        told |= {"state": "stale", "words": f"opsctl-agent said nothing for {silent_s:.0f} s: "
                                            "systemctl status opsctl-agent"}
    return None if told["state"] == "none" else told


def users(pids: Sequence[int], proc: Path) -> list[str]:
    """``chat.0`` for a process of that instance's unit, the program's name for any other; none for one that ended."""
    found = set()
    for pid in pids:
        try:
            unit = INSTANCE.search((proc / str(pid) / "cgroup").read_text(encoding="utf-8"))
            found.add(unit[1] if unit else (proc / str(pid) / "comm").read_text(encoding="utf-8").strip())
        except OSError:
            continue
    return sorted(found)


def utc(wall: float) -> str:
    """Seconds since 1970 as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(wall))


def loaded_driver(root: Path) -> str:
    """The version in the first line of ``/proc/driver/nvidia/version``; empty when no driver is loaded."""
    try:
        first = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return ""
    return next((word for word in first.split() if word[0].isdigit() and "." in word), "")


def has_nodes(root: Path) -> bool:
    """Whether a driver made its device nodes."""
    return os.path.exists(root / "dev/nvidiactl")  # noqa: PTH110 - Path.exists raises where it may not look
