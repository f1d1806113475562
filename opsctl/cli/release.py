"""``opsctl release``: ends the hold of a host."""

from __future__ import annotations

from opsctl.cli.drain import InventoryOption
from opsctl.cli.hold import HostPattern
from opsctl.cli.speak import AsJson, Debug, find_inventory, speaking


def release(host: HostPattern, inventory: InventoryOption = None, as_json: AsJson = False, debug: Debug = False
            ) -> None:
    """End the hold of a host, whoever put it there. The next provision and update-model bring it up to date.

    [dim]$ opsctl release gpu-3[/dim]
    """
    with speaking("release", as_json=as_json, debug=debug) as speaker:
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.runs import holding

        fleet = read_fleet(find_inventory(inventory))
        hosts = select_hosts(fleet, host)
        write_ssh_config(fleet)
        changed = [one.name for one in hosts if holding.remove(fleet, one, speaker.emit)]
        lines = [f"{one.name}: {'released' if one.name in changed else 'was not on hold'}" for one in hosts]
        speaker.result({"changed": len(changed), "hosts": [one.name for one in hosts]}, "\n".join(lines))
