"""``opsctl drift``: what on hosts is no longer as provision left it, who changed it, and the command that mends it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, find_inventory, speaking
from opsctl.errors import ExitCode, OpsctlError

if TYPE_CHECKING:
    from opsctl.drifting.model import Difference, Drift

NOBODY = "no log that is kept tells who"


def drift(inventory: Inventory = None, limit: Limit = "", as_json: AsJson = False, debug: Debug = False) -> None:
    """Compare hosts with stack.lock and with what provision left there: packages, holds, modules, GPUs; and who did it.

    Who changed a package last is read from the logs of apt and dpkg. Also says which kernel boots next, and whether
    each installed kernel would come up with the driver. Exit 10 when anything differs, 5 when a host does not answer.
    Changes nothing.

    [dim]$ opsctl drift --limit gpu-3[/dim]
    """
    with speaking("drift", as_json=as_json, debug=debug) as speaker:
        from opsctl.drifting.hosts import drift_of_hosts
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config

        fleet = read_fleet(find_inventory(inventory))
        hosts = select_hosts(fleet, limit)
        write_ssh_config(fleet)
        found = drift_of_hosts(fleet, hosts, speaker.emit)
        speaker.result(document(found), render(found), verdict(found))


def verdict(found: Mapping[str, Drift | OpsctlError]) -> ExitCode:
    """As plan's: a host that is silent is refused first, because nobody knows what it hides."""
    if any(isinstance(one, OpsctlError) for one in found.values()):
        return ExitCode.REFUSED
    drifted = any(not isinstance(one, OpsctlError) and one.differences for one in found.values())
    return ExitCode.PENDING if drifted else ExitCode.DONE


def document(found: Mapping[str, Drift | OpsctlError]) -> dict[str, Any]:
    """For ``--json``: every difference of each host, and hosts that did not answer."""
    there = {name: one for name, one in found.items() if not isinstance(one, OpsctlError)}
    return {"hosts": [{"host": name, **one.as_document()} for name, one in there.items()],
            "unreachable": [{"host": name, "error": one.as_document()} for name, one in found.items()
                            if isinstance(one, OpsctlError)],
            "differences": sum(len(one.differences) for one in there.values())}


def render(found: Mapping[str, Drift | OpsctlError]) -> Group:
    """A part for each host, in the inventory's order; what differs in the same way is told together."""
    parts = []
    for name, one in found.items():
        if isinstance(one, OpsctlError):
            parts.append(Text(f"{name}: {one.message.removeprefix(f'{name}: ')}", "bold red"))
            parts += [Text(f"  $ {one.hint}", "bold")] if one.hint else []
            continue
        parts.append(_headline(name, one))
        for group in _alike(one.differences):
            parts += _lines(group)
        if one.unknown:
            parts.append(Text(f"  not looked at, no answer in time: {', '.join(one.unknown)}", "yellow"))
    return Group(*parts)


def _headline(name: str, one: Drift) -> Text:
    if one.skipped:
        return Text(f"{name}: {one.skipped}, so not compared", "dim")
    count = len(one.differences)
    words = f"{count} differences" if count > 1 else "1 difference" if count else "nothing differs"
    driver = f"; driver {one.driver}" if one.driver else ""
    return Text(f"{name}: {words}{driver}{_boots(one)}", "bold red" if count else "green")


def _boots(one: Drift) -> str:
    following = next((kernel for kernel in one.kernels if kernel.next), None)
    if one.boot is None or following is None:
        return ""
    return f"; boots next into {following.release} ({one.boot.by}) {'without it' if following.why else 'with it'}"


def _alike(differences: tuple[Difference, ...]) -> list[list[Difference]]:
    """Those of one layer with the same words, culprit and mending: after an upgrade these are dozens of packages."""
    groups: dict[tuple[object, ...], list[Difference]] = {}
    for one in differences:
        culprit = (one.culprit.by, one.culprit.when, one.culprit.command) if one.culprit else None
        groups.setdefault((one.layer, one.wanted, one.found, culprit, one.fix), []).append(one)
    return list(groups.values())


def _lines(group: list[Difference]) -> list[Text]:
    from opsctl.logs.entries import printable

    one = group[0]
    names = ", ".join(each.what for each in group)
    culprit = one.culprit.words if one.culprit else NOBODY
    return [Text.assemble(("  differs", "bold red"), f"  {one.layer}: {printable(names)}"),
            Text(f"    wanted    {printable(one.wanted)}"), Text(f"    there is  {printable(one.found)}"),
            Text(f"    by        {printable(culprit)}", "" if one.culprit else "dim"),
            Text(f"    type      {printable(one.fix)}", "yellow")]
