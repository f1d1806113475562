"""``opsctl runs``: what was done to the fleet, by whom, when, and how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from opsctl.cli.speak import AsJson, Debug, Inventory, find_inventory, speaking

if TYPE_CHECKING:
    from opsctl.runs.judge import Known

Number = Annotated[int, typer.Option("--number", "-n", min=1, help="How many, the newest.")]
STYLE = {"unfinished": "yellow", "done": "", "closed": "dim"}


def runs(inventory: Inventory = None, number: Number = 20, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show the runs that changed the fleet or meant to, newest first, and how each ended.

    unfinished: it was interrupted, paused or killed, or it is at work; the same command, or opsctl resume, goes on.

    [dim]$ opsctl runs[/dim]
    """
    with speaking("runs", as_json=as_json, debug=debug) as speaker:
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.runs.running import read_runs

        fleet = read_fleet(find_inventory(inventory))
        write_ssh_config(fleet)
        found = read_runs(fleet, limit=number)
        speaker.result({"runs": [as_document(run) for run in found]}, _table(found) if found else "no run yet")


def as_document(run: Known) -> dict[str, Any]:
    """For ``--json``."""
    from opsctl.runs.running import utc

    return {"run": run.run, "verb": run.verb, "service": run.service, "by": run.by, "began": utc(run.began),
            "hosts": list(run.hosts), "argv": list(run.argv), "state": run.state, "exit_code": run.exit_code,
            "code": run.code, "closed": run.closed, "resumable": run.resumable}


def ending(run: Known) -> str:
    """``done``, ``exit 6 (gate.unhealthy)``, ``closed: taken back by ...``, ``not ended``."""
    if run.closed:
        return f"closed: {run.closed}"
    if run.exit_code is None:
        return "not ended"
    return "done" if run.exit_code == 0 else f"exit {run.exit_code}" + (f" ({run.code})" if run.code else "")


def _table(found: tuple[Known, ...]) -> Table:
    from opsctl.runs.running import utc

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("RUN", "VERB", "BY", "WHEN", "HOSTS", "HOW IT ENDED"):
        table.add_column(column, no_wrap=column in ("RUN", "VERB", "WHEN"))
    for run in found:
        hosts = ", ".join(run.hosts[:3]) + (f" and {len(run.hosts) - 3} more" if len(run.hosts) > 3 else "")
        verb = f"{run.verb} {run.service}".strip()
        table.add_row(*map(Text, (run.run, verb, run.by, utc(run.began), hosts, ending(run))), style=STYLE[run.state])
    return table
