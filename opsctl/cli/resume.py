"""``opsctl resume``: goes on with a run that did not end, whoever began it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from opsctl.cli.drain import InventoryOption
from opsctl.cli.speak import AsJson, Debug, Resumed, Yes, find_inventory, speaking

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opsctl.runs.judge import Known

RunName = Annotated[str, typer.Argument(metavar="[RUN]", show_default=False,
                                        help="As opsctl runs lists it. Default: the only unfinished one.")]


def resume(run: RunName = "", inventory: InventoryOption = None, yes: Yes = False, as_json: AsJson = False,
           debug: Debug = False) -> None:
    """Run the command of an unfinished run again, under its name: what it drained and began is found.

    Any operator may, from any machine, as soon as its locks are free: 60 s after its controller was last heard.

    [dim]$ opsctl resume[/dim]
    """
    chosen = None
    with speaking("resume", as_json=as_json, debug=debug) as speaker:
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.runs.running import read_runs

        path = find_inventory(inventory)
        fleet = read_fleet(path)
        write_ssh_config(fleet)
        chosen = choose(read_runs(fleet), run)
        if chosen is None:
            speaker.result({"run": None}, "nothing to resume")
        else:
            speaker.say(f"opsctl {' '.join(chosen.argv)}   (run {chosen.run}, begun by {chosen.by})")
    if chosen is not None:
        raise typer.Exit(again(chosen, str(path), yes=yes, as_json=as_json, debug=debug))


def choose(runs: Sequence[Known], name: str) -> Known | None:
    """The run that is named, or the only unfinished one; None: there is none. Pure.

    Raises:
        UsageError: ``resume.which``, ``resume.no_such_run``, or it is over for good.
    """
    from opsctl.errors import UsageError
    from opsctl.runs.judge import is_over

    if not name:
        waiting = [run for run in runs if run.unfinished]
        if len(waiting) > 1:
            raise UsageError("resume.which", f"{len(waiting)} runs did not end: "
                             + ", ".join(f"{run.run} ({run.verb} by {run.by})" for run in waiting) + ".",
                             hint=f"say which: opsctl resume {waiting[0].run}")
        return waiting[0] if waiting else None
    for run in runs:
        if run.run == name:
            if not run.resumable or not run.argv:
                raise is_over(run)
            return run
    raise UsageError("resume.no_such_run", f"the gateway knows no run {name}.", hint="opsctl runs lists them")


def again(run: Known, inventory: str, *, yes: bool, as_json: bool, debug: bool) -> int:
    """Calls the run's verb in this process, with this operator's inventory; gives its exit code."""
    from typer.main import get_command

    from opsctl.cli.main import app

    verb = get_command(app).commands[run.argv[0]]  # type: ignore[attr-defined]
    known = {word for parameter in verb.params for word in parameter.opts}
    wanted = {"--yes": yes, "--json": as_json, "--debug": debug}
    more = [word for word, on in wanted.items() if on and word in known]
    code = verb.main(args=[*run.argv[1:], *more, inventory], prog_name=f"opsctl {run.argv[0]}", standalone_mode=False,
                     obj=Resumed(run.run))
    return int(code or 0)
