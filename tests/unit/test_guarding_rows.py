"""What hosts say of their guard, as rows: instances, GPUs, what status counts as wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from guard_kit import gpu, hot, instance, seen, slowed

from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.guarding.looking import watched
from opsctl.guarding.rows import (
    clock_words,
    gpu_rows,
    instance_rows,
    margin,
    mode_words,
    note,
    silent,
    slowed_by,
    worst,
    wrong,
)

FLEET = Fleet(Path("/fleet"), Path("/fleet/inventory.ini"),
              (Host("ops-1", "10.0.0.2", ("gateway", "lb", "monitor")), Host("gpu-1", "10.0.0.11", ("gpu",)),
               Host("gpu-2", "10.0.0.12", ("gpu",))),
              (Service("chat", "gpu", port=8100, listen=8000, gpus_per_instance=2),))
GPUS = FLEET.group("gpu")
ON_CPUS = dataclasses.replace(FLEET, services=(Service("chat", "gpu", port=8100, listen=8000),))
OPS_GONE = RefusedError("host.unreachable", "ops-1 does not answer")
GONE = RefusedError("host.unreachable", "gpu-2 does not answer")


def test_only_hosts_with_gpus_are_asked() -> None:
    assert [host.name for host in watched(FLEET, FLEET.hosts)] == ["gpu-1", "gpu-2"]
    assert [host.name for host in watched(ON_CPUS, FLEET.hosts)] == ["gpu-1", "gpu-2"]  # they serve, at least
    assert [host.name for host in watched(FLEET, FLEET.hosts[:1])] == ["ops-1"]  # it was named: then it is asked


@pytest.mark.parametrize(("core", "memory", "left"), [(5, 3, 3), (5, None, 5), (None, 4, 4), (None, None, None),
                                                      (-1, 0, -1), (0, 9, 0)])
def test_the_margin_is_the_lesser_of_core_and_memory(core: float | None, memory: float | None, left: float | None
                                                     ) -> None:
    assert margin(gpu(margin_c=core, memory_margin_c=memory)) == left


def test_the_worst_gpu() -> None:
    lost = gpu(1, state="lost", margin_c=None, memory_margin_c=None)
    blind = gpu(1, margin_c=None, memory_margin_c=None)
    assert worst([gpu(0), lost]) == lost
    assert worst([blind, hot(0)]) == hot(0)
    assert worst([]) is None


@pytest.mark.parametrize(("changes", "words"), [
    ({"mode": "auto", "enforcing": True}, "enforces (auto)"),
    ({"mode": "auto", "enforcing": False, "observed_s": 21_600.0}, "observes (auto, 18 h more)"),
    ({"mode": "auto", "enforcing": False, "observed_s": 84_600.0}, "observes (auto, 30 min more)"),
    ({"mode": "auto", "enforcing": False, "observed_s": 99_999.0}, "observes (auto, 0 s more)"),
    ({"mode": "observe", "enforcing": False}, "observes"),
    ({"mode": "enforce", "enforcing": True}, "enforces"),
    ({"mode": "enforce", "enforcing": False}, "observes"),  # ordered a moment ago: what it does is what counts
    ({"mode": "auto", "enforcing": False, "observe_s": None}, "auto"),  # no guard speaks
])
def test_the_mode_in_words(changes: dict[str, Any], words: str) -> None:
    assert mode_words(seen(**changes)) == words


@pytest.mark.parametrize(("one", "gpus", "words"), [
    (instance(), [gpu()], ""),
    (slowed(), [hot(0), gpu(1)], "at most 80 %, 1584 MHz"),
    (slowed(), [gpu()], "80 % not in force"),  # the setter refused
    (slowed(acts=False), [gpu()], "80 % only decided"),
    (instance(), [hot(0)], "at most 1584 MHz"),  # not released yet
])
def test_clocks_in_words(one: dict[str, Any], gpus: list[dict[str, Any]], words: str) -> None:
    assert clock_words(one, gpus) == words


@pytest.mark.parametrize(("answer", "expected"), [
    (seen(), {"rung": 0, "word": "normal", "weight": 100, "margin_c": 26.0, "level": "good", "why": ""}),
    (seen(gpus=[gpu(0), hot(1)], instances=[slowed()]),
     {"rung": 2, "word": "slowed", "weight": 30, "gpu": 1, "margin_c": -1.0, "time_to_slowdown_s": 2.5,
      "level": "warning", "why": "GPU 0: margin -1 °C, at most -1 °C: slowed"}),
    (seen(instances=[instance(rung=4, weight=1, down="too hot: stopped by the guard", stopped=True)]),
     {"level": "bad", "stopped": True, "why": "down: too hot: stopped by the guard; stopped by the guard"}),
    (seen(instances=[slowed(latched=True, reasons=["Latched at slowed"])]),
     {"latched": True, "level": "warning", "why": "flapped, and is kept here; Latched at slowed"}),
    (seen(instances=[instance(weight=50, reasons=["No reading for 20 s"])], sample_age_s=20.0),
     {"level": "warning", "why": "the GPUs were last seen 20 s ago"}),
    (seen(setter="no socket"), {"level": "warning", "why": "setter: no socket"}),
    (seen(words="the guard said nothing for 9 s: systemctl status opsctl-agent"),
     {"level": "bad", "why": "the guard said nothing for 9 s: systemctl status opsctl-agent"}),
    (seen(instances=[], words="no guard speaks here"),
     {"rung": None, "word": "unknown", "level": "bad", "why": "no guard speaks here"}),
    (seen(instances=[]), {"word": "unknown", "level": "bad", "why": "its guard does not know it: opsctl provision"}),
    (GONE, {"word": "unreachable", "level": "bad", "why": "gpu-2 does not answer"}),
    (OpsctlError("guard.not_provisioned", "gpu-1 has no agent with a guard."), {"word": "unknown", "level": "bad"}),
])
def test_an_instance_in_a_row(answer: Any, expected: dict[str, Any]) -> None:
    (row,) = instance_rows(FLEET, GPUS[:1], {"gpu-1": answer})
    told = dataclasses.asdict(row)
    assert {key: told[key] for key in expected} == expected
    assert (row.host, row.instance) == ("gpu-1", "chat.0")


def test_an_instance_without_gpus_has_no_guard_and_no_row() -> None:
    assert instance_rows(ON_CPUS, GPUS[:1], {"gpu-1": seen(instances=[])}) == []
    assert len(instance_rows(ON_CPUS, GPUS[:1], {"gpu-1": seen()})) == 1  # its host says otherwise


@pytest.mark.parametrize(("changes", "who"), [
    ({}, ""), ({"clock_limit_mhz": 1584}, "guard"), ({"reasons": ["power cap"]}, ""),
    ({"clock_limit_mhz": 1584, "reasons": ["thermal slowdown"]}, "driver"),
    ({"clock_limit_mhz": 1584, "reasons": ["thermal slowdown", "hardware thermal slowdown"]}, "hardware"),
    ({"reasons": ["power brake"]}, "hardware"), ({"reasons": ["hardware slowdown"]}, "hardware"),
])
def test_who_keeps_the_clocks_down(changes: dict[str, Any], who: str) -> None:
    assert slowed_by(gpu(**changes)) == who


LOST = gpu(1, state="lost", temperature_c=None, margin_c=None, memory_margin_c=None)


def test_gpus_in_the_order_of_the_inventory_or_of_their_heat() -> None:
    blind = gpu(0, margin_c=None, memory_margin_c=None)
    answers = {"gpu-1": seen(gpus=[blind, hot(1, 3)]), "gpu-2": seen(gpus=[LOST, hot(0, -1.0)])}
    plain = gpu_rows(GPUS, answers)
    assert [(row.host, row.index) for row in plain] == [("gpu-1", 0), ("gpu-1", 1), ("gpu-2", 0), ("gpu-2", 1)]
    hottest = gpu_rows(GPUS, answers, by_margin=True)
    assert [(row.host, row.index) for row in hottest] == [("gpu-2", 1), ("gpu-2", 0), ("gpu-1", 1), ("gpu-1", 0)]


@pytest.mark.parametrize(("answer", "level", "said"), [
    (seen(gpus=[gpu()]), "good", ""),
    (seen(gpus=[hot()], instances=[slowed()]), "warning", "thermal slowdown"),
    (seen(gpus=[gpu(reasons=["hardware thermal slowdown"])]), "bad", "hardware thermal slowdown"),
    (seen(gpus=[LOST]), "bad", ""),
    (seen(gpus=[gpu()], instances=[instance(rung=4)]), "bad", ""),
    (seen(gpus=[gpu(power_limit_set_w=500.0)]), "good", "guard: at most 500 W"),
    (seen(gpus=[gpu()], sample_age_s=40.2), "warning", "40 s old"),
    (seen(gpus=[gpu()], sample_age_s=None, words="no guard speaks here"), "warning", "old"),
    (seen(gpus=[gpu(instance="")], instances=[]), "good", ""),  # a GPU that serves nothing has a line too
])
def test_a_gpu_in_a_row(answer: dict[str, Any], level: str, said: str) -> None:
    (row,) = gpu_rows(GPUS[:1], {"gpu-1": answer})
    assert (row.level, row.note) == (level, said)


def test_hosts_that_say_nothing_are_told() -> None:
    assert silent(GPUS, {"gpu-1": seen(words="silent"), "gpu-2": GONE}) == [
        {"host": "gpu-1", "code": "guard.silent", "words": "silent"},
        {"host": "gpu-2", "code": "host.unreachable", "words": "gpu-2 does not answer"}]
    assert silent(GPUS, {"gpu-1": seen(), "gpu-2": None}) == []  # not asked yet


@pytest.mark.parametrize(("answer", "what", "said"), [
    (seen(), [], ""),
    (seen(gpus=[hot()], instances=[slowed()]), ["guard: slowed (30 %)"],
     "guard: slowed, weight 30 %, clocks at most 80 %, 1584 MHz; GPU 0: margin -1 °C, at most -1 °C: slowed"),
    (seen(instances=[instance(weight=50)]), ["guard: normal (50 %)"], "guard: normal, weight 50 %"),
    (seen(instances=[instance(latched=True)]), ["guard: latched"],
     "guard: normal, weight 100 %; flapped, and is kept here"),
    (seen(instances=[instance(rung=4, weight=1, stopped=True)]), ["stopped by the guard"],
     "guard: stop, weight 1 %; stopped by the guard"),
    (seen(words="the guard said nothing for 9 s"), ["guard silent"], "the guard said nothing for 9 s"),
    (seen(setter="it refuses"), [], ""),  # an alert's business, as long as there is nothing to set
])
def test_what_status_says_and_strict_counts(answer: dict[str, Any], what: list[str], said: str) -> None:
    assert [one["what"] for one in wrong({"gpu-1": answer})] == what
    assert note("chat.0", answer) == said
