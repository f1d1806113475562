"""``opsctl check``: what would break on hosts, before anything is changed there, and the command that mends each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.text import Text

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, find_inventory, speaking
from opsctl.errors import ExitCode

if TYPE_CHECKING:
    from opsctl.checking.model import Finding

STYLE = {"fix": "bold red", "warn": "yellow", "skip": "dim", "pass": "green"}
All = Annotated[bool, typer.Option("--all", help="What passed and what was skipped too, a line each.")]


def check(inventory: Inventory = None, limit: Limit = "", every: All = False, as_json: AsJson = False,
          debug: Debug = False) -> None:
    """Look at hosts before they are provisioned: kernel, driver, packages, GPUs, disks; each fault with its mending.

    PASS: well. WARN: it works, and will hurt. FIX: something cannot work. Exit 9 when there is a FIX. Changes
    nothing.

    [dim]$ opsctl check --limit gpu-3[/dim]
    """
    with speaking("check", as_json=as_json, debug=debug) as speaker:
        from opsctl.checking.hosts import check_hosts
        from opsctl.checking.table import as_document
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config

        fleet = read_fleet(find_inventory(inventory))
        hosts = select_hosts(fleet, limit)
        write_ssh_config(fleet)
        found = check_hosts(fleet, hosts, speaker.emit)
        document = as_document(found)
        speaker.result(document, render(found, every=every),
                       ExitCode.FOUND_WRONG if document["counts"]["fix"] else ExitCode.DONE)


def render(found: Mapping[str, tuple[Finding, ...]], *, every: bool) -> Group:
    """A part for each host, the worst host and the worst line first; what passed is a count unless it is asked for."""
    from opsctl.checking.model import VERDICTS
    from opsctl.checking.table import counts
    from opsctl.logs.entries import printable

    width = max((len(one.id) for findings in found.values() for one in findings), default=0)
    parts = []
    order = sorted(found, key=lambda name: tuple(-counts(found[name])[verdict] for verdict in ("fix", "warn")))
    for name in order:
        total = counts(found[name])
        folded = ", ".join(f"{total[verdict]} {word}" for verdict, word in (("pass", "passed"), ("skip", "skipped")))
        parts.append(Text(f"{name}: {total['fix']} FIX, {total['warn']} WARN, {folded}", "bold"))
        shown = [one for one in found[name] if every or one.verdict in ("fix", "warn")]
        for one in sorted(shown, key=lambda one: VERDICTS.index(one.verdict)):
            parts.append(Text.assemble((f"  {one.verdict.upper():<4}", STYLE[one.verdict]), f"  {one.id:<{width}}  ",
                                       printable(one.what)))
            if one.fix:
                parts.append(Text(f"        {'':<{width}}  $ {printable(one.fix)}", "bold"))
    return Group(*parts)
