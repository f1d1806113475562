"""``opsctl doctor``: what is wrong between this computer and the fleet, and the command that mends each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, find_inventory, speaking

if TYPE_CHECKING:
    from opsctl.doctor import Finding

STYLE = {"PASS": "green", "WARN": "yellow", "FIX": "bold red"}


def doctor(inventory: Inventory = None, limit: Limit = "", as_json: AsJson = False, debug: Debug = False) -> None:
    """Check this computer, the fleet's folder and the way to each host; each thing wrong with the command for it.

    PASS: well. WARN: it works, and will hurt. FIX: something cannot work. Exit 9 when there is a FIX. Changes
    nothing; reads the whole bundle.

    [dim]$ opsctl doctor --limit gpu-3[/dim]
    """
    with speaking("doctor", as_json=as_json, debug=debug) as speaker:
        from opsctl.bundle.agent_wheel import agent_files, agent_version
        from opsctl.doctor import counts, judge_here, judge_host
        from opsctl.errors import ExitCode
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.measuring import measure_here, measure_hosts

        fleet = read_fleet(find_inventory(inventory))
        hosts = select_hosts(fleet, limit)
        write_ssh_config(fleet)
        with speaker.waiting("looking at this computer and the bundle"):
            findings = judge_here(measure_here(fleet, hosts))
        with speaker.waiting(f"measuring {len(hosts)} hosts"):
            measured = measure_hosts(fleet, hosts)
        wanted = agent_version(agent_files())
        findings += [found for name, there in measured.items() for found in judge_host(name, there, wanted)]
        total = counts(findings)
        document = {"findings": [one.as_document() for one in findings], "counts": total,
                    "measured": {name: there.as_document() for name, there in measured.items()}}
        speaker.result(document, render(findings), ExitCode.FOUND_WRONG if total["FIX"] else ExitCode.DONE)
        speaker.say(", ".join(f"{count} {level}" for level, count in total.items()))


def render(findings: Sequence[Finding]) -> Group:
    """A line each, and below those that are not well what to type."""
    from opsctl.logs.entries import printable

    width = max((len(one.where) for one in findings), default=0)
    lines = []
    for one in findings:
        lines.append(Text.assemble((f"{one.level:<4}", STYLE[one.level]), f"  {one.where:<{width}}  ",
                                   printable(one.message)))
        if one.fix:
            lines.append(Text(f"      {'':<{width}}  $ {printable(one.fix)}", "bold"))
    return Group(*lines)
