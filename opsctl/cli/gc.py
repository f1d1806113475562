"""``opsctl gc``: takes releases away that no host needs any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, Yes, find_inventory, speaking, typed, wanted_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opsctl.collecting import Everything, Part

ServiceOption = Annotated[str, typer.Option("--service", help="Only this one; one that left services.yml is gone for "
                                            "good then. Default: all of services.yml.")]
Keep = Annotated[int, typer.Option("--keep", min=0, metavar="N", help="Keep N more than are needed, the newest.")]


def gc(context: typer.Context, inventory: Inventory = None, service: ServiceOption = "", keep: Keep = 1,
       limit: Limit = "", yes: Yes = False, as_json: AsJson = False, debug: Debug = False) -> None:
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
        from opsctl.releases.books import keepers
        from opsctl.runs import holding
        from opsctl.runs.running import Task, is_unfinished, running

        fleet = read_fleet(find_inventory(inventory))
        chosen = {host.name for host in select_hosts(fleet, limit)}
        meant = tuple(host for host in keepers(fleet, "") if host.name in chosen)
        write_ssh_config(fleet)
        hosts, _ = holding.leave_out(meant, holding.read(fleet, meant), limit)
        with speaker.waiting(f"asking {len(hosts)} hosts"):
            looked = collecting.look_at_all(fleet, hosts, service, keep, speaker.emit)
        for name, where in looked.behind.items():
            speaker.say(f"{', '.join(where)}: releases of {name}, which is not in services.yml any more: "
                        f"opsctl gc --service {name}")
        speaker.say(_table(looked.parts))
        done: dict[str, tuple[Part, ...]] = {}
        intent = {"verb": "gc", "service": service}
        if looked.found:
            speaker.confirm(_question(looked), yes=yes)
        if looked.found or is_unfinished(fleet, intent):  # one that was cut off at its end has to end all the same
            task = Task(fleet, hosts, intent, tuple(looked.parts), typed(context), limit, wanted_run(context))
            speaker.interrupts.careful = True
            with running(task, speaker.emit) as work:
                again = collecting.look_at_all(fleet, work.hosts, service, keep, work.emit)
                if again.parts != looked.parts:  # somebody changed something between the look and the locks
                    speaker.view.close()
                    speaker.say(_table(again.parts))
                    speaker.confirm(f"It is another thing now. {_question(again)}", yes=yes)
                looked = again
                work.run.about_to()
                done = {name: collecting.collect(fleet, name, parts, work.emit) for name, parts in looked.parts.items()}
        rows = [_document(name, part, done.get(name, ())) for name, parts in looked.parts.items() for part in parts]
        freed = sum(row["bytes"] for row in rows)
        speaker.result({"changed": sum(bool(row["removed"] or row["engines"]) for row in rows), "hosts": rows,
                        "left_behind": looked.behind},
                       f"{human_bytes(freed)} came free" if looked.found else "nothing to remove")


def _question(looked: Everything) -> str:
    from opsctl.cli.views import human_bytes

    return f"Remove {human_bytes(looked.size)} on {looked.found} {'host' if looked.found == 1 else 'hosts'}?"


def _document(service: str, part: Part, done: tuple[Part, ...]) -> dict[str, Any]:
    taken = next((one for one in done if one.host == part.host), None)
    return {"host": part.host, "service": service, "kept": dict(part.keep),
            "removed": dict(taken.remove) if taken else {}, "engines": list(taken.engines) if taken else [],
            "bytes": taken.size if taken else 0}


def _table(parts: Mapping[str, tuple[Part, ...]]) -> Table | str:
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
