"""``make bench``: ratios against what a user would run instead, in one run, alternating; never a verdict.

Boots a lab of its own for what needs machines (root); without root only the command line is measured.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
REPEATS = 5


def seconds(arguments: Sequence[str], **environment: str) -> float:
    """Wall seconds of one run; a failing run ends the bench with what it said."""
    started = time.perf_counter()
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | environment, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stdout[-2000:]}")
    return time.perf_counter() - started


def paired(table: Table, what: str, ours: Sequence[str], against: str, theirs: Sequence[str],
           repeats: int = REPEATS, **environment: str) -> None:
    """A row: medians of both, and the median of the ratios pair by pair."""
    seconds(ours, **environment), seconds(theirs, **environment)  # warm both
    pairs = [(seconds(ours, **environment), seconds(theirs, **environment)) for _ in range(repeats)]
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    table.add_row(what, f"{mine:.2f} s", against, f"{other:.2f} s", f"{ratio:.2f}")


def fleet_rows(table: Table, directory: Path) -> None:
    """Provision and status of a provisioned fleet of 1 + 2 machines."""
    fleet = directory / "fleet"
    inventory = fleet / "inventory.ini"
    opsctl = str(BIN / "opsctl")
    for arguments in (["lab", "up", "--name", "bench", "--gpu-hosts", "2", "--fleet", str(fleet)],
                      ["bundle", "build", str(inventory)], ["lab", "model", str(fleet / "tiny.gguf")],
                      ["model", "import", str(fleet / "tiny.gguf"), "--service", "chat", "--version", "v1",
                       "--inventory", str(inventory)],
                      ["provision", str(inventory)]):
        took = seconds([opsctl, *arguments])
        if arguments[0] == "provision":
            table.add_row("provision, bare to serving", f"{took:.2f} s", "", "", "")
    paired(table, "provision, nothing to do", [opsctl, "provision", str(inventory)], "ansible-playbook site.yml",
           [str(BIN / "ansible-playbook"), "-i", str(inventory), str(ROOT / "playbooks" / "site.yml")],
           repeats=3, ANSIBLE_CONFIG=str(fleet / "ansible.cfg"))
    paired(table, "status of three hosts", [opsctl, "status", str(inventory)], "ansible all -m ping",
           [str(BIN / "ansible"), "-i", str(inventory), "all", "-m", "ping"],
           repeats=3, ANSIBLE_CONFIG=str(fleet / "ansible.cfg"))


def main() -> None:
    table = Table("what", "opsctl", "against", "theirs", "ratio", title="medians; ratio below 1: opsctl is faster")
    paired(table, "help", [str(BIN / "opsctl"), "--help"], "ansible-playbook --help",
           [str(BIN / "ansible-playbook"), "--help"])
    if os.geteuid() == 0:
        with tempfile.TemporaryDirectory() as directory:
            try:
                fleet_rows(table, Path(directory))
            finally:
                seconds([str(BIN / "opsctl"), "lab", "down", "--name", "bench"])
    Console().print(table)


main()
