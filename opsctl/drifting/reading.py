"""A host's capture as values. Pure."""

from __future__ import annotations

import json

from opsctl.checking.model import Captured
from opsctl.drifting.history import read_history
from opsctl.drifting.model import Expected, Package, Seen
from opsctl.stack.driver import Desired

RECORD = "/etc/opsctl/driver.json"


def read(captured: Captured, expected: Expected) -> Seen:
    logs = captured.document.get("logs", {})
    history = read_history(logs.get("history", ""), logs.get("dpkg", ""), captured.out("typed"))
    return Seen(captured, expected, packages_in(captured.out("dpkg-list")), history,
                read_record(captured.file(RECORD)), captured.document.get("changed", {}))


def read_record(text: str | None) -> Desired | None:
    """What provision left; None where there is no such file, or what is in it is no record."""
    try:
        found = json.loads(text or "")
        return Desired(str(found["version"]), found["flavour"], bool(found["fabric_manager"]), str(found["pin"]),
                       {str(name): str(version) for name, version in found["packages"].items()}, tuple(found["own"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def packages_in(listed: str) -> dict[str, Package]:
    """dpkg's list; what is gone but for its configuration is not there, nor is another architecture's."""
    found = {}
    for row in (line.split("\t") for line in listed.splitlines()):
        if len(row) == 5 and row[1] in ("amd64", "all") and row[4] not in ("not-installed", "config-files"):
            found[row[0]] = Package(row[2], row[3], row[4])
    return found
