"""``opsctl history``: what a service was to serve, from when, by whom, and which releases turned out bad."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

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
        speaker.result({"service": name, "source": books.source, "lines": rows}, _lines(name, rows))


def _lines(service: str, rows: list[dict[str, Any]]) -> Text:
    """Columns as wide as they need: a run's name that is cut short helps nobody."""
    from opsctl.releases.history import mark

    if not rows:
        return Text(f"the ledger of {service} is empty: it never served")
    cells = [["#", "when (UTC)", "action", "version", "by", "run", "", "note"]]
    cells += [[str(row["number"]), row["at"][:16].replace("T", " "),
               *(row[key] for key in ("action", "version", "by", "run")), mark(row), row["note"]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    styles = ["green" if row["now"] else "red" if "bad" in (row["action"], mark(row)) else "" for row in rows]
    words = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return Text("\n").join(Text(line, style) for line, style in zip(words, ["bold", *styles], strict=True))
