"""``opsctl history``: what a service was to serve, from when, by whom, and which releases turned out bad."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from opsctl.cli.speak import AsJson, Debug, Inventory, find_inventory, speaking

ServiceOption = Annotated[str, typer.Option("--service", help="Service; not needed when there is one. Also one that "
                                            "left services.yml.")]


def history(inventory: Inventory = None, service: ServiceOption = "", as_json: AsJson = False, debug: Debug = False
            ) -> None:
    """Show the ledger of a service: each release that was to be served, when, by whom, in which run.

    With the gateway down it is read from the hosts' copies. Nothing is written.
    """
    with speaking("history", as_json=as_json, debug=debug) as speaker:
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import the_service
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.releases.books import read_books
        from opsctl.releases.history import history as rows_of

        fleet = read_fleet(find_inventory(inventory))
        name = service or the_service(fleet, service).name
        write_ssh_config(fleet)
        with speaker.waiting("asking the gateway and the hosts"):
            books = read_books(fleet, name, speaker.emit, looking=True)
        if not books.lines:
            fleet.service(name)
        if not books.gateway_up:
            speaker.say(f"[yellow]from the copy on {books.source}; the gateway: {books.silence}[/yellow]")
        rows = rows_of(books.lines)
        speaker.result({"service": name, "source": books.source, "lines": rows}, _table(name, rows))


def _table(service: str, rows: list[dict[str, Any]]) -> Table | str:
    from opsctl.releases.history import mark

    if not rows:
        return f"the ledger of {service} is empty: it never served"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "when (UTC)", "action", "version", "by", "run", "", "note"):
        table.add_column(column)
    for row in rows:
        said = mark(row)
        style = "green" if row["now"] else "red" if row["bad"] or row["action"] == "bad" else ""
        table.add_row(str(row["number"]), row["at"][:19].replace("T", " "), row["action"], row["version"], row["by"],
                      row["run"], said, row["note"], style=style)
    return table
