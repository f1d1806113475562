"""``opsctl guard``: how the thermal guard of each host stands and why; whether it may act; a latch that is lifted."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from opsctl.cli.drain import InventoryOption
from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, Yes, find_inventory, speaking

app = typer.Typer(help="The thermal guard: how it stands and why, whether it may act.", no_args_is_help=True)
HostName = Annotated[str, typer.Argument(metavar="HOST", help="A host of the inventory.")]


class Mode(StrEnum):
    """As ``opsctl.agent.guard.model.Mode``."""

    OBSERVE = "observe"
    ENFORCE = "enforce"
    AUTO = "auto"


@app.command("status")
def status(inventory: Inventory = None, limit: Limit = "", as_json: AsJson = False, debug: Debug = False) -> None:
    """Show each instance's rung, weight and clocks, its hottest GPU's margin, how soon that is slowed down, and why.

    Rungs: normal, less (fewer requests), slowed (clocks too), least, stop, stop-now. margin: degrees until the driver
    slows a GPU down.
    """
    with speaking("guard status", as_json=as_json, debug=debug) as speaker:
        from opsctl.cli import guard_view
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.guarding.looking import look, watched
        from opsctl.guarding.rows import instance_rows, silent

        fleet = read_fleet(find_inventory(inventory))
        hosts = watched(fleet, select_hosts(fleet, limit))
        write_ssh_config(fleet)
        with speaker.waiting(f"asking {len(hosts)} hosts"):
            answers = look(fleet, hosts)
        rows, quiet = instance_rows(fleet, hosts, answers), silent(hosts, answers)
        speaker.result({"inventory": str(fleet.inventory), "instances": [row.as_document() for row in rows],
                        "silent": quiet}, guard_view.Whole(guard_view.instances(rows, quiet)))


@app.command("explain")
def explain(host: HostName, inventory: InventoryOption = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Say what a host's guard sees, which numbers count, why it is at its rung, its last moves, and what comes next.

    [dim]$ opsctl guard explain gpu-3[/dim]
    """
    with speaking("guard explain", as_json=as_json, debug=debug) as speaker:
        from opsctl.cli import guard_view
        from opsctl.engines.session import Session
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.guarding import explaining
        from opsctl.releases.remote import ask

        fleet = read_fleet(find_inventory(inventory))
        one = fleet.host(host)
        write_ssh_config(fleet)
        with speaker.waiting(f"asking {host}"), Session(fleet, one) as session:
            document = ask(session, ["guard", "--policy"], host=host)
        found = explaining.explain(host, document)
        speaker.result({"host": host, "guard": document,
                        "sections": [{"title": title, "lines": lines} for title, lines in found]},
                       guard_view.Whole(guard_view.sections(found)))


@app.command("mode")
def mode(
    wanted: Annotated[Mode, typer.Argument(metavar="observe|enforce|auto", show_default=False,
                                           help="observe: clocks and units are left alone; enforce: they are not; "
                                           "auto: observe on a host's first day.")],
    limit: Limit = "",
    inventory: InventoryOption = None,
    yes: Yes = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Let the guard only observe, or lower clocks and stop instances too. Weights act in every mode.

    It may be typed while a run is at work, and on held hosts. It lasts until somebody says otherwise.

    [dim]$ opsctl guard mode enforce --limit gpu-3[/dim]
    """
    with speaking("guard mode", as_json=as_json, debug=debug) as speaker:
        from opsctl.cli import guard_view
        from opsctl.errors import ExitCode, OpsctlError
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.guarding import ordering
        from opsctl.guarding.looking import look, watched
        from opsctl.runs.identity import me

        fleet = read_fleet(find_inventory(inventory))
        hosts = watched(fleet, select_hosts(fleet, limit))
        write_ssh_config(fleet)
        with speaker.waiting(f"asking {len(hosts)} hosts"):
            answers = look(fleet, hosts)
        failed = {name: answer for name, answer in answers.items() if isinstance(answer, OpsctlError)}
        if len(failed) == len(hosts):
            raise next(iter(failed.values()))
        changes = ordering.changes(answers, wanted.value)
        names = [one.host for one in changes if one.changed]
        speaker.say(guard_view.Whole(guard_view.planned(changes)))
        for error in failed.values():
            speaker.say(f"[yellow]{error.message}[/yellow]")
        if names:
            speaker.confirm(f"Set the guard of {', '.join(names)} to {wanted.value}?", yes=yes)
            by = me("", "guard").who
            sent = ordering.send_mode(fleet, [fleet.host(name) for name in names], wanted.value, by)
            failed |= {name: answer for name, answer in sent.items() if isinstance(answer, OpsctlError)}
        done = [name for name in names if name not in failed]
        lines = [f"{', '.join(done)}: {wanted.value}" if done else "nothing was changed",
                 *(f"{name} was not told: {error.message}" for name, error in failed.items()),
                 *(["the same command again tries the rest"] if failed else [])]
        speaker.result({"mode": wanted.value, "changed": len(done), "hosts": done,
                        "failed": {name: error.as_document() for name, error in failed.items()}}, "\n".join(lines),
                       ExitCode.PAUSED if failed else ExitCode.DONE)


@app.command("unlatch")
def unlatch(
    host: HostName,
    instance: Annotated[str, typer.Argument(metavar="[INSTANCE]", show_default=False,
                                            help="chat.0. Default: all that are latched there.")] = "",
    inventory: InventoryOption = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Let instances climb again that the guard keeps down because they flapped. Mend the cooling first.

    [dim]$ opsctl guard unlatch gpu-3 chat.0[/dim]
    """
    with speaking("guard unlatch", as_json=as_json, debug=debug) as speaker:
        from opsctl.engines.session import Session
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.guarding import looking, ordering
        from opsctl.runs.identity import me

        fleet = read_fleet(find_inventory(inventory))
        one = fleet.host(host)
        write_ssh_config(fleet)
        with speaker.waiting(f"asking {host}"), Session(fleet, one) as session:
            names = ordering.latched(looking.ask(session), host, instance)
            ordering.send_unlatch(session, names, me("", "guard").who)
        speaker.result({"host": host, "changed": len(names), "instances": names},
                       f"{host}: {', '.join(names)} may climb again" if names else f"{host}: nothing is latched")
