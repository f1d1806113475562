"""``opsctl update-model``: a new release on every instance, under live traffic."""

from __future__ import annotations

import time
from collections.abc import Mapping
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

if TYPE_CHECKING:
    from opsctl.releases.plan import Plan
    from opsctl.releases.update import Looked, Request
    from opsctl.runs.holding import Hold
    from opsctl.runs.running import Task

ServiceName = Annotated[str, typer.Option("--service", help="Which service. Default: the only one.",
                                          show_default=False)]
Waves = Annotated[str, typer.Option("--waves", help="Sizes of the waves, counts or percentages.")]
DrainTimeout = Annotated[float | None, typer.Option(
    "--drain-timeout", min=1, help="Seconds to wait for running requests. Default: drain_timeout_s in services.yml.",
    show_default=False)]
AllowOutage = Annotated[bool, typer.Option("--allow-outage", help="Go ahead when fewer than min_serving are left.")]
ViaLb = Annotated[bool, typer.Option("--via-lb", help="Drain in HAProxy itself, past an agent that does not answer.")]
SkipUnreachable = Annotated[int, typer.Option("--skip-unreachable", help="Go on without up to N silent hosts.")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Show the plan and stop; exit 10 when something is to do.")]
OnFailureOption = Annotated[str, typer.Option(
    "--on-failure", help="revert: bring back what was moved; stop: leave it and exit 7.")]


def update_model(
    context: typer.Context,
    inventory: Inventory = None,
    version: Annotated[str, typer.Option("--version", help="Version to bring.")] = "",
    service: ServiceName = "",
    limit: Limit = "",
    waves: Waves = "1,25%,100%",
    drain_timeout: DrainTimeout = None,
    min_speed: Annotated[int | None, typer.Option(
        "--min-speed", min=0, help="Percent of the old release's tokens per second. Default: min_speed_percent in "
        "services.yml.", show_default=False)] = None,
    rate_limit: Annotated[str, typer.Option("--rate-limit", help="Bytes per second and host while staging: 200M.",
                                            show_default=False)] = "",
    on_failure: OnFailureOption = "revert",
    allow_outage: AllowOutage = False,
    allow_bad: Annotated[bool, typer.Option("--allow-bad", help="Take a release that was marked as bad.")] = False,
    via_lb: ViaLb = False,
    skip_unreachable: SkipUnreachable = 0,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="Bundle folder. Default: bundle/ beside the "
                                                "inventory.", show_default=False)] = None,
    only_plan: PlanOnly = False,
    yes: Yes = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Bring every instance of a service to another release, wave by wave, without losing a request.

    Shows the plan and asks; stages on all hosts; then drains, cuts over and gates one canary, then waves. An instance
    that fails goes back by itself, and so does what was moved before it.

    [dim]$ opsctl update-model --version v3[/dim]
    """
    with speaking("update-model", as_json=as_json, debug=debug) as speaker:
        from opsctl.errors import UsageError
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts, the_service
        from opsctl.releases import update
        from opsctl.releases.staging import bytes_per_second

        if not version:
            raise UsageError("update.which_version", "update-model wants --version.",
                             hint="opsctl model list shows them; opsctl model import makes one")
        fleet = read_fleet(find_inventory(inventory))
        request = update.Request(
            fleet, the_service(fleet, service), select_hosts(fleet, limit), version, bundle=bundle, waves=waves,
            drain_timeout_s=drain_timeout, min_speed_percent=min_speed, rate_limit=bytes_per_second(rate_limit),
            on_failure=failure_policy(on_failure), allow_outage=allow_outage, allow_bad=allow_bad, via_lb=via_lb,
            skip_unreachable=skip_unreachable)
        if only_plan:
            show_plan(speaker, update.look_forward(request, speaker.emit))
        else:
            task = task_of(context, request, limit)
            carry_out(speaker, request, task, update.look_forward, update.update_model, yes=yes)


def show_plan(speaker: Speaker, looked: Looked) -> None:
    """The plan as the result; exit 10 when it would change something."""
    from opsctl.cli.plan_view import as_document, plan_view
    from opsctl.errors import ExitCode

    plan = looked.plan
    document = {"plan": as_document(plan), "marks_bad": sorted(looked.leaves.values())}
    speaker.result(document, plan_view(plan), ExitCode.PENDING if plan.moves else ExitCode.DONE)


def task_of(context: typer.Context, request: Request, limit: str) -> Task:
    """The run that a change is: the same one, when service and version are the same."""
    from opsctl.runs.running import Task

    intent = {"verb": verb_of(context), "service": request.service.name, "version": request.version}
    hosts = tuple(host for host in request.hosts if request.service.group in host.groups)
    return Task(request.fleet, hosts, intent, (request.service.name,), typed(context), limit, wanted_run(context))


def carry_out(speaker: Speaker, request: Request, task: Task, look: Any, change: Any, *, yes: bool) -> None:
    """Runs ``update_model`` or ``roll_back`` as a run, shows the plan, asks, and says how it ended.

    A person reads as long as they like, so they are asked before anybody is locked out; when the plan is another one
    under the locks, they are asked again.
    """
    from opsctl.cli.plan_view import plan_view
    from opsctl.engines.events import RunFinished
    from opsctl.releases import plan as plans
    from opsctl.runs import holding
    from opsctl.runs.running import running

    started = time.monotonic()
    approved: list[Plan] = []

    def approve(plan: Plan) -> None:
        if approved and same_moves(approved[-1], plan):
            return
        speaker.view.close()
        speaker.say(plan_view(plan))
        if approved:
            speaker.say("[yellow]the fleet has changed since: this is what would be done now[/yellow]")
        speaker.confirm(f"bring {plan.service.name} to {plan.target.version}?", yes=yes)
        approved.append(plan)

    if not yes:
        _, held = holding.leave_out(task.hosts, holding.read(request.fleet, task.hosts), task.limit)
        plan = look(without(request, held), speaker.emit).plan
        if plan.moves:
            plans.check(plan, allow_outage=request.allow_outage)
            approve(plan)
    speaker.interrupts.careful = True
    with running(task, speaker.emit) as work:
        document: dict[str, Any] = change(without(request, work.held), work.run, work.emit, approve)
        document = {**document, "on_hold": list(work.held)}
        work.emit(RunFinished(0, changed=document["changed"], seconds=time.monotonic() - started))
    speaker.result(document, summary(document))


def same_moves(one: Plan, other: Plan) -> bool:
    """Whether two plans do the same, whatever is free on disks meanwhile. Pure."""
    return (one.target, one.moves, one.outage) == (other.target, other.moves, other.outage)


def without(request: Request, held: Mapping[str, Hold]) -> Request:
    """The same request for the hosts that are not on hold."""
    return replace(request, hosts=tuple(host for host in request.hosts if host.name not in held),
                   held=frozenset(held))


def summary(document: dict[str, Any]) -> str:
    """The last lines a person reads."""
    if not document["changed"]:
        return f"nothing to do: {document['service']} serves {document['to']}"
    lines = [f"{document['service']}: {document['from'] or 'nothing'} -> {document['to']}"]
    for row in document["instances"]:
        out = row.get("out_of_rotation_s")
        speed = row.get("tokens_per_second")
        facts = [row["state"], f"out of rotation {out:.1f} s" if out is not None else "",
                 f"{speed:.0f} tokens/s" if speed else ""]
        lines.append(f"  {row['host']:<10} {row['instance']:<10} " + ", ".join(fact for fact in facts if fact))
    if document.get("bad"):
        lines.append(f"marked as bad: {', '.join(document['bad'])} (again only with --allow-bad)")
    if document["skipped"]:
        lines.append(f"left out, not answering: {', '.join(document['skipped'])}")
    if document.get("on_hold"):
        lines.append(f"left alone, on hold: {', '.join(document['on_hold'])}")
    lines.append("next: opsctl status" + (", or opsctl rollback" if "bad" not in document else ""))
    return "\n".join(lines)


def failure_policy(text: str) -> Any:
    """``revert`` or ``stop``.

    Raises:
        UsageError: neither.
    """
    from opsctl.errors import UsageError

    if text not in ("revert", "stop"):
        raise UsageError("update.bad_policy", f"--on-failure {text}: it is revert or stop.",
                         hint="revert brings back what was moved; stop leaves it")
    return text
