"""``opsctl plan``: what ``opsctl provision`` would do; nothing is changed. Exit 10 when there is something."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from opsctl.cli.speak import AllowFinding, AsJson, Debug, Inventory, Limit, find_inventory, speaking
from opsctl.cli.views import human_bytes

if TYPE_CHECKING:
    from opsctl.planning import Change, HostPlan, Plan, Step

SHOWN = 4  # names in a cell, unless every task is asked for
ORDER = ("packages", "hold", "user", "file", "command", "unit", "change")
WORDS = {"packages": "packages", "hold": "held", "user": "users", "file": "files", "command": "programs run",
         "unit": "units", "change": "more"}
LONGEST_DIFF = 40  # lines

SkipUnreachable = Annotated[int, typer.Option("--skip-unreachable", help="Go on without up to N silent hosts.")]
AskBecome = Annotated[bool, typer.Option("--ask-become-pass", "-K", help="Ask for the sudo password, this once.")]
BundleOption = Annotated[Path | None, typer.Option("--bundle", help="Bundle folder. Default: bundle/ beside the "
                                                   "inventory.", show_default=False)]
Every = Annotated[bool, typer.Option("--diff", "-v", help="Every task, with a diff of each file.")]


def plan(
    inventory: Inventory = None,
    limit: Limit = "",
    diff: Every = False,
    bundle: BundleOption = None,
    skip_unreachable: SkipUnreachable = 0,
    allow_finding: AllowFinding = None,
    ask_become_pass: AskBecome = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what provision would do, also to hosts that are bare; change nothing.

    Exit 10: changes are pending. 0: nothing to do. 5: a check would refuse, and says what.

    [dim]$ opsctl plan --diff[/dim]
    """
    with speaking("plan", as_json=as_json, debug=debug) as speaker:
        from opsctl.checking.preflight import check_allowed
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.looking_ahead import Question
        from opsctl.looking_ahead import plan as look_ahead
        from opsctl.planning import verdict

        fleet = read_fleet(find_inventory(inventory))
        hosts = select_hosts(fleet, limit)
        password = typer.prompt("sudo password", hide_input=True, err=True) if ask_become_pass else None
        allowed = check_allowed(allow_finding or ())
        folder = (bundle or fleet.directory / "bundle").absolute()
        found = look_ahead(Question(fleet, hosts, folder, password, allowed), speaker.emit)
        speaker.result(found.as_document(), plan_view(found, every=diff), verdict(found, skip_unreachable))


def plan_view(plan: Plan, *, every: bool) -> RenderableType:
    """The table, the diffs when they are asked for, and the count."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("HOST", "WHERE", "WHAT CHANGES", "WHY"):
        table.add_column(column, no_wrap=column == "HOST", overflow="fold")
    for host in plan.hosts:
        for row in rows_of(host, every=every):
            table.add_row(host.host, *map(Text, row))
    for step in plan.steps:
        table.add_row(step.host, Text(step.instance or step.service), Text(step_words(step)), Text(why_of(step)))
    diffs = [Text("\n".join([f"\n{host.host}: {change.task}", *change.diff[:LONGEST_DIFF]]))
             for host in plan.hosts for change in host.changes if change.diff] if every else []
    return Group(*([table] if table.row_count else []), *diffs, Text(tally(plan)))


def rows_of(host: HostPlan, *, every: bool) -> list[tuple[str, str, str]]:
    """(role, what changes, why) of a host: a row for each role that it never had, and for each task that differs."""
    if host.state == "unreachable":
        return [("", "provision would refuse", host.why)]
    rows = []
    for role in host.first:
        changes = [change for change in host.changes if change.role == role and not change.diff]
        why = "first provision" if host.state == "fresh" else "new on this host"
        rows += [(role, _words(change), why) for change in changes] if every else [(role, sum_up(changes), why)]
    rows += [(change.role, _words(change), "differs from what the fleet says") for change in host.changes
             if change.role not in host.first]
    return rows


def sum_up(changes: list[Change]) -> str:
    """``packages: nginx-light; 9 files; units: nginx.service``."""
    parts = []
    for kind in ORDER:
        mine = [change for change in changes if change.kind == kind]
        names = list(dict.fromkeys(name for change in mine for name in change.what))
        if mine and (kind in ("file", "command") or not names):
            parts.append(f"{max(len(names), len(mine))} {WORDS[kind]}")
        elif mine:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            parts.append(f"{WORDS[kind]}: {', '.join(names[:SHOWN])}{more}")
    return "; ".join(parts)


def step_words(step: Step) -> str:
    fetch = "" if step.fetch_bytes == 0 else ", bytes not known" if step.fetch_bytes is None else \
        f", {human_bytes(step.fetch_bytes)} to fetch"
    doing = {"publish": "to the gateway:", "stage": "staged:", "first start": "first start on"}[step.act]
    return f"{doing} {step.service} {step.version}{fetch}"


def why_of(step: Step) -> str:
    return {"publish": "only the bundle here has it", "stage": "the host lacks it, or its engine",
            "first start": "it never served"}[step.act]


def tally(plan: Plan) -> str:
    """The last lines: how many, what for, what to type."""
    lines = []
    fresh = [host for host in plan.hosts if host.state == "fresh"]
    roles = list(dict.fromkeys(role for host in fresh for role in host.first))
    if fresh:
        lines.append(f"first provision of {', '.join(host.host for host in fresh)}: {len(roles)} roles "
                     f"({', '.join(roles)})")
    lines.append(f"{plan.pending} changes are pending: opsctl provision" if plan.pending else
                 "nothing to do: zero changes")
    if plan.silent:
        lines.append(f"not answering, so provision would refuse: {', '.join(plan.silent)} (--limit "
                     f"'!{plan.silent[0]}' or --skip-unreachable {len(plan.silent)} leaves out)")
    return "\n".join(lines)


def _words(change: Change) -> str:
    names = f": {', '.join(change.what)}" if change.what else ""
    return f"{change.task}{names}"
