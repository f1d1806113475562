"""``opsctl gpus accept HOST``: after a repair, take the GPUs that are there for those of gpus.yml."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from opsctl.cli.drain import InventoryOption
from opsctl.cli.speak import AsJson, Debug, Yes, find_inventory, speaking

app = typer.Typer(help="The GPUs that gpus.yml says each host has.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """One verb so far, and it keeps its name."""


@app.command("accept")
def accept(host: Annotated[str, typer.Argument(metavar="HOST", help="A host of the inventory.")],
           inventory: InventoryOption = None, yes: Yes = False, as_json: AsJson = False, debug: Debug = False) -> None:
    """After a repair: take the GPUs that HOST has now for those in gpus.yml. Nothing changes on the host.

    [dim]$ opsctl gpus accept gpu-3[/dim]
    """
    with speaking("gpus accept", as_json=as_json, debug=debug) as speaker:
        from opsctl import gpus
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.ssh_config import write_ssh_config

        fleet = read_fleet(find_inventory(inventory))
        write_ssh_config(fleet)
        with speaker.waiting(f"asking {host} for its GPUs"):
            change = gpus.look(fleet, fleet.host(host))
        kinds = {"now": change.now, "gone": change.gone, "new": change.new}
        document = {"host": host, "changed": change.before != change.now,
                    **{kind: [dataclasses.asdict(gpu) for gpu in found] for kind, found in kinds.items()}}
        if change.before == change.now:
            speaker.result(document, f"{host}: its {len(change.now)} GPUs are those of {fleet.gpus_file.name}")
            return
        for line in gpus.words(change) or ["the same GPUs in other places"]:
            speaker.say(line)
        speaker.confirm(f"Take these {len(change.now)} GPUs for those of {host}?", yes=yes)
        gpus.accept(fleet, change)
        speaker.result(document, f"{fleet.gpus_file}: {host} has {len(change.now)} GPUs\n"
                       "next: opsctl provision deals them; an instance takes them when it starts again")
