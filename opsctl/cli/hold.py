"""``opsctl hold``: leave a host alone for a while; every run skips it and says so."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from opsctl.cli.drain import InventoryOption
from opsctl.cli.speak import AsJson, Debug, find_inventory, speaking

HostPattern = Annotated[str, typer.Argument(metavar="HOST", help="A host, or a host pattern.")]
DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[smhdw])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def hold(
    host: HostPattern,
    for_: Annotated[str, typer.Option("--for", metavar="2d", help="How long: 30m, 8h, 2d, 1w. Default: until opsctl "
                                      "release.", show_default=False)] = "",
    message: Annotated[str, typer.Option("--message", "-m", help="Why, for whoever finds it skipped.")] = "",
    inventory: InventoryOption = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Leave a host alone: provision, stage, update-model, rollback and gc skip it, and show why.

    It goes on serving; opsctl drain takes it out of traffic. An update goes on without it, and it is behind then.

    [dim]$ opsctl hold gpu-3 --for 2d -m RMA[/dim]
    """
    with speaking("hold", as_json=as_json, debug=debug) as speaker:
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.runs import holding
        from opsctl.runs.identity import me

        for_s = seconds(for_)
        fleet = read_fleet(find_inventory(inventory))
        hosts = select_hosts(fleet, host)
        write_ssh_config(fleet)
        by = me("", "hold").who
        changed = [one.name for one in hosts if holding.put(fleet, one, by, message, for_s, speaker.emit)]
        names = ", ".join(one.name for one in hosts)
        speaker.result({"changed": len(changed), "hosts": [one.name for one in hosts], "by": by, "message": message,
                        "for_s": for_s},
                       f"{names}: on hold" + (f" for {for_}" if for_ else "") + f"\nundo: opsctl release {host}")


def seconds(text: str) -> float | None:
    """``30m``, ``8h``, ``2d``, ``1w`` as seconds; None, for good, for an empty text. Pure.

    Raises:
        UsageError: ``hold.bad_time``.
    """
    from opsctl.errors import UsageError

    if not text:
        return None
    match = DURATION.fullmatch(text.strip())
    found = float(match["number"]) * SECONDS[match["unit"]] if match else 0.0
    if found <= 0:
        raise UsageError("hold.bad_time", f"--for {text} is no length of time.",
                         hint="a number with s, m, h, d or w: 2d")
    return found
