"""``opsctl lab``: a fleet of real machines on this computer, to try, break and test everything on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from opsctl.cli import lab_fault, lab_inbox, lab_load
from opsctl.cli.speak import AsJson, Debug, speaking

app = typer.Typer(help="Real machines on this computer: a fleet to try, break and test everything on.",
                  no_args_is_help=True)
app.command("fault", context_settings={"allow_interspersed_args": True})(lab_fault.fault)
app.command("inbox")(lab_inbox.inbox)
app.command("load", context_settings={"allow_interspersed_args": True})(lab_load.load)

Name = Annotated[str | None, typer.Option("--name", help="Which lab. Default: lab, or the only one there is.",
                                          show_default=False)]
Hosts = Annotated[list[str], typer.Argument(help="Machines of the lab.")]
Label = Annotated[str, typer.Argument(help="Name of the snapshot.")]
Size = Annotated[str, typer.Option("--size", help="small: 0.5 MB, answers at once; mid: 100 MB, slow enough to drain.")]


@app.command()
def up(
    gpu_hosts: Annotated[int | None, typer.Option("--gpu-hosts", min=1, max=200, show_default="3",
                                                  help="How many hosts that serve.")] = None,
    name: Annotated[str, typer.Option("--name", help="Name of the lab.")] = "lab",
    fleet: Annotated[Path | None, typer.Option("--fleet", help="Fleet directory to write. Default: ./NAME.",
                                               show_default=False)] = None,
    suite: Annotated[str | None, typer.Option("--suite", show_default="bookworm",
                                              help="Debian of the machines: bookworm or trixie.")] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", show_default=False, help="Simulated GPUs: 8xH200 for every "
                                             "GPU host, or gpu-1=8xH200,gpu-2=4xL40S. Default: none.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Boot ops-1 (load balancer, gateway, monitor) and gpu-1 .. gpu-N, and write a fleet directory for them."""
    with speaking("lab up", as_json=as_json, debug=debug) as speaker:
        from opsctl.lab import laboratory

        brought = laboratory.up(name, gpu_hosts, fleet, suite, speaker.emit, gpus)
        lab = brought.lab
        said = f"lab {lab.name}: {len(brought.booted)} booted" if brought.booted else f"lab {lab.name} runs already"
        document = {"changed": bool(brought.booted), "booted": list(brought.booted), "lab": laboratory.describe(lab)}
        speaker.result(document,
                       f"{said}; {len(lab.machines)} machines in {lab.subnet}. Next:\n"
                       f"  cd {lab.fleet} && opsctl status\n  opsctl lab ssh gpu-1 --name {lab.name}")


@app.command()
def status(name: Name = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show the labs of this computer and their machines."""
    with speaking("lab status", as_json=as_json, debug=debug) as speaker:
        from opsctl.lab import laboratory, state

        labs = [laboratory.describe(lab) for lab in ((state.find(name),) if name else state.load_all())]
        speaker.result({"labs": labs}, _table(labs) if labs else "no lab on this computer; opsctl lab up makes one")


@app.command(context_settings={"allow_interspersed_args": True})
def ssh(
    host: Annotated[str, typer.Argument(help="Machine of the lab.")],
    command: Annotated[list[str] | None, typer.Argument(help="Command to run there; write -- before it.",
                                                        show_default=False)] = None,
    name: Name = None,
    debug: Debug = False,
) -> None:
    """Log in to a machine, the way opsctl itself does."""
    with speaking("lab ssh", debug=debug):
        from opsctl.lab import login, state

        argv = login.ssh_argv(state.find(name), host, command or [])
        os.execvp(argv[0], argv)  # noqa: S606 - ssh takes this terminal over


@app.command()
def down(
    name: Name = None,
    keep_fleet: Annotated[bool, typer.Option("--keep-fleet", help="Leave the fleet directory as it is.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Remove a lab, however far it came: machines, disks, network, and the fleet directory's files that it wrote."""
    with speaking("lab down", as_json=as_json, debug=debug) as speaker:
        from opsctl.lab import laboratory, state

        wanted = state.meant(name)
        there = state.exists(wanted)
        kept = laboratory.down(wanted, keep_fleet=keep_fleet, emit=speaker.emit)
        stays = "".join(f"\n  kept, for you wrote or changed it: {path}" for path in kept)
        speaker.result({"name": wanted, "changed": there, "kept": list(kept)},
                       f"lab {wanted} is gone{stays}" if there else f"there is no lab {wanted}: nothing to do")


@app.command("power-cut")
def power_cut(hosts: Hosts, name: Name = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Pull the plug: no farewell on the network, and what was not fsynced is lost."""
    with speaking("lab power-cut", as_json=as_json, debug=debug) as speaker:
        from opsctl.lab import laboratory

        lab = laboratory.power_cut(name, hosts, speaker.emit)
        speaker.result(laboratory.describe(lab), f"without power: {', '.join(hosts)}")


@app.command("power-on")
def power_on(hosts: Hosts, name: Name = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Boot machines that are off, and wait until they answer."""
    with speaking("lab power-on", as_json=as_json, debug=debug) as speaker:
        from opsctl.lab import laboratory

        lab = laboratory.power_on(name, hosts, speaker.emit)
        speaker.result(laboratory.describe(lab), f"up: {', '.join(hosts)}")


@app.command()
def snapshot(label: Label = "snapshot", name: Name = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Keep all disks as they are now; machines are stopped and booted again for it."""
    with speaking("lab snapshot", as_json=as_json, debug=debug) as speaker:
        from opsctl.lab import laboratory

        lab = laboratory.snapshot(name, label, speaker.emit)
        speaker.result(laboratory.describe(lab), f"lab {lab.name}: snapshot {label} taken")


@app.command()
def restore(label: Label = "snapshot", name: Name = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Put all disks back as a snapshot has them; what was written since is lost."""
    with speaking("lab restore", as_json=as_json, debug=debug) as speaker:
        from opsctl.lab import laboratory

        lab = laboratory.restore(name, label, speaker.emit)
        speaker.result(laboratory.describe(lab), f"lab {lab.name}: as it was at snapshot {label}")


@app.command()
def model(
    file: Annotated[Path, typer.Argument(help="GGUF file to write.")],
    size: Size = "small",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed, another model of that size.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a random model that a real engine serves; for labs without a real one at hand."""
    with speaking("lab model", as_json=as_json, debug=debug) as speaker:
        from opsctl.lab.fleet_files import note_written
        from opsctl.lab.model import write_model

        count = write_model(file, size, seed)
        note_written(file.absolute())
        speaker.result({"file": str(file.absolute()), "size": size, "seed": seed, "bytes": count},
                       f"{file}: a random model, {count / 1e6:.1f} MB")


def _table(labs: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    has_gpus = any(machine["gpus"] for lab in labs for machine in lab["machines"])
    for column in ("LAB", "MACHINE", "STATE", "ADDRESS", "LOGIN", "DISK", *(("GPUS", "FAULTS") if has_gpus else ())):
        table.add_column(column, no_wrap=column != "FAULTS")
    for lab in labs:
        for machine in lab["machines"]:
            login = machine["user"] + (f" via {machine['proxy_jump']}" if machine["proxy_jump"] else "")
            style = {"running": "green", "off": "red", "unprepared": "yellow"}[machine["state"]]
            table.add_row(lab["name"], machine["name"], f"[{style}]{machine['state']}[/]", machine["address"], login,
                          f"{machine['disk_bytes'] / 1e6:.0f} MB" if machine["disk_bytes"] else "-",
                          *(_gpu_cells(machine) if has_gpus else ()))
    return table


def _gpu_cells(machine: dict[str, Any]) -> tuple[str, str]:
    gpus = machine["gpus"]
    return (f"{gpus['count']}x{gpus['model']}" if gpus else "-",
            f"[yellow]{'; '.join(machine['faults'])}[/]" if machine["faults"] else "-")
