"""``opsctl stage``: a release and its engine on every host, ahead of any change of what they serve."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, find_inventory, speaking, typed, wanted_run

if TYPE_CHECKING:
    from opsctl.fleet.model import Fleet, Host, Service
    from opsctl.releases.staging import Found

Version = Annotated[str, typer.Option("--version", help="The release: v3.", show_default=False)]
ServiceName = Annotated[str, typer.Option("--service", help="Which service. Default: the only one.",
                                          show_default=False)]
RateLimit = Annotated[str, typer.Option("--rate-limit", help="Bytes per second on each host: 200M, 1.5G.",
                                        show_default=False)]
SkipUnreachable = Annotated[int, typer.Option("--skip-unreachable", help="Go on without up to N silent hosts.")]
BundleOption = Annotated[Path | None, typer.Option("--bundle", help="Bundle folder. Default: bundle/ beside the "
                                                   "inventory.", show_default=False)]


def stage(
    context: typer.Context,
    inventory: Inventory = None,
    version: Version = "",
    service: ServiceName = "",
    limit: Limit = "",
    rate_limit: RateLimit = "",
    skip_unreachable: SkipUnreachable = 0,
    bundle: BundleOption = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Bring a release and its engine to the hosts of a service and verify both. What they serve is untouched.

    Refuses before the first byte when it does not fit. Interrupted, hosts go on; the same command finds them.

    [dim]$ opsctl stage --version v3 --rate-limit 200M[/dim]
    """
    with speaking("stage", as_json=as_json, debug=debug) as speaker:
        from opsctl.engines.events import RunFinished
        from opsctl.engines.session import Session
        from opsctl.errors import UsageError
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.placements import gateway
        from opsctl.fleet.select import select_hosts, the_service
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.releases.staging import bytes_per_second, find_release, stage_release
        from opsctl.runs.running import Task, running

        if not version:
            raise UsageError("stage.which_version", "stage wants --version.",
                             hint="opsctl model list shows them; opsctl model import makes one")
        rate = bytes_per_second(rate_limit)
        fleet = read_fleet(find_inventory(inventory))
        chosen = the_service(fleet, service)
        hosts = serving_hosts(fleet, chosen, select_hosts(fleet, limit))
        write_ssh_config(fleet)
        started = time.monotonic()
        task = Task(fleet, hosts, {"verb": "stage", "service": chosen.name, "version": version}, (), typed(context),
                    limit, wanted_run(context))
        speaker.interrupts.careful = True
        with running(task, speaker.emit) as work:
            with Session(fleet, gateway(fleet)) as session:
                found = find_release(fleet, session, chosen, version, bundle=bundle)
            rows = stage_release(fleet, work.hosts, chosen, found.release, work.emit, rate_limit=rate, bundle=bundle,
                                 skip_unreachable=skip_unreachable)
            document = {**document_of(found, rows, work.run.name), "on_hold": list(work.held)}
            work.emit(RunFinished(0, changed=document["changed"], seconds=time.monotonic() - started))
        speaker.result(document, summary(document))


def serving_hosts(fleet: Fleet, service: Service, chosen: tuple[Host, ...]) -> tuple[Host, ...]:
    """Those of the chosen hosts that have instances of a service.

    Raises:
        UsageError: none of them has.
    """
    from opsctl.errors import UsageError

    hosts = tuple(host for host in chosen if service.group in host.groups)
    if not hosts:
        raise UsageError("stage.no_hosts", f"no host that was meant has an instance of {service.name}.",
                         hint=f"hosts of {service.group}: " + ", ".join(h.name for h in fleet.group(service.group)))
    return hosts


def document_of(found: Found, rows: list[dict[str, Any]], run: str) -> dict[str, Any]:
    """The verb's result."""
    return {"run": run, "service": found.service, "version": found.version, "release": found.release,
            "bytes": found.size, "changed": sum(row["changed"] for row in rows), "hosts": rows,
            "skipped": [row["host"] for row in rows if row["skipped"]]}


def summary(document: dict[str, Any]) -> str:
    """The last lines a person reads."""
    from opsctl.cli.views import human_bytes

    name = f"{document['service']} {document['version']}"
    lines = [f"{name}: staged on {document['changed']} of {len(document['hosts'])} hosts" if document["changed"] else
             f"nothing to do: {name} is staged"]
    for row in document["hosts"]:
        if row["changed"]:
            engine = ", engine built" if row["engine_built"] else ""
            linked = f", {row['linked_files']} files linked" if row["linked_files"] else ""
            lines.append(f"  {row['host']:<10} {human_bytes(row['fetched_bytes'])} fetched{linked}{engine}")
    if document["skipped"]:
        lines.append(f"left out, not answering: {', '.join(document['skipped'])}")
    if document.get("on_hold"):
        lines.append(f"left alone, on hold: {', '.join(document['on_hold'])}")
    lines.append(f"next: opsctl update-model --version {document['version']}")
    return "\n".join(lines)
