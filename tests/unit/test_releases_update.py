"""How a change that stopped is told: one error, which instances are where, what to type next."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from opsctl.cli.plan_view import plan_view
from opsctl.cli.update_model import summary
from opsctl.errors import ExitCode, MixedError, OpsctlError, PausedError, RolledBackError
from opsctl.fleet.model import Service
from opsctl.releases.plan import HostPart, Plan, Step, Target
from opsctl.releases.roll import Rolled
from opsctl.releases.rollout import End, Move, Rollout, State
from opsctl.releases.update import failure

GATE = RolledBackError("gate.unhealthy", "gpu-3: completion: 7 tokens, asked for 32.", hint="look", log_tail=("a", "b"))
DRAIN = PausedError("drain.deadline", "gpu-2.chat.0 was not empty after 600 s.", hint="wait longer")
STUCK = MixedError("cutover.not_undone", "gpu-2: v1 did not come back.", hint="by hand")


def step(number: int, wave: int = 1, **changes: object) -> Step:
    return Step(**{"host": f"gpu-{number}", "instance": "chat.0", "now": "v1-aaaaaaaaaaaa", "next": "v2-bbbbbbbbbbbb",
                   "action": "move", "serving": True, "wave": wave, "back": "v1-aaaaaaaaaaaa"} | changes)  # type: ignore[arg-type]


def plan(*steps: Step, **changes: object) -> Plan:
    return Plan(**{"service": Service("chat", "gpu", 8100, 8000), "target": Target("chat", "v2", "b" * 64),
                   "steps": steps, "hosts": (), "serving": len(steps)} | changes)  # type: ignore[arg-type]


def told(exit_code: ExitCode, *moves: Move, reason: str = "") -> OpsctlError | None:
    return failure(Rolled(Rollout(moves, 1), End(exit_code, reason), {}), plan(*(move.step for move in moves)))


def test_all_moved_is_no_error() -> None:
    assert told(ExitCode.DONE, Move(step(1), State.MOVED)) is None


def test_taken_back() -> None:
    error = told(ExitCode.ROLLED_BACK, Move(step(1), State.REVERTED), Move(step(3), State.FAILED, GATE))
    assert isinstance(error, RolledBackError)
    assert error.message == ("gpu-3: completion: 7 tokens, asked for 32; every instance serves what it served before "
                             "(gpu-1.chat.0 went back).")
    assert (error.code, error.log_tail) == ("gate.unhealthy", ("a", "b"))


def test_mixed_names_who_is_where_and_both_ways_on() -> None:
    error = told(ExitCode.MIXED, Move(step(1), State.MOVED), Move(step(2), State.BROKEN, STUCK),
                 Move(step(3), State.FAILED, GATE))
    assert isinstance(error, MixedError)
    assert error.message == "gpu-2: v1 did not come back; on v2: gpu-1.chat.0; the others are not."
    assert "opsctl rollback" in error.hint
    assert "opsctl update-model --version v2" in error.hint


def test_paused_says_how_to_go_on() -> None:
    error = told(ExitCode.PAUSED, Move(step(1), State.MOVED), Move(step(2), State.PAUSED, DRAIN), Move(step(3)))
    assert isinstance(error, PausedError)
    assert error.message == "gpu-2.chat.0 was not empty after 600 s; on v2: gpu-1.chat.0."
    assert error.hint.startswith("wait longer; ")
    assert "the same command again continues" in error.hint


def test_paused_by_the_budget_gives_its_reason() -> None:
    error = told(ExitCode.PAUSED, Move(step(1)), reason="1 serve now and min_serving is 1: gpu-1.chat.0 is needed")
    assert isinstance(error, PausedError)
    assert error.code == "rollout.paused"
    assert error.message.startswith("1 serve now and min_serving is 1")


def rendered(view: object) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(view)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def test_a_plan_reads_like_this() -> None:
    steps = (step(1), step(2, 2, serving=False), step(3, 3, drained_by=("operator:ann",)),
             step(4, 0, action="nothing", now="v2-bbbbbbbbbbbb", earlier=True))
    parts = (HostPart("gpu-1", False, 102_000_000, 0, 55_000_000_000, True),
             HostPart("gpu-2", True, 0, 0, 55_000_000_000, True), HostPart("gpu-3", True, 0, 0, 1_000_000_000, True))
    assert rendered(plan_view(plan(*steps, hosts=parts, serving=3, silent=("gpu-5",)))) == """\
INSTANCE      NOW      NEXT  WAVE     FETCH  FREE AFTER  NOTE
gpu-1.chat.0  v1   ->  v2       1  102.0 MB     55.0 GB
gpu-2.chat.0  v1   ->  v2       2    staged     55.0 GB  serves nobody now
gpu-3.chat.0  v1   ->  v2       3    staged      1.0 GB  drained by operator:ann: stays so
gpu-4.chat.0  v2   =   v2                                moved by an unfinished rollout
3 to move in 3 waves; 102.0 MB to fetch; 3 serve now, 2 at the least meanwhile (min_serving 1); not answering: gpu-5"""


@pytest.mark.parametrize(("document", "lines"), [
    ({"changed": 0, "service": "chat", "to": "v2"}, ["nothing to do: chat serves v2"]),
    ({"changed": 3, "service": "chat", "from": "v2", "to": "v1", "bad": ["v2"], "skipped": [], "instances": [
        {"host": "gpu-1", "instance": "chat.0", "state": "moved", "out_of_rotation_s": 4.25,
         "tokens_per_second": 410.2}]},
     ["chat: v2 -> v1", "  gpu-1      chat.0     moved, out of rotation 4.2 s, 410 tokens/s",
      "marked as bad: v2 (again only with --allow-bad)", "next: opsctl status"]),
])
def test_the_last_lines(document: dict[str, object], lines: list[str]) -> None:
    assert summary(document).splitlines() == lines
