"""``opsctl verify``: acceptance tests on the live fleet; exit 9 when something is not as it should be."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, find_inventory, speaking
from opsctl.errors import ExitCode

if TYPE_CHECKING:
    from opsctl.verifying import Check


def verify(inventory: Inventory = None, limit: Limit = "", as_json: AsJson = False, debug: Debug = False) -> None:
    """Test on every host that all is as the fleet says, up to a whole stream through each load balancer.

    Packages and holds, units, releases and their signatures, placements, drains, HAProxy, keys, the bundle, the clock.
    Nothing is changed. Exit 9: something is wrong, and it says what to type.
    """
    with speaking("verify", as_json=as_json, debug=debug) as speaker:
        from opsctl.accepting import verify as run_tests
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.verifying import as_document

        fleet = read_fleet(find_inventory(inventory))
        hosts = select_hosts(fleet, limit)
        started = time.monotonic()
        checks = run_tests(fleet, hosts, speaker.emit)
        wrong = any(check.verdict == "wrong" for check in checks)
        speaker.result(as_document(checks), verify_view(checks, time.monotonic() - started),
                       ExitCode.FOUND_WRONG if wrong else ExitCode.DONE)


def verify_view(checks: list[Check], seconds: float) -> RenderableType:
    """What is wrong with what to type, what is doubtful, what was not looked at, and the count."""
    from opsctl.verifying import counted

    parts: list[RenderableType] = []
    for check in checks:
        if check.verdict == "wrong":
            parts += [Text(f"wrong: {check.host}: {check.check}", "bold red"), Text(f"  expected  {check.expected}"),
                      Text(f"  there is  {check.found}"), Text(f"  type      {check.hint}", "yellow")]
        elif check.verdict == "warning":
            parts.append(Text(f"warning: {check.host}: {check.check}: {check.found}", "yellow"))
    skipped = dict.fromkeys((check.host, check.found) for check in checks if check.verdict == "skipped")
    parts += [Text(f"not looked at: {host}: {why}", "dim") for host, why in skipped]
    counts = counted(checks)
    parts.append(Text(f"{len(checks)} checks in {seconds:.0f} s: {counts['good']} good, {counts['wrong']} wrong, "
                      f"{counts['warning']} warnings, {counts['skipped']} not looked at",
                      "bold red" if counts["wrong"] else "green"))
    return Group(*parts)
