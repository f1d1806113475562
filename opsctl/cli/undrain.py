"""``opsctl undrain``: takes an operator's drain away; what others drained stays drained, and is said."""

from __future__ import annotations

from typing import Annotated

import typer

from opsctl.cli.drain import InventoryOption, Targets
from opsctl.cli.speak import AsJson, Debug, Yes, find_inventory, speaking


def undrain(
    targets: Targets,
    owner: Annotated[str, typer.Option("--owner", help="Whose drain: operator:NAME, run:RUN, guard. Default: yours.",
                                       show_default=False)] = "",
    inventory: InventoryOption = None,
    yes: Yes = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Take your drain of instances away. Drains of other people, rollouts and the guard stay, and are named.

    [dim]$ opsctl undrain gpu-3[/dim]
    """
    with speaking("undrain", as_json=as_json, debug=debug) as speaker:
        from opsctl import traffic
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.status import drain_words

        fleet = read_fleet(find_inventory(inventory))
        chosen = traffic.choose(fleet, targets)
        write_ssh_config(fleet)
        mine = traffic.operator_owner()
        if owner not in ("", mine):
            speaker.say(f"{owner} is not you: whatever it was drained for may not be over")
            speaker.confirm(f"Take away the drains of {owner} from {len(chosen)} instances?", yes=yes)
        rows = traffic.undrain(fleet, chosen, owner or mine, speaker.emit)
        lines = []
        for row in rows:
            left = ", ".join(drain_words(one) for one in row["drains"])
            said = f"stays at {row['weight']} %: {left}" if left else "gets its requests again" if row["changed"] else \
                "was not drained"
            lines.append(f"{row['host']} {row['instance']}: {said}")
        speaker.result({"changed": sum(row["changed"] for row in rows), "owner": owner or mine, "instances": rows},
                       "\n".join(lines))
