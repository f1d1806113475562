"""``opsctl exec``: one command on many hosts, equal answers folded together."""

from __future__ import annotations

import getpass
import socket
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.text import Text

from opsctl.cli.drain import InventoryOption
from opsctl.cli.speak import AsJson, Debug, Limit, find_inventory, speaking

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opsctl.executing import Outcome


def execute(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="After --: a program and its arguments; no "
                                                 "shell reads them. For a pipe: -- sh -c 'a | b'.")],
    limit: Limit = "",
    sudo: Annotated[bool, typer.Option("--sudo/--no-sudo", help="As root, or as the user who logs in.")] = True,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="How long it may take on a "
                                           "host.")] = 300.0,
    inventory: InventoryOption = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a command on each host at once; hosts that answer the same stand together. Asks nothing before.

    The command line goes into each host's journal (journalctl -t opsctl-audit): no secrets in it. Exit 0: it was 0
    on every host; exit 9: on some it was not, or they did not answer.

    [dim]$ opsctl exec --limit gpu -- df -h /srv[/dim]
    """
    with speaking("exec", as_json=as_json, debug=debug) as speaker:
        from opsctl.errors import ExitCode
        from opsctl.executing import execute, fold, summary
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config

        fleet = read_fleet(find_inventory(inventory))
        hosts = select_hosts(fleet, limit)
        write_ssh_config(fleet)
        by = f"{getpass.getuser()}@{socket.gethostname()}"
        with speaker.waiting(f"running it on {len(hosts)} hosts"):
            outcomes = execute(fleet, hosts, command, by, sudo=sudo, timeout_s=timeout)
        groups = fold(outcomes)
        code = ExitCode.DONE if all(one.good for one in outcomes) else ExitCode.FOUND_WRONG
        speaker.result({"command": command, "sudo": sudo, "hosts": [one.as_document() for one in outcomes],
                        "groups": [[one.host for one in group] for group in groups]}, _render(groups), code)
        silent = [one.host for one in outcomes if one.error is None and not one.audited]
        if silent:
            speaker.say(Text(f"not in the journal of {', '.join(silent)}: logger did not take it", "yellow"))
        speaker.say(summary(outcomes))


def _render(groups: Sequence[Sequence[Outcome]]) -> Group:
    from opsctl.executing import heading
    from opsctl.logs.entries import printable

    parts: list[Text] = []
    for group in groups:
        first = group[0]
        parts.append(Text(heading(group), "bold green" if first.good else "bold red"))
        for text, style in ((first.stdout, ""), (first.stderr, "yellow")):
            parts += [Text(f"  {printable(line)}", style) for line in text.splitlines()]
        if first.error is not None:
            parts += [Text(f"  {first.error['message']}"), Text(f"  hint: {first.error['hint']}", "yellow")]
    return Group(*parts)
