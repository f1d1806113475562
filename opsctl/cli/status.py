"""``opsctl status``: every host and instance, its release, its state, what is in flight."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, Speaker, find_inventory, speaking

if TYPE_CHECKING:
    from opsctl.fleet.model import Fleet, Host
    from opsctl.status import Row

STYLE = {"serving": "green", "up": "green", "starting": "yellow", "draining": "yellow", "no release": "yellow",
         "drained": "yellow", "changing": "yellow", "behind": "yellow", "ahead": "yellow",
         "not provisioned": "dim", "unreachable": "bold red", "failed": "bold red", "stopped": "bold red",
         "error": "bold red"}
Watch = Annotated[float, typer.Option("--watch", "-w", help="Redraw every SECONDS until Ctrl-C; 0: print once.",
                                      metavar="SECONDS")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit 9 unless every host is up and every instance serves what "
                                      "the ledger says, with all its weight.")]


def status(inventory: Inventory = None, limit: Limit = "", watch: Watch = 0.0, strict: Strict = False,
           as_json: AsJson = False, debug: Debug = False) -> None:
    """Show hosts, groups, instances, releases, state, requests in flight, and who drains what.

    behind, ahead: an instance serves an earlier release than the ledger says, or one that it does not name;
    changing: it is being moved to another one, and gets no requests.
    """
    with speaking("status", as_json=as_json, debug=debug) as speaker:
        from opsctl.errors import ExitCode, UsageError
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.status import endpoints, look_closely, wrong, wrong_words

        if strict and watch > 0:
            raise UsageError("status.strict_and_watch", "--strict answers with an exit code, and --watch never ends.",
                             hint="one of the two")
        fleet = read_fleet(find_inventory(inventory))
        hosts = select_hosts(fleet, limit)
        write_ssh_config(fleet)
        if watch > 0 and not as_json:
            _watch(speaker, fleet, hosts, watch)
            return
        with speaker.waiting(f"asking {len(hosts)} hosts"):
            found, silent = look_closely(fleet, hosts)
        bad = wrong(found, silent)
        document = {"inventory": str(fleet.inventory), "endpoints": endpoints(fleet),
                    "rows": [row.as_document() for row in found], "wrong": bad}
        failing = strict and bool(bad)
        speaker.result(document, render(fleet, found), ExitCode.FOUND_WRONG if failing else ExitCode.DONE)
        if failing:
            speaker.say(Text(wrong_words(bad), "bold red"))


def _watch(speaker: Speaker, fleet: Fleet, hosts: tuple[Host, ...], every_s: float) -> None:
    from opsctl.status import look

    with Live(render(fleet, look(fleet, hosts)), console=speaker.out, auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            live.update(render(fleet, look(fleet, hosts)), refresh=True)


def render(fleet: Fleet, found: list[Row]) -> RenderableType:
    """The table, and below it where each service is to be reached."""
    from opsctl.status import endpoints

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("host", "groups", "instance", "release", "state", "in flight"):
        table.add_column(column)
    for row in found:
        state = f"[{STYLE.get(row.state, 'yellow')}]{row.state}[/]"
        flight = "" if row.running is None else f"{row.running} running, {row.waiting or 0} waiting"
        table.add_row(row.host, " ".join(row.groups), row.instance, row.release, state, flight)
    notes = [row.note if row.note.startswith(row.host) else f"{row.host}: {row.note}" for row in found if row.note]
    reached = [f"{service}: {url}" for service, urls in endpoints(fleet).items() for url in urls]
    return Group(table, *dict.fromkeys(notes), *reached)
