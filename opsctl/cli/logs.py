"""``opsctl logs``: the journals of many hosts as one, read once or followed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, Speaker, find_inventory, speaking

if TYPE_CHECKING:
    from opsctl.engines.following import Heard
    from opsctl.fleet.model import Fleet
    from opsctl.logs.entries import Entry, Place, Since

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta")
ERROR, WARNING = 3, 4  # priorities of syslog


def logs(
    inventory: Inventory = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    instance: Annotated[str, typer.Option("--instance", metavar="NAME", help="Only this instance, chat.0 or "
                                          "'chat.*'. Default: all.")] = "",
    unit: Annotated[list[str] | None, typer.Option("--unit", "-u", metavar="UNIT", show_default=False,
                                                   help="Another unit of each host, as opsctl-agent; may be given "
                                                        "several times.")] = None,
    since: Annotated[str, typer.Option("--since", metavar="WHEN", help="30s, 10m, 1h, 2d ago, or '2026-11-22 03:10' "
                                       "in UTC.")] = "",
    lines: Annotated[int | None, typer.Option("--lines", "-n", min=0, show_default=False, metavar="N",
                                              help="At most the newest N of each host. Default: 100, with --since "
                                                   "all.")] = None,
    limit: Limit = "",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Read the journals of instances on all their hosts as one, in order of time; -f follows them.

    A host that goes away is noted, and taken up again where it was left when it is back. Times are local, by each
    host's own clock. Exit 9: some hosts did not answer.

    [dim]$ opsctl logs -f --instance chat.0 --since 10m[/dim]
    """
    with speaking("logs", as_json=as_json, debug=debug) as speaker:
        from opsctl.errors import ExitCode, UsageError
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.placements import place
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.logs.entries import LINES, MOST_LINES, Place, read_since, units

        if follow and as_json:
            raise UsageError("logs.follow_and_json", "--json is one document, and -f never ends.",
                             hint="one of the two")
        when = read_since(since)
        fleet = read_fleet(find_inventory(inventory))
        found = units(select_hosts(fleet, limit), place(fleet), instance, unit or ())
        places = {host: Place(names) for host, names in found.items()}
        count = lines if lines is not None else MOST_LINES if since else LINES
        write_ssh_config(fleet)
        printer = Printer(speaker, places)
        try:
            _read(speaker, fleet, places, count, when, printer)
            if follow:
                _follow(fleet, places, count, when, printer)
        except KeyboardInterrupt:
            if not follow:
                raise
            speaker.exit_code = ExitCode.DONE  # this is how following ends
        except BrokenPipeError:  # whoever read has seen enough: head, less
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _read(speaker: Speaker, fleet: Fleet, places: dict[str, Place], count: int, when: Since, printer: Printer) -> None:
    from opsctl.errors import ExitCode
    from opsctl.logs.entries import MOST_LINES, merge
    from opsctl.logs.reading import read

    with speaker.waiting(f"asking {len(places)} hosts"):
        entries, errors = read(fleet, places, count, when.argument())
    merged = merge(entries)
    cut = [host for host, mine in entries.items() if count == len(mine) == MOST_LINES]
    if speaker.as_json:
        document = {"lines": [entry.as_document() for entry in merged], "cut": cut,
                    "errors": {host: error.as_document() for host, error in errors.items()}}
        speaker.result(document, "", ExitCode.FOUND_WRONG if errors else ExitCode.DONE)
    printer.entries([] if speaker.as_json else merged)
    for host, error in errors.items():
        printer.note(f"{host}: {error.message}" if host not in error.message else error.message)
    for host in cut:
        printer.note(f"{host}: only its newest {MOST_LINES} lines; a shorter --since shows all")
    speaker.exit_code = ExitCode.FOUND_WRONG if errors else ExitCode.DONE


def _follow(fleet: Fleet, places: dict[str, Place], count: int, when: Since, printer: Printer) -> None:
    """For ever."""
    from contextlib import closing

    from opsctl.logs.reading import follow

    with closing(follow(fleet, places, count, when)) as batches:
        for heard, entries in batches:
            printer.heard(heard)
            printer.entries(entries)


class Printer:
    """Lines with their host and instance in front; a colour a host on a terminal."""

    def __init__(self, speaker: Speaker, places: dict[str, Place]) -> None:
        from opsctl.logs.entries import instance_of

        self.speaker = speaker
        self._colours = {host: COLOURS[number % len(COLOURS)] for number, host in enumerate(places)}
        self._host_width = max(map(len, places))
        self._name_width = max(len(instance_of(unit)) for place in places.values() for unit in place.units)

    def entries(self, entries: Iterable[Entry]) -> None:
        if sys.stdout.isatty():
            for entry in entries:
                self.speaker.out.print(self._line(entry), soft_wrap=True)
            return
        sys.stdout.writelines(f"{self._line(entry).plain}\n" for entry in entries)  # rich ends on a broken pipe
        sys.stdout.flush()

    def heard(self, heard: Iterable[Heard]) -> None:
        for one in heard:
            back = one.kind == "back"
            self.note(f"{one.host} is back" if back else f"{one.host} went away: {one.text}; trying again")

    def note(self, text: str) -> None:
        from opsctl.logs.entries import printable

        self.speaker.say(Text(f"-- {printable(text)}", "yellow"))

    def _line(self, entry: Entry) -> Text:
        from opsctl.logs.entries import printable

        moment = datetime.fromtimestamp(entry.t_us / 1e6).astimezone().isoformat(sep=" ", timespec="milliseconds")
        style = "red" if entry.priority <= ERROR else "yellow" if entry.priority == WARNING else ""
        front = f"{entry.host:<{self._host_width}} {entry.instance:<{self._name_width}}"
        text = printable(entry.text).replace("\n", f"\n{' ' * len(front)}  ")
        return Text.assemble((front, self._colours[entry.host]), "  ", (moment[5:23], "dim"), "  ", (text, style))
