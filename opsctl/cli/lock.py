"""``opsctl lock status`` and ``opsctl lock break``: who is at work; an end to a run that will not come back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from opsctl.cli.drain import InventoryOption
from opsctl.cli.speak import AsJson, Debug, Inventory, Yes, find_inventory, speaking

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opsctl.runs.breaking import Found

app = typer.Typer(help="Who is at work on the fleet; an end to a run that will not come back.", no_args_is_help=True)


@app.command("status")
def status(inventory: Inventory = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show every lock of every host and of the gateway: whose it is, for which run, and when it was last heard of."""
    with speaking("lock status", as_json=as_json, debug=debug) as speaker:
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.runs.breaking import all_locks

        fleet = read_fleet(find_inventory(inventory))
        write_ssh_config(fleet)
        with speaker.waiting(f"asking {len(fleet.hosts)} hosts"):
            found, silent = all_locks(fleet)
        for name in silent:
            speaker.say(f"[yellow]{name} does not answer[/yellow]")
        speaker.result({"locks": [_document(one) for one in found], "silent": silent},
                       _table(found) if found else "nothing is locked")


@app.command("break")
def break_(run: Annotated[str, typer.Argument(metavar="RUN", help="The run that is given up.")],
           inventory: InventoryOption = None, yes: Yes = False, as_json: AsJson = False, debug: Debug = False) -> None:
    """Take all locks of a run away and close it: nobody resumes it any more. Should it live, it stops at its next act.

    What it had begun on hosts ends there by itself. A rollback takes an unfinished update back and needs none of this.
    """
    with speaking("lock break", as_json=as_json, debug=debug) as speaker:
        from opsctl.errors import ExitCode, OpsctlError, RefusedError, UsageError
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.runs.breaking import all_locks, break_run, run_named

        fleet = read_fleet(find_inventory(inventory))
        write_ssh_config(fleet)
        with speaker.waiting(f"asking {len(fleet.hosts)} hosts"):
            found, silent = all_locks(fleet)
            try:
                known, unheard = run_named(fleet, run), None
            except OpsctlError as error:
                known, unheard = None, error
        mine = [one for one in found if one.holder.run == run]
        open_run = known is not None and known.resumable
        if not mine and not open_run:
            if unheard is not None:
                raise RefusedError(unheard.code, f"no host that answers is locked by run {run}, and whether it is over "
                                   f"is not known: {unheard.message}", hint="again when the gateway answers")
            if known is None:
                raise UsageError("lock.no_such_run", f"no host is locked by run {run}, and the gateway knows none.",
                                 hint="opsctl lock status and opsctl runs show what there is")
            speaker.result({"run": run, "broken": [], "closed": False, "failed": [], "silent": silent},
                           f"nothing to break: {run} is over")
            return
        if mine:
            speaker.say(_table(mine))
        fresh = min((one.beat_s for one in mine), default=None)
        if fresh is not None and fresh < 60:
            speaker.say(f"[yellow]its controller was heard {fresh:.0f} s ago: it seems to be alive[/yellow]")
        if known is not None:
            speaker.say(f"{known.verb} by {known.by} on {', '.join(known.hosts)}; it will not be resumed")
        speaker.confirm(f"Break {len(mine)} lock{'' if len(mine) == 1 else 's'} and close run {run}?", yes=yes)
        outcome = break_run(fleet, mine, run, speaker.emit)
        lines = [f"broken: {len(outcome.broken)} of {len(mine)} locks; run {run} is "
                 + ("closed" if outcome.closed else "not closed" if outcome.failed else "over, or not known"),
                 *([f"the same command again tries the rest: {'; '.join(outcome.failed)}"] if outcome.failed else [])]
        speaker.result({"run": run, "broken": [_document(one) for one in outcome.broken], "closed": outcome.closed,
                        "failed": list(outcome.failed), "silent": silent}, "\n".join(lines),
                       ExitCode.PAUSED if outcome.failed else ExitCode.DONE)


def _document(one: Found) -> dict[str, Any]:
    holder = {key: value for key, value in one.holder.as_document().items() if key != "token"}
    return {"host": one.host, "name": one.name, "holder": holder, "since": one.since, "beat_s": one.beat_s}


def _table(found: Sequence[Found]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("WHERE", "LOCK", "BY", "VERB", "RUN", "SINCE", "HEARD"):
        table.add_column(column, no_wrap=column in ("WHERE", "RUN"))
    for one in found:
        table.add_row(*map(Text, (one.host, one.name, one.holder.who, one.holder.verb, one.holder.run, one.since,
                                  f"{one.beat_s:.0f} s ago")), style="dim" if one.beat_s > 60 else "")
    return table
