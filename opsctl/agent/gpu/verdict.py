"""What the agent makes of the GPUs, in one word and a sentence. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from opsctl.agent.gpu.child import EXIT_LOCKED
from opsctl.agent.gpu.reader import STALE_S, View

STATES = ("none", "starting", "ok", "lost", "unreadable", "missing", "no_driver", "mismatch", "no_library", "failed",
          "hung", "stale")
INCOMPLETE_STATES = frozenset({"lost", "unreadable", "missing"})  # a GPU is not as it should be; another look may help
FRESH_STATES = INCOMPLETE_STATES | {"ok"}  # the samples are young and good


@dataclass(frozen=True)
class Verdict:
    """``healthy``: what is exported can be believed. A GPU that is lost is told, so that is healthy."""

    state: str
    words: str
    healthy: bool


def judge(view: View, now: float, wanted: bool, expected: Collection[str],
          loaded: Callable[[], str] = lambda: "") -> Verdict:
    """``expected`` are UUIDs; ``loaded`` gives the version of the kernel's driver, empty when there is none."""
    if not wanted:
        return Verdict("none", "this host has no GPUs", True)
    return _blind(view, now, loaded) or _seeing(view, expected)


def _blind(view: View, now: float, loaded: Callable[[], str]) -> Verdict | None:
    """Why there is no sample that counts."""
    late = view.call_age(now)
    if view.call is not None and (late > STALE_S or not view.fresh(now)):
        where = f" of GPU {view.call['gpu']}" if view.call["gpu"] >= 0 else ""
        return Verdict("hung", f"{view.call['name']}{where} has not returned for {late:.0f} s (process {view.pid}); "
                       "killing it may freeze the GPU: drain the host, then reboot it", False)
    if view.sample is not None and view.sample["state"] != "ok" and now - view.sample["at"] <= 2 * STALE_S:
        return Verdict(view.sample["state"], sentence(view.sample["state"], view.sample["words"], loaded()), False)
    if view.fresh(now):
        return None
    if view.good is None and view.age(now) <= STALE_S:
        return Verdict("starting", "no sample yet", False)
    return Verdict("stale", f"the last sample is {view.age(now):.0f} s old: {_reader_words(view)}", False)


def _seeing(view: View, expected: Collection[str]) -> Verdict:
    """What the last sample shows."""
    silent = [gpu for gpu in view.gpus_now() if gpu["state"] != "ok"]
    if silent:
        return Verdict("lost" if any(gpu["state"] == "lost" for gpu in silent) else "unreadable", "; ".join(
            f"GPU {gpu['index']} ({gpu.get('uuid', 'no UUID')}) {gpu['words']}" for gpu in silent), True)
    missing = missing_uuids(view, expected)
    if missing:
        return Verdict("missing", f"{len(missing)} of {len(expected)} GPUs not there: {', '.join(missing)}", True)
    return Verdict("ok", "", True)


def missing_uuids(view: View, expected: Collection[str]) -> list[str]:
    """Expected and not in the last sample. One that is lost is there as long as NVML still lists it."""
    return _not_among((view.sample or {}).get("gpus", ()), expected)


def unseen_uuids(view: View, expected: Collection[str]) -> list[str]:
    """Expected and not there, or there and without an answer: whoever is meant to be there and cannot be used."""
    return _not_among([gpu for gpu in view.gpus_now() if gpu["state"] == "ok"], expected)


def _not_among(gpus: Collection[Mapping[str, Any]], expected: Collection[str]) -> list[str]:
    there = {gpu.get("uuid") for gpu in gpus} | {part.get("uuid") for gpu in gpus for part in gpu.get("mig", ())}
    return [uuid for uuid in expected if uuid not in there]


def sentence(state: str, words: str, loaded: str) -> str:
    """For a person, from the reader's word."""
    if state == "no_driver":
        return "the NVIDIA driver is not loaded: journalctl -k -g NVRM, nvidia-modprobe, or opsctl provision"
    if state == "mismatch":
        return (f"libnvidia-ml is of another version than the loaded driver{f' {loaded}' if loaded else ''}: "
                "the host waits for its reboot")
    if state == "no_library":
        return f"there is no NVML library to ask: {words}"
    return words


def _reader_words(view: View) -> str:
    if view.told_to_end is not None:
        return f"the reader (process {view.pid}) was told to end and does not"
    if view.began is None:
        return ("a reader of an agent before this one has not ended: it may hang in the driver"
                if view.exit_status == EXIT_LOCKED else f"the reader ended ({view.exit_status}) and is started again")
    return "the reader is silent"
