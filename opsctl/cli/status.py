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
    from opsctl.status import Seen

STYLE = {"serving": "green", "up": "green", "starting": "yellow", "draining": "yellow", "no release": "yellow",
         "drained": "yellow", "changing": "yellow", "behind": "yellow", "ahead": "yellow",
         "not provisioned": "dim", "unreachable": "bold red", "failed": "bold red", "stopped": "bold red",
         "error": "bold red"}
Watch = Annotated[float, typer.Option("--watch", "-w", help="Redraw every SECONDS until Ctrl-C; 0: print once.",
                                      metavar="SECONDS")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit 9 unless every host is up, every instance serves what the "
                                      "ledger says, with all its weight and not held back by the guard, and every GPU "
                                      "is there and was just seen.")]
Gpus = Annotated[bool, typer.Option("--gpus", help="A line for each GPU, the worst first, and not only the worst of "
                                    "each host.")]
LEVELS = {"good": "", "warning": "yellow", "bad": "bold red"}


def status(inventory: Inventory = None, limit: Limit = "", watch: Watch = 0.0, strict: Strict = False,
           gpus: Gpus = False, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show hosts, groups, instances, releases, state, requests in flight, who drains what, and GPUs.

    behind, ahead: an instance serves an earlier release than the ledger says, or one that it does not name;
    changing: it is being moved to another one, and gets no requests. margin: degrees until a GPU is slowed down.
    """
    with speaking("status", as_json=as_json, debug=debug) as speaker:
        from opsctl.errors import ExitCode, UsageError
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.status import endpoints, look, wrong, wrong_words

        if strict and watch > 0:
            raise UsageError("status.strict_and_watch", "--strict answers with an exit code, and --watch never ends.",
                             hint="one of the two")
        fleet = read_fleet(find_inventory(inventory))
        hosts = select_hosts(fleet, limit)
        write_ssh_config(fleet)
        if watch > 0 and not as_json:
            _watch(speaker, fleet, hosts, watch, each_gpu=gpus)
            return
        with speaker.waiting(f"asking {len(hosts)} hosts"):
            seen = look(fleet, hosts)
        bad = wrong(seen.rows, seen.silent, seen.gpus, seen.guards)
        document = {"inventory": str(fleet.inventory), "endpoints": endpoints(fleet),
                    "rows": [row.as_document() for row in seen.rows], "gpus": dict(seen.gpus),
                    "guards": dict(seen.guards), "wrong": bad}
        failing = strict and bool(bad)
        speaker.result(document, render(fleet, seen, each_gpu=gpus), ExitCode.FOUND_WRONG if failing else ExitCode.DONE)
        if failing:
            speaker.say(Text(wrong_words(bad), "bold red"))


def _watch(speaker: Speaker, fleet: Fleet, hosts: tuple[Host, ...], every_s: float, *, each_gpu: bool) -> None:
    from opsctl.status import look

    first = render(fleet, look(fleet, hosts), each_gpu=each_gpu)
    with Live(first, console=speaker.out, auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            live.update(render(fleet, look(fleet, hosts), each_gpu=each_gpu), refresh=True)


def render(fleet: Fleet, seen: Seen, *, each_gpu: bool = False) -> RenderableType:
    """The table, GPUs where there are any, and below where each service is to be reached."""
    from opsctl.status import endpoints

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("host", "groups", "instance", "release", "state", "in flight"):
        table.add_column(column)
    for row in seen.rows:
        state = f"[{STYLE.get(row.state, 'yellow')}]{row.state}[/]"
        flight = "" if row.running is None else f"{row.running} running, {row.waiting or 0} waiting"
        table.add_row(row.host, " ".join(row.groups), row.instance, row.release, state, flight)
    notes = [row.note if row.note.startswith(row.host) else f"{row.host}: {row.note}" for row in seen.rows if row.note]
    reached = [f"{service}: {url}" for service, urls in endpoints(fleet).items() for url in urls]
    return Group(table, *_gpu_table(seen, each_gpu=each_gpu), *dict.fromkeys(notes), *reached)


def _gpu_table(seen: Seen, *, each_gpu: bool) -> list[RenderableType]:
    from opsctl.status_gpus import lines

    if not seen.gpus:
        return []
    table = Table(box=None, pad_edge=False, header_style="bold")
    first = ("GPU", "instance", "temperature") if each_gpu else ("GPUs", "hottest")
    for column in ("host", *first, "power", "busy", "memory", ""):
        table.add_column(column)
    for one in lines(seen.gpus, each=each_gpu):
        cells = [one.host, one.gpus, *([one.instance] if each_gpu else [])]
        table.add_row(*cells, Text(one.temperature, LEVELS[one.level]), one.power, one.utilisation, one.memory,
                      Text(one.note, LEVELS[one.level]))
    return [table]
