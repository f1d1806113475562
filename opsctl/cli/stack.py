"""``opsctl stack resolve``: which driver, kernel module, fabric manager and CUDA fit GPUs, distribution and engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, Speaker, find_inventory, speaking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import date

    from opsctl.resolving import Found, Overrides
    from opsctl.stack.lock import Lock
    from opsctl.stack.question import Answer

app = typer.Typer(help="The versions that must agree on a GPU host: driver, fabric manager, CUDA, engine.",
                  no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``resolve`` a word of its own while there is no other."""


@app.command("resolve")
def resolve(
    inventory: Inventory = None,
    gpu: Annotated[list[str] | None, typer.Option("--gpu", metavar="8xH200", show_default=False, help="GPUs of one "
                   "host, without any inventory; repeat it for a mixed host.")] = None,
    system: Annotated[str, typer.Option("--os", metavar="OS", help="With --gpu: debian12, debian13, ubuntu22.04 or "
                      "ubuntu24.04.")] = "",
    engine: Annotated[list[str] | None, typer.Option("--engine", metavar="NAME==VERSION", show_default=False,
                                                         help="What is to run there, such as vllm==0.33.0. Default: "
                                                         "what the services' releases pin.")] = None,
    cuda: Annotated[str, typer.Option("--cuda", metavar="VERSION", help="A CUDA release, 13 or 12.8.")] = "",
    driver: Annotated[str, typer.Option("--driver", metavar="VERSION", help="A driver branch, 595, or a whole version. "
                      "Default: nvidia_driver_version of the inventory.")] = "",
    policy: Annotated[str, typer.Option("--policy", help="long: the branch that gets fixes longest; new: the newest "
                      "one.")] = "long",
    limit: Limit = "",
    write: Annotated[bool, typer.Option("--write", help="Write stack.lock beside the inventory.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say which stack fits, and why; or which two facts clash, and what would do.

    With --gpu nobody is asked. With an inventory each GPU host is asked for its GPUs and its distribution, and --write
    puts the answers into stack.lock, which goes into git. Nothing is changed on a host. Exit 5: there is no such stack.

    [dim]$ opsctl stack resolve --gpu 8xH200 --os debian12 --engine vllm==0.33.0[/dim]

    [dim]$ opsctl stack resolve inventory.ini --write[/dim]
    """
    with speaking("stack resolve", as_json=as_json, debug=debug) as speaker:
        from datetime import UTC, datetime

        from opsctl.resolving import Overrides

        typed = Overrides(tuple(engine or ()), cuda, policy, driver)
        _check(gpu, system, inventory, limit, write, typed)
        today = datetime.now(UTC).date()
        if gpu:
            _without_hosts(speaker, gpu, system, typed, today)
        else:
            _with_hosts(speaker, inventory, limit, typed, today, write=write)


def _check(gpu: list[str] | None, system: str, inventory: Path | None, limit: str, write: bool, typed: Overrides
           ) -> None:
    import re

    from opsctl.errors import UsageError
    from opsctl.stack.question import POLICIES

    if typed.policy not in POLICIES:
        raise UsageError("stack.bad_policy", f"--policy {typed.policy} is not known.", hint="--policy long or new")
    for option, value in (("--cuda", typed.cuda), ("--driver", typed.driver)):
        if value and not re.fullmatch(r"\d+(\.\d+){0,2}", value):
            raise UsageError("stack.bad_version", f"{option} {value} is no version.", hint="--cuda 12.8, --driver 595")
    if gpu and (inventory or limit or write):
        raise UsageError("stack.one_or_the_other", "--gpu needs no inventory: no INVENTORY, --limit or --write with "
                         "it.", hint="without --gpu the hosts are asked what they have")
    if gpu and not system:
        raise UsageError("stack.no_os", "--gpu wants --os.", hint="--os debian12")
    if system and not gpu:
        raise UsageError("stack.no_gpu", "--os goes with --gpu; the hosts of an inventory are asked.",
                         hint='--gpu "8xH200"')


def _without_hosts(speaker: Speaker, gpu: list[str], system: str, typed: Overrides, today: date) -> None:
    from dataclasses import replace

    from opsctl.stack.knowledge import knowledge
    from opsctl.stack.naming import Request, Unknown, answer, boards_called, refused, split_board

    known = knowledge()
    asked = [split_board(one) for one in gpu]
    wanted = Request((), system, typed.engines, typed.cuda, typed.policy, typed.driver)
    try:
        boards = tuple(boards_called(count, name, known) for count, name in asked)
    except Unknown as unknown:
        found = refused(unknown, tuple(f"{count} x {name}" for count, name in asked), wanted)
    else:
        found = answer(replace(wanted, boards=boards), known, today)
    _say(speaker, found.as_document(), answer_view(found), refused=found.stack is None)


def _with_hosts(speaker: Speaker, inventory: Path | None, limit: str, typed: Overrides, today: date, *, write: bool
                ) -> None:
    from dataclasses import replace

    from opsctl.errors import OpsctlError, RefusedError
    from opsctl.fleet.inventory import read_fleet
    from opsctl.fleet.select import select_hosts
    from opsctl.fleet.ssh_config import write_ssh_config
    from opsctl.resolving import answers, ask_hosts, engines_of, lock_of, read_lock
    from opsctl.stack.knowledge import knowledge
    from opsctl.stack.lock import changes

    fleet = read_fleet(find_inventory(inventory))
    hosts = [host for host in select_hosts(fleet, limit) if "gpu" in host.groups]
    path = fleet.lock_file
    before = read_lock(path)
    write_ssh_config(fleet)
    with speaker.waiting(f"asking {len(hosts)} hosts"):
        said = ask_hosts(fleet, hosts)
        pinned, silence = ({}, "") if typed.engines else engines_of(fleet, hosts)
    if silence:
        speaker.say(f"[yellow]the gateway did not say which releases count, so the bundle did: {silence}[/yellow]")
    silent = [one for one in said.values() if isinstance(one, OpsctlError)]
    if silent:
        raise RefusedError(silent[0].code, silent[0].message, hint=silent[0].hint, log_tail=silent[0].log_tail)
    facts = {name: replace(one, engines=pinned.get(name, ())) for name, one in said.items()
             if not isinstance(one, OpsctlError)}
    found = answers(hosts, facts, typed, knowledge(), today)
    after = lock_of(fleet, facts, found, before)
    news = changes(before, after)
    bad = [name for name, one in found.items() if one.answer.stack is None]
    writes = write and not bad and bool(news)
    if writes:
        _write(path, after)
    document = {"hosts": {name: one.answer.as_document() for name, one in found.items()},
                "without_gpu": sorted(set(facts) - set(found)), "changes": list(news), "lock": str(path),
                "written": writes}
    _say(speaker, document, fleet_view(found, news, path, written=writes), refused=bool(bad))


def _write(path: Path, lock: Lock) -> None:
    from opsctl.agent.durable import write_atomically
    from opsctl.stack.lock import render

    write_atomically(path, render(lock))


def _say(speaker: Speaker, document: dict[str, Any], text: RenderableType, *, refused: bool) -> None:
    from opsctl.errors import ExitCode

    speaker.result(document, text, ExitCode.REFUSED if refused else ExitCode.DONE)


def answer_view(found: Answer) -> RenderableType:
    """The stack with its reasons, or what clashes with what would do."""
    models = Text(f"{' + '.join(found.models)}, {found.system}" + "".join(f", {one}" for one in found.engines), "bold")
    stack = found.stack
    if stack is None:
        parts = [models, Text("there is no such stack:", "bold red"), *(Text(f"  {fact}") for fact in found.clash)]
        return Group(*parts, *([Text(f"nearest: {found.nearest}", "yellow")] if found.nearest else []))
    fabric = f", fabric manager {stack.version}" if stack.fabric_manager else ""
    absent = [Text(f"not     {' '.join(stack.absent)}")] if stack.absent else []
    load = [Text(f"load    {' '.join(stack.load)}")] if stack.load else []
    return Group(models, Text(f"driver  {stack.version} ({stack.module} kernel module){fabric}", "green"),
                 Text(f"cuda    {stack.cuda}"), Text(f"apt     {' '.join((*stack.packages, *stack.own))}"),
                 *absent, *load,
                 *(Text(f"  because {reason}", "dim") for reason in found.reasons),
                 *(Text(f"  mind: {caution}", "yellow") for caution in found.cautions))


def fleet_view(found: Mapping[str, Found], news: Sequence[str], path: Path, *, written: bool) -> RenderableType:
    """The answer for each host, and what changes in the lock."""
    parts: list[RenderableType] = []
    for name, one in found.items():
        parts += [Text(name, "bold underline"), answer_view(one.answer)]
    parts += [Text(line, "cyan") for line in news]
    if not found:
        parts.append(Text("no host that was asked has a GPU of NVIDIA's"))
    state = f"{path}: written" if written else f"{path}: nothing to change" if not news else \
        f"{path}: not written; --write does, when every host has an answer"
    return Group(*parts, Text(state))
