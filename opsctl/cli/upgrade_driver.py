"""``opsctl upgrade-driver``: another driver on every GPU host, wave by wave."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsctl.cli.speak import (
    AsJson,
    Debug,
    Inventory,
    Limit,
    Speaker,
    Yes,
    find_inventory,
    speaking,
    typed,
    verb_of,
    wanted_run,
)
from opsctl.cli.update_model import AllowOutage, DrainTimeout, PlanOnly, SkipUnreachable, ViaLb, Waves

if TYPE_CHECKING:
    from opsctl.driver_upgrade.plan import Plan
    from opsctl.driver_upgrade.verb import Request
    from opsctl.runs.running import Task


def upgrade_driver(
    context: typer.Context,
    inventory: Inventory = None,
    to: Annotated[str, typer.Option("--to", help="The driver's version, as the inventory's nvidia_driver_version "
                                                 "says it.")] = "",
    limit: Limit = "",
    waves: Waves = "1,25%,100%",
    drain_timeout: DrainTimeout = None,
    allow_outage: AllowOutage = False,
    via_lb: ViaLb = False,
    skip_unreachable: SkipUnreachable = 0,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="Bundle folder. Default: bundle/ beside the "
                                                "inventory.", show_default=False)] = None,
    only_plan: PlanOnly = False,
    yes: Yes = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Bring the GPUs of every host to another driver, up or down, wave by wave, without losing a request.

    A host keeps its old packages first; it is drained, changed, rebooted where it must be, and serves again. One that
    does not serve on the new driver gets the old one back by itself; those before it stay on the new one.

    [dim]$ opsctl upgrade-driver --to 595.71.05[/dim]
    """
    with speaking("upgrade-driver", as_json=as_json, debug=debug) as speaker:
        from opsctl.driver_upgrade import verb
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.runs.running import Task

        verb.check_version(to)
        fleet = read_fleet(find_inventory(inventory))
        hosts = verb.with_driver(select_hosts(fleet, limit), limit)
        request = verb.Request(fleet, hosts, to, (bundle or fleet.directory / "bundle").absolute(), waves,
                               drain_timeout, allow_outage, via_lb, skip_unreachable)
        if only_plan:
            _show_plan(speaker, verb.look(request, _log(request), speaker.emit))
        else:
            intent = {"verb": verb_of(context), "to": to}
            _carry_out(speaker, request, Task(fleet, hosts, intent, request.services, typed(context), limit,
                                              wanted_run(context)), yes=yes)


def _show_plan(speaker: Speaker, plan: Plan) -> None:
    from opsctl.cli.driver_view import as_document, plan_view
    from opsctl.errors import ExitCode

    speaker.result({"plan": as_document(plan)}, plan_view(plan), ExitCode.PENDING if plan.moves else ExitCode.DONE)


def _carry_out(speaker: Speaker, request: Request, task: Task, *, yes: bool) -> None:
    """A person is asked before anybody is locked out, and again when the plan is another one under the locks."""
    from opsctl.cli.driver_view import plan_view, summary
    from opsctl.driver_upgrade import plan as plans
    from opsctl.driver_upgrade import verb
    from opsctl.engines.events import RunFinished
    from opsctl.runs import holding
    from opsctl.runs.running import running

    started = time.monotonic()
    approved: list[Plan] = []

    def approve(plan: Plan) -> None:
        if approved and (approved[-1].to, approved[-1].moves) == (plan.to, plan.moves):
            return
        speaker.view.close()
        speaker.say(plan_view(plan))
        if approved:
            speaker.say("[yellow]the fleet has changed since: this is what would be done now[/yellow]")
        speaker.confirm(f"bring {len(plan.moves)} hosts to driver {plan.to}?", yes=yes)
        approved.append(plan)

    if not yes:
        hosts, _ = holding.leave_out(task.hosts, holding.read(request.fleet, task.hosts), task.limit)
        plan = verb.look(replace(request, hosts=hosts), _log(request), speaker.emit)
        if plan.moves:
            plans.check(plan, allow_outage=request.allow_outage)
            approve(plan)
    speaker.interrupts.careful = True
    with running(task, speaker.emit) as work:
        document: dict[str, Any] = verb.upgrade_driver(replace(request, hosts=work.hosts), work.run, work.emit, approve)
        document = {**document, "on_hold": list(work.held)}
        work.emit(RunFinished(0, changed=document["changed"], seconds=time.monotonic() - started))
    speaker.result(document, summary(document))


def _log(request: Request) -> Path:
    """What Ansible says of a look that is no run."""
    return request.fleet.directory / ".opsctl" / "plan.log"
