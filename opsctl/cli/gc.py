"""``opsctl gc``: takes releases away that no host needs any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, Yes, find_inventory, speaking

if TYPE_CHECKING:
    from opsctl.collecting import Part

ServiceOption = Annotated[str, typer.Option("--service", help="Only this one; one that left services.yml is gone for "
                                            "good then. Default: all of services.yml.")]
Keep = Annotated[int, typer.Option("--keep", min=0, metavar="N", help="Keep N more than are needed, the newest.")]


def gc(inventory: Inventory = None, service: ServiceOption = "", keep: Keep = 1, limit: Limit = "", yes: Yes = False,
       as_json: AsJson = False, debug: Debug = False) -> None:
    """Remove releases and engines that no host needs any more.

    Each host keeps what it serves, what the ledger says, where a rollback would go, and one more. Gateway and bundle
    keep everything.

    [dim]$ opsctl gc --service chat[/dim]
    """
    with speaking("gc", as_json=as_json, debug=debug) as speaker:
        from opsctl import collecting
        from opsctl.cli.views import human_bytes
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config

        fleet = read_fleet(find_inventory(inventory))
        hosts = select_hosts(fleet, limit)
        write_ssh_config(fleet)
        with speaker.waiting(f"asking {len(hosts)} hosts"):
            states = collecting.survey(fleet, hosts)
            if service and service not in collecting.left_behind(fleet, states):
                fleet.service(service)
            names = [service] if service else [one.name for one in fleet.services]
            parts = {name: collecting.look(fleet, name, states, keep, speaker.emit) for name in names}
        behind = {name: where for name, where in collecting.left_behind(fleet, states).items() if name not in names}
        for name, where in behind.items():
            speaker.say(f"{', '.join(where)}: releases of {name}, which is not in services.yml any more: "
                        f"opsctl gc --service {name}")
        speaker.say(_table(parts))
        found = sum(bool(part.remove or part.engines) for several in parts.values() for part in several)
        done: dict[str, tuple[Part, ...]] = dict.fromkeys(names, ())
        if found:
            size = human_bytes(sum(part.size for several in parts.values() for part in several))
            speaker.confirm(f"Remove {size} on {found} {'host' if found == 1 else 'hosts'}?", yes=yes)
            done = {name: collecting.collect(fleet, name, parts[name], speaker.emit) for name in names}
        rows = [_document(name, part, done[name]) for name in names for part in parts[name]]
        freed = sum(row["bytes"] for row in rows)
        speaker.result({"changed": sum(bool(row["removed"] or row["engines"]) for row in rows), "hosts": rows,
                        "left_behind": behind},
                       f"{human_bytes(freed)} came free" if found else "nothing to remove")


def _document(service: str, part: Part, done: tuple[Part, ...]) -> dict[str, Any]:
    taken = next((one for one in done if one.host == part.host), None)
    return {"host": part.host, "service": service, "kept": dict(part.keep),
            "removed": dict(taken.remove) if taken else {}, "engines": list(taken.engines) if taken else [],
            "bytes": taken.size if taken else 0}


def _table(parts: dict[str, tuple[Part, ...]]) -> Table | str:
    from opsctl.cli.views import human_bytes

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("host", "service", "release", "", "size"):
        table.add_column(column)
    for service, several in parts.items():
        for part in several:
            for release, why in part.keep.items():
                table.add_row(part.host, service, release, f"stays: {why}", "")
            for release, size in part.remove.items():
                table.add_row(part.host, service, release, "goes", human_bytes(size), style="yellow")
            for engine in part.engines:
                table.add_row(part.host, service, engine, "goes: no release needs it", "", style="yellow")
    return table if table.row_count else "no host has a release"
