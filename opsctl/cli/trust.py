"""``opsctl trust [INVENTORY]``: look at the machines' host keys and pin them in known_hosts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, Speaker, Yes, find_inventory, speaking

if TYPE_CHECKING:
    from opsctl.fleet.trust import Finding

STYLE = {"new": "yellow", "replaced": "yellow", "pinned": "green"}


def trust(
    inventory: Inventory = None, limit: Limit = "",
    fingerprints: Annotated[Path | None, typer.Option(
        "--fingerprints", metavar="FILE", show_default=False,
        help="Compare with this file instead of asking: `host SHA256:...` a line.")] = None,
    replace: Annotated[list[str] | None, typer.Option(
        "--replace", metavar="HOST", show_default=False,
        help="This host was installed anew: take its new key for the pinned one. May be repeated.")] = None,
    yes: Yes = False, as_json: AsJson = False, debug: Debug = False,
) -> None:
    """Show the machines' host keys, ask, and pin them. A key that has changed is refused."""
    with speaking("trust", as_json=as_json, debug=debug) as speaker:
        from opsctl.errors import ConfigurationError, ExitCode, UsageError
        from opsctl.fleet import known_hosts
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.fleet.trust import Verdict, examine, pin, read_fingerprints, refusal, targets

        fleet = read_fleet(find_inventory(inventory))
        write_ssh_config(fleet)
        if fingerprints is not None and not fingerprints.is_file():
            raise ConfigurationError("trust.no_fingerprints", f"there is no file {fingerprints}.",
                                     hint="a line a host: gpu-1 SHA256:...")
        known = read_fingerprints(fingerprints.read_text(encoding="utf-8"), fingerprints) if fingerprints else None
        rounds = targets(fleet, select_hosts(fleet, limit))
        names = {target.name for wanted in rounds for target in wanted}
        if strangers := sorted(set(replace or []) - names):
            raise UsageError("trust.no_such_host", f"--replace {strangers[0]} is none of the hosts looked at.",
                             hint=f"hosts: {', '.join(sorted(names))}")
        found: list[Finding] = []
        pinned = 0
        for wanted in rounds:  # those behind a jump can be asked only once the jump is believed
            pins = known_hosts.load(fleet.known_hosts)
            findings = examine(fleet, wanted, pins, replace=replace or (), fingerprints=known)
            found += findings
            _show(speaker, findings)
            if error := refusal(findings, fleet.known_hosts):
                raise error
            if any(finding.verdict in (Verdict.NEW, Verdict.REPLACED) for finding in findings):
                if known is None:
                    speaker.confirm("Are these the machines' own keys?", yes=yes)
                pinned += pin(fleet, findings)
        silent = [finding for finding in found if finding.verdict is Verdict.SILENT]
        for finding in silent:
            speaker.say(finding.problem)
        document = {"pinned": pinned, "hosts": [_document(finding) for finding in found]}
        text = f"{pinned} key{'s' * (pinned != 1)} pinned in {fleet.known_hosts}" if pinned else "nothing new to pin"
        if silent:
            text += f"; {', '.join(finding.target.name for finding in silent)} did not answer"
        exit_code = ExitCode.DONE if not silent else ExitCode.PAUSED if pinned else ExitCode.REFUSED
        speaker.result(document, text, exit_code)


def _show(speaker: Speaker, findings: list[Finding]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("host", "address", "key", "fingerprint", ""):
        table.add_column(title, overflow="fold", no_wrap=title == "fingerprint")
    for finding in findings:
        key = finding.key
        table.add_row(finding.target.name, finding.target.pin_name, key.type if key else "",
                      key.fingerprint if key else "", str(finding.verdict), style=STYLE.get(finding.verdict, "red"))
    if findings:
        speaker.say(table)


def _document(finding: Finding) -> dict[str, str]:
    key = finding.key
    return {"host": finding.target.name, "address": finding.target.pin_name, "state": str(finding.verdict),
            "type": key.type if key else "", "fingerprint": key.fingerprint if key else "", "problem": finding.problem}
