"""``opsctl rollback``: back to the newest earlier release that is good and lies on every host."""

from __future__ import annotations

from typing import Annotated

import typer

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, Yes, find_inventory, speaking
from opsctl.cli.update_model import (
    AllowOutage,
    DrainTimeout,
    OnFailureOption,
    PlanOnly,
    ServiceName,
    SkipUnreachable,
    ViaLb,
    Waves,
    carry_out,
    failure_policy,
    show_plan,
    task_of,
)


def rollback(
    context: typer.Context,
    inventory: Inventory = None,
    to: Annotated[str, typer.Option("--to", help="This version. Default: the newest earlier one that is not bad.",
                                    show_default=False)] = "",
    service: ServiceName = "",
    limit: Limit = "",
    waves: Waves = "1,25%,100%",
    drain_timeout: DrainTimeout = None,
    on_failure: OnFailureOption = "revert",
    allow_outage: AllowOutage = False,
    via_lb: ViaLb = False,
    skip_unreachable: SkipUnreachable = 0,
    only_plan: PlanOnly = False,
    yes: Yes = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Go back to an earlier release, which lies on every host already, and mark what is left as bad.

    Works with the gateway down. After an update that did not end it goes back to what was served before it.

    [dim]$ opsctl rollback[/dim]
    """
    with speaking("rollback", as_json=as_json, debug=debug) as speaker:
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts, the_service
        from opsctl.releases import update

        fleet = read_fleet(find_inventory(inventory))
        request = update.Request(
            fleet, the_service(fleet, service), select_hosts(fleet, limit), to, waves=waves,
            drain_timeout_s=drain_timeout, on_failure=failure_policy(on_failure), allow_outage=allow_outage,
            via_lb=via_lb, skip_unreachable=skip_unreachable)
        if only_plan:
            show_plan(speaker, update.look_back(request, speaker.emit))
        else:
            carry_out(speaker, request, task_of(context, request, limit), update.look_back, update.roll_back, yes=yes)
