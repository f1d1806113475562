"""How the guard's verbs look: tables, sentences, the live table at several widths (OPSCTL_SNAPSHOT=1 takes them)."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guard_kit import POLICY, gpu, hot, instance, seen, slowed
from rich.console import Console, RenderableType
from test_guarding_rows import FLEET, GONE, GPUS, LOST, OPS_GONE

from opsctl.agent.guard.keeper import UNASKED
from opsctl.agent.guard.model import Policy
from opsctl.cli import guard_view, top_view
from opsctl.cli.top import told
from opsctl.guarding.explaining import commands, explain, next_words, policy_of, pool_words
from opsctl.guarding.looking import Heard
from opsctl.guarding.ordering import changes
from opsctl.guarding.rows import gpu_rows, instance_rows, silent

SNAPSHOTS = Path(__file__).parent / "snapshots"
TOLD = {"policy": dataclasses.asdict(POLICY), "policy_words": ""}
ANSWERS = {"gpu-1": seen(gpus=[hot(0), gpu(1, memory_margin_c=5.0)], instances=[slowed()]),
           "gpu-2": seen(gpus=[gpu(0, instance=""), LOST], instances=[
               instance(weight=1, down="GPU 1 lost", reasons=["GPU 1 is lost or not there"])], setter="no socket",
               mode="auto", enforcing=False, observed_s=3600.0)}


@pytest.fixture(autouse=True)
def utc() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    yield
    os.environ.pop("TZ")
    os.environ.update({"TZ": before} if before is not None else {})
    time.tzset()


def drawn(what: RenderableType, width: int = 160) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(what)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def check(name: str, text: str) -> None:
    snapshot = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("OPSCTL_SNAPSHOT"):
        snapshot.write_text(text)
    assert text == snapshot.read_text()


def test_guard_status() -> None:
    rows = instance_rows(FLEET, GPUS, ANSWERS)
    check("guard-status", drawn(guard_view.instances(rows)) + drawn(guard_view.instances(
        instance_rows(FLEET, GPUS, ANSWERS | {"gpu-2": GONE}), silent(FLEET.hosts, {"ops-1": OPS_GONE}))))


def test_guard_explain() -> None:
    text = "".join(drawn(guard_view.sections(explain(host, answer | TOLD))) + "\n" for host, answer in ANSWERS.items())
    check("guard-explain", text)


def test_guard_mode() -> None:
    held = seen(instances=[slowed(acts=False)], mode="auto", enforcing=False, observed_s=3600.0)
    acting = seen(instances=[slowed(stopped=True)], mode="enforce")
    text = "".join(f"{mode}\n" + drawn(guard_view.planned(changes({"gpu-1": held, "gpu-2": acting}, mode)))
                   for mode in ("observe", "enforce", "auto"))
    check("guard-mode", text)


@pytest.mark.parametrize(("mode", "ordered", "now", "changed"), [
    ("enforce", "enforce", "enforces", False), ("enforce", "observe", "enforces, observe is ordered", True),
    ("observe", "enforce", "enforces", True), ("observe", "observe", "enforces, observe is ordered", False),
    ("enforce", None, "enforces", True),  # an agent of before does not tell
])
def test_a_mode_is_ordered_unless_it_is_the_last_order(mode: str, ordered: str | None, now: str, changed: bool) -> None:
    told = seen(mode="enforce") | {"ordered": ordered}
    (one,) = changes({"gpu-1": told}, mode)
    assert (one.before, one.changed) == (now, changed)


def test_top() -> None:
    rows = gpu_rows(GPUS, ANSWERS)
    quiet = silent(FLEET.hosts, {"ops-1": OPS_GONE})
    text = "".join(drawn(top_view.once(rows, quiet, width), width) + "\n" for width in (160, 120, 100, 80))
    check("top", text)


def test_in_a_pipe_an_instance_is_a_line_however_long_its_reason() -> None:
    rows = instance_rows(FLEET, GPUS, {"gpu-1": seen(instances=[slowed(reasons=["hot " * 40])]), "gpu-2": GONE})
    assert len(drawn(guard_view.Whole(guard_view.instances(rows)), 80).splitlines()) == 3
    assert len(drawn(guard_view.instances(rows), 80).splitlines()) > 3


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_no_line_of_top_is_wider_than_the_terminal(width: int) -> None:
    rows = gpu_rows(GPUS, ANSWERS)
    frame = top_view.frame(rows, [], 0, (width, 24), at="22:00:00", by_margin=False)
    assert max(map(len, drawn(frame, width).splitlines())) <= width


@pytest.mark.parametrize(("height", "shown", "more"), [(40, 16, False), (12, 8, True), (3, 1, True)])
def test_top_fits_the_height_and_says_what_is_hidden(height: int, shown: int, more: bool) -> None:
    rows = gpu_rows(GPUS, {"gpu-1": seen(gpus=[gpu(0, index=index) for index in range(16)])})
    text = drawn(top_view.frame(rows, [], 1, (160, height), at="22:00:00", by_margin=False))
    assert sum(line.startswith("gpu-1") for line in text.splitlines()) == shown
    assert (f"and {16 - shown} more" in text) == more
    assert "1 not heard yet" in text


@pytest.mark.parametrize(("left", "text"), [(None, ""), (40, "··········"), (30, "··········"), (15, "█████·····"),
                                            (0, "██████████"), (-5, "██████████"), (28, "▋·········")])
def test_the_bar_fills_as_the_margin_goes(left: float | None, text: str) -> None:
    assert top_view.bar(left).plain == text


def test_a_host_that_grew_silent_is_told_and_one_that_failed_says_why() -> None:
    found = told({"gpu-1": Heard(seen(), 100.0), "gpu-2": Heard(GONE, 5.0), "gpu-3": Heard()}, 112.0, 10.0)
    assert found["gpu-1"]["words"] == "gpu-1 said nothing for 12 s"
    assert found["gpu-2"] is GONE
    assert found["gpu-3"] is None
    assert told({"gpu-1": Heard(seen(), 100.0)}, 109.0, 10.0)["gpu-1"]["words"] == ""


@pytest.mark.parametrize(("one", "says"), [
    (instance(), ["less at margin 3 °C: weight 70 %"]),
    (slowed(), ["least at margin -2 °C: weight 1 %, clocks 35 %",
                "less with margin above 8 °C (memory 6) and not heating for 30 s: weight 70 %"]),
    (slowed(latched=True), ["least at margin -2 °C: weight 1 %, clocks 35 %",
                            "no way up to normal before somebody unlatches it"]),
    (slowed(rung=3), ["stop at margin -4 °C for 2 s, if the pool allows it: the engine finishes what it has and stops",
                      "slowed with margin above 8 °C (memory 6) and not heating for 30 s: weight 30 %, clocks 80 % or "
                      "less"]),
    (slowed(stopped=True), ["starts again: margin above 8 °C (memory 6) and not heating for 30 s"]),
])
def test_what_comes_next(one: dict[str, object], says: list[str]) -> None:
    assert next_words(one, POLICY) == says


@pytest.mark.parametrize(("pool", "says"), [
    ({"others": 1, "min_serving": 1, "words": ""}, "1 other serves, min_serving 1: it might be stopped"),
    ({"others": 2, "min_serving": 3, "words": ""}, "2 others serve, min_serving 3: it would not be stopped"),
    ({"others": None, "min_serving": 1, "words": UNASKED},
     "its load balancers are asked once it is at least; min_serving 1"),
    ({"others": None, "min_serving": 1, "words": "10.0.0.2: refused"},
     "how many others serve is not known, so it would not be stopped (10.0.0.2: refused)"),
])
def test_whether_it_may_be_stopped(pool: dict[str, object], says: str) -> None:
    assert pool_words(pool) == says


@pytest.mark.parametrize(("one", "changes_", "first"), [
    (instance(), {}, "opsctl top --limit gpu-1"),
    (slowed(), {}, "opsctl drain gpu-1:chat.0 -m hot   takes it out until you say so"),
    (slowed(latched=True), {}, "opsctl guard unlatch gpu-1 chat.0   when the cooling is mended"),
    (instance(), {"words": "the guard said nothing"}, "opsctl logs --unit opsctl-agent --limit gpu-1"),
])
def test_what_to_type(one: dict[str, object], changes_: dict[str, object], first: str) -> None:
    assert commands("gpu-1", seen(**changes_), one)[0] == first


def test_the_hosts_own_numbers_count() -> None:
    document = seen() | {"policy": {"less_margin_c": 5.5, "a_key_of_tomorrow": 1}, "policy_words": ""}
    assert policy_of(document).less_margin_c == 5.5
    assert "less at 5.5" in "\n".join(explain("gpu-1", document)[0][1])
    assert policy_of(seen()) == Policy()
