"""``opsctl provision``: bare machines to a fleet that serves; the same command again changes nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from opsctl.cli.speak import (
    AllowFinding,
    AsJson,
    Debug,
    Inventory,
    Limit,
    Speaker,
    find_inventory,
    speaking,
    typed,
    wanted_run,
)

SkipUnreachable = Annotated[int, typer.Option("--skip-unreachable", help="Go on without up to N silent hosts.")]
AskBecome = Annotated[bool, typer.Option("--ask-become-pass", "-K", help="Ask for the sudo password, this once.")]
BundleOption = Annotated[Path | None, typer.Option("--bundle", help="Bundle folder. Default: bundle/ beside the "
                                                   "inventory.", show_default=False)]


def provision(
    context: typer.Context,
    inventory: Inventory = None,
    limit: Limit = "",
    bundle: BundleOption = None,
    skip_unreachable: SkipUnreachable = 0,
    allow_finding: AllowFinding = None,
    ask_become_pass: AskBecome = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Bring every host to what inventory and services.yml say, and first-start instances that never served.

    Checks first and refuses before anything is touched. The same command again reports zero changes.

    [dim]$ opsctl provision inventory.ini[/dim]
    """
    with speaking("provision", as_json=as_json, debug=debug) as speaker:
        from opsctl.checking.preflight import check_allowed
        from opsctl.engines.events import RunFinished
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.placements import clashes
        from opsctl.fleet.select import select_hosts
        from opsctl.provisioning import Request
        from opsctl.provisioning import provision as run_provision
        from opsctl.runs.running import Task, running

        fleet = read_fleet(find_inventory(inventory))
        hosts = select_hosts(fleet, limit)
        allowed = check_allowed(allow_finding or ())
        started = time.monotonic()
        password = _become_password(speaker) if ask_become_pass else None
        clashes(fleet)
        task = Task(fleet, hosts, {"verb": "provision"}, tuple(service.name for service in fleet.services),
                    typed(context), limit, wanted_run(context))
        speaker.interrupts.careful = True
        with running(task, speaker.emit) as work:
            request = Request(fleet, work.hosts, (bundle or fleet.directory / "bundle").absolute(), skip_unreachable,
                              password, allowed)
            document = {**run_provision(request, work.run, work.emit), "on_hold": list(work.held)}
            work.emit(RunFinished(0, changed=document["changed"], seconds=time.monotonic() - started))
        speaker.result(document, summary(document))


def summary(document: dict[str, Any]) -> str:
    """The last lines a person reads: what changed, what serves, what to type next."""
    changed = document["changed"]
    lines = ["nothing to do: zero changes" if changed == 0 else f"provisioned: {changed} changes"]
    for instance in document["instances"]:
        lines.append(f"  {instance['host']:<10} {instance['instance']:<10} {instance['release'] or '-':<8} "
                     f"{instance['state']}")
    if document["skipped"]:
        lines.append(f"left out, not answering: {', '.join(document['skipped'])}")
    if document["on_hold"]:
        lines.append(f"left alone, on hold: {', '.join(document['on_hold'])}")
    lines.append("next: opsctl status")
    return "\n".join(lines)


def _become_password(speaker: Speaker) -> str:
    """Asked for once, kept in memory, handed to Ansible through a pipe."""
    password: str = typer.prompt("sudo password", hide_input=True, err=True)
    speaker.say("used for this run alone; from then on /etc/sudoers.d/opsctl on each host stands in for it")
    return password
