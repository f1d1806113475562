"""``opsctl drill``: announced exercises. In a lab something breaks; on real hosts it is only reckoned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsctl.cli.drain import InventoryOption
from opsctl.cli.speak import AsJson, Debug, Speaker, Yes, find_inventory, speaking

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from opsctl.engines.session import Session
    from opsctl.fleet.model import Fleet, Host
    from opsctl.guarding.story import Step, Story

app = typer.Typer(help="Announced exercises: what would happen, before it does.", no_args_is_help=True)
LONGEST_S = 3600.0


@app.callback()
def _group() -> None:
    """One verb so far, and it keeps its name."""


@app.command("thermal")
def thermal(
    host: Annotated[str, typer.Argument(metavar="HOST", help="A host with GPUs.")],
    factor: Annotated[float, typer.Option("--factor", min=1.01, max=20, help="So many times worse is the cooling.")]
    = 2.0,
    for_: Annotated[str, typer.Option("--for", metavar="60s", help="How long.")] = "60s",
    gpu: Annotated[int | None, typer.Option("--gpu", min=0, show_default="all", help="In a lab: of which GPU.")] = None,
    replay: Annotated[bool, typer.Option("--replay", help="Only reckon, in a lab too.")] = False,
    inventory: InventoryOption = None,
    yes: Yes = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """See how the guard takes a loss of cooling. In a lab it happens; on real hosts nothing is touched.

    A real host's present temperatures and numbers are fed into the guard's own decision, with an assumed rise, and its
    rungs are printed with their reasons. A lab's machine heats up until the time is over, or Ctrl-C; then it is mended.

    [dim]$ opsctl drill thermal gpu-1 --factor 2 --for 60s[/dim]
    """
    with speaking("drill thermal", as_json=as_json, debug=debug) as speaker:
        from opsctl.cli.hold import seconds
        from opsctl.engines.session import Session
        from opsctl.errors import UsageError
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.guarding import exercise
        from opsctl.releases.remote import ask

        for_s = seconds(for_) or 0.0
        if not 0 < for_s <= LONGEST_S:
            raise UsageError("drill.bad_time", f"--for {for_ or 'nothing'} is no time for a drill.",
                             hint="30s, 2m, at most 1h")
        fleet = read_fleet(find_inventory(inventory))
        one = fleet.host(host)
        write_ssh_config(fleet)
        with Session(fleet, one) as session:
            with speaker.waiting(f"asking {host}"):
                lab = "" if replay else exercise.lab_of(session, fleet)
                answer = ask(session, ["guard", "--policy"], host=host)
            if lab:
                _exercise(speaker, session, one, lab, answer, factor, for_s, gpu, yes=yes)
            else:
                _replay(speaker, fleet, host, answer, factor, for_s)


def _replay(speaker: Speaker, fleet: Fleet, host: str, answer: Mapping[str, Any], factor: float, for_s: float) -> None:
    from opsctl.errors import RefusedError
    from opsctl.guarding import replay
    from opsctl.guarding.explaining import policy_of
    from opsctl.guarding.rows import mode_words
    from opsctl.guarding.story import report_lines

    if not replay.usable(answer) or not answer["instances"]:
        why = answer["words"] or "no GPU there tells temperature and margin"
        raise RefusedError("drill.no_gpus", f"{host}: {why}.", hint=f"opsctl guard explain {host}")
    others = _others(speaker, fleet, host, answer)
    story = replay.replay(replay.with_pool(answer, others), policy_of(answer), factor, for_s)
    report = story.report(for_s)
    assumed = (f"assumed: cooling {factor:g} times worse for {for_s:g} s, a rise of first order (time constant "
               f"{replay.TAU_S:g} s, air at {replay.INLET_C:g} °C), and that less weight sheds no heat")
    lines = [f"{host}: reckoned from what it is like now; nothing is touched. The guard {mode_words(answer)}.", assumed]
    lines += [f"serving on other hosts now: {count} of {service}" for service, count in others.items()]
    lines += [f"note: {words}" for words in [replay.with_load(answer)] if words]
    lines += [step.words for step in story.steps] or ["no step: the guard would not react"]
    speaker.result(_document(host, "replay", "", factor, for_s, story, report.as_document()),
                   "\n".join([*lines, *report_lines(report, for_s=for_s, real=False)]))


def _others(speaker: Speaker, fleet: Fleet, host: str, answer: Mapping[str, Any]) -> dict[str, int]:
    """By service of the host, how many instances serve on other hosts: what its guard would read at a load balancer."""
    from opsctl.errors import OpsctlError
    from opsctl.fleet.placements import place
    from opsctl.releases.plan import serves
    from opsctl.status import gather

    services = dict.fromkeys(one["service"] for one in answer["instances"])
    names = {one.host for one in place(fleet) if one.service in services and one.host != host}
    with speaker.waiting(f"asking {len(names)} other hosts who serves"):
        states = gather(fleet, [one for one in fleet.hosts if one.name in names])
    serving = [one["service"] for state in states.values() if not isinstance(state, OpsctlError) and state
               for one in state["instances"] if serves(one)]
    return {service: serving.count(service) for service in services}


def _exercise(speaker: Speaker, session: Session, host: Host, lab: str, answer: Mapping[str, Any], factor: float,
              for_s: float, gpu: int | None, *, yes: bool) -> None:
    from opsctl.errors import ExitCode
    from opsctl.guarding import exercise
    from opsctl.guarding.rows import mode_words
    from opsctl.guarding.story import Story, report_lines
    from opsctl.runs.identity import me

    exercise.check(session, answer)
    which = "all GPUs" if gpu is None else f"GPU {gpu}"
    words = f"cooling of {which} of {host.name} (lab {lab}) {factor:g} times worse for {for_s:g} s"
    by = me("", "drill").who
    speaker.say(f"EXERCISE by {by}: {words}. The guard {mode_words(answer)}; instances may be slowed or stopped.")
    speaker.confirm("Begin?", yes=yes)
    exercise.announce(session, by, words)
    speaker.interrupts.careful = True
    story, mended_s = Story(), for_s
    story.see(0.0, answer)
    with _drawn(speaker, host) as hear:
        began = time.monotonic()
        try:
            with exercise.worse_cooling(lab, host.name, gpu, factor):
                exercise.watch(session, story, began, lambda now_s: now_s >= for_s, hear)
        except KeyboardInterrupt:
            speaker.say("the cooling is mended")
            raise
        mended_s = time.monotonic() - began
        speaker.say(f"{mended_s:6.1f} s  the cooling is mended; waiting until all is normal")
        end_s = mended_s + exercise.PATIENCE_S
        exercise.watch(session, story, began, lambda now_s: story.normal or now_s >= end_s, hear)
    report = story.report(mended_s)
    exercise.announce(session, by, f"over: {'; '.join(report_lines(report, for_s=mended_s, real=True))}")
    speaker.result(_document(host.name, "exercise", lab, factor, for_s, story, report.as_document()),
                   "\n".join(report_lines(report, for_s=mended_s, real=True)),
                   ExitCode.DONE if story.normal else ExitCode.FOUND_WRONG)


@contextmanager
def _drawn(speaker: Speaker, host: Host) -> Iterator[Callable[[float, Mapping[str, Any], Sequence[Step]], None]]:
    """Steps as lines; on a terminal the GPUs below them, as opsctl top shows them."""
    from opsctl.cli import top_view
    from opsctl.guarding.rows import gpu_rows

    if not speaker.talk.is_terminal or speaker.as_json:
        yield lambda _at, _answer, steps: _say(speaker, steps)
        return
    from rich.live import Live

    with Live(console=speaker.talk, auto_refresh=False, transient=True) as live:
        def hear(_at: float, answer: Mapping[str, Any], steps: Sequence[Step]) -> None:
            _say(speaker, steps)
            live.update(top_view.table(gpu_rows([host], {host.name: answer}), speaker.talk.width), refresh=True)
        yield hear


def _say(speaker: Speaker, steps: Sequence[Step]) -> None:
    for step in steps:
        speaker.say(step.words)


def _document(host: str, kind: str, lab: str, factor: float, for_s: float, story: Story, report: dict[str, Any]
              ) -> dict[str, Any]:
    from dataclasses import asdict

    return {"host": host, "kind": kind, "lab": lab, "factor": factor, "for_s": for_s, "report": report,
            "steps": [asdict(step) for step in story.steps]}
