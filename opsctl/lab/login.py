"""How a person logs in to a machine of the lab: with the fleet's own SSH configuration, as opsctl does."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from opsctl.fleet.inventory import read_fleet
from opsctl.fleet.ssh_config import write_ssh_config
from opsctl.lab.state import Lab


def ssh_argv(lab: Lab, host: str, command: Sequence[str]) -> list[str]:
    """The ssh vector for a machine and a command there: none is a login, one word is a line for its shell (as with ssh
    itself), several are an argument vector.

    Raises:
        UsageError: the lab has no such machine.
        ConfigurationError: the fleet directory is wrong or gone.
    """
    lab.machine(host)
    line = command[0] if len(command) == 1 else shlex.join(command)
    return ["ssh", "-F", str(_configuration(lab.fleet)), host, *([line] if command else [])]


def _configuration(fleet: Path) -> Path:
    """The fleet's ssh_config; written anew only when the inventory is newer: another user may own it (sudo)."""
    inventory, written = fleet / "inventory.ini", fleet / ".opsctl" / "ssh_config"
    if written.exists() and inventory.exists() and written.stat().st_mtime_ns >= inventory.stat().st_mtime_ns:
        return written
    return write_ssh_config(read_fleet(inventory))
