"""``opsctl drain``: an operator takes instances out of service, or leaves them a part of their requests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from opsctl.cli.speak import AsJson, Debug, Yes, find_inventory, speaking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opsctl.fleet.model import Fleet, Placement
    from opsctl.traffic import Effect

Targets = Annotated[list[str], typer.Argument(metavar="TARGET...", help="gpu-1, gpu-1:chat.0, 'gpu-*:chat.*', chat or "
                                              "chat.0.")]
InventoryOption = Annotated[Path | None, typer.Option("--inventory", "-i", show_default=False, help="Inventory file. "
                                                      "Default: $OPSCTL_INVENTORY, then ./inventory.ini.")]


def drain(
    targets: Targets,
    reason: Annotated[str, typer.Option("--message", "-m", help="Why, for whoever looks at status.")] = "",
    weight: Annotated[int, typer.Option("--weight", min=0, max=99, metavar="PERCENT",
                                        help="Part of their requests that they keep.")] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Until nothing is in flight there.")] = False,
    allow_outage: Annotated[bool, typer.Option("--allow-outage", help="Also when fewer than min_serving would go on "
                                               "serving.")] = False,
    inventory: InventoryOption = None,
    yes: Yes = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Send instances no more requests, in your name; those in flight end by themselves. No update undoes that.

    [dim]$ opsctl drain gpu-3 -m "new power supply" --wait[/dim]
    """
    with speaking("drain", as_json=as_json, debug=debug) as speaker:
        from opsctl import traffic
        from opsctl.errors import UsageError
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.status import gather

        if wait and weight:
            raise UsageError("drain.wait_and_weight", f"--wait with --weight {weight} would wait for ever: requests go "
                             "on coming.", hint="one of the two")
        fleet = read_fleet(find_inventory(inventory))
        chosen = traffic.choose(fleet, targets)
        write_ssh_config(fleet)
        groups = {service.group for service in fleet.services}
        hosts = [host for host in fleet.hosts if groups & set(host.groups)]
        with speaker.waiting(f"asking {len(hosts)} hosts"):
            states = gather(fleet, hosts)
        traffic.check_heard(states, chosen)
        effects = traffic.effect(fleet, states, chosen, weight)
        owner = traffic.operator_owner()
        speaker.say(_plan(fleet, chosen, states, effects, owner, weight))
        traffic.check(effects, allow_outage=allow_outage)
        speaker.confirm(f"Drain {_counted(len(chosen))} as {owner}?", yes=yes)
        rows = traffic.drain(fleet, chosen, owner, weight, reason, speaker.emit)
        emptied = traffic.wait_until_empty(fleet, chosen, speaker.emit) if wait else []
        changed = sum(row["changed"] for row in rows)
        lines = [f"{row['host']} {row['instance']}: {row['weight']} %" for row in rows]
        lines += [f"{one.server}: empty after {one.seconds} s" for one in emptied]
        speaker.result(
            {"changed": changed, "owner": owner, "instances": rows,
             "services": [{"service": one.service.name, "serving": one.serving, "remaining": one.remaining,
                           "min_serving": one.service.min_serving} for one in effects],
             "emptied": [{"server": one.server, "seconds": one.seconds} for one in emptied]},
            "\n".join([*lines, f"undo: opsctl undrain {' '.join(targets)}"]))


def _plan(fleet: Fleet, chosen: Sequence[Placement], states: Mapping[str, Any], effects: Sequence[Effect], owner: str,
          weight: int) -> Group:
    from opsctl.status import drain_words, rows
    from opsctl.traffic import weight_then

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("host", "instance", "state", "in flight", "weight now", "then"):
        table.add_column(column)
    names = {(placement.host, placement.instance) for placement in chosen}
    for row in rows(fleet, [fleet.host(name) for name in dict.fromkeys(one.host for one in chosen)], states):
        if (row.host, row.instance) not in names:
            continue
        drains = [one for one in states[row.host].get("drains", ()) if one["instance"] == row.instance]
        now = ", ".join(map(drain_words, drains)) or "100 %"
        flight = "" if row.running is None else f"{row.running} running, {row.waiting or 0} waiting"
        table.add_row(row.host, row.instance, row.state, flight, now, f"{weight_then(drains, owner, weight)} %")
    words = [f"{one.service.name}: {one.serving} serving now, {one.remaining} then; min_serving "
             f"{one.service.min_serving}" for one in effects]
    return Group(table, *words)


def _counted(instances: int) -> str:
    return "1 instance" if instances == 1 else f"{instances} instances"
