"""``make bench``: ratios against what a user would run instead, in one run, alternating; never a verdict.

Boots a lab of its own for what needs machines (root); without root only the command line is measured.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench import guard

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
OPSCTL = str(BIN / "opsctl")
REPEATS = 5
CHANGES = 3  # there and back
SIZES = (2, 8, 32)  # GPU hosts of a fleet


def seconds(arguments: Sequence[str], folder: Path | None = None) -> float:
    """Wall seconds of one run; a failing run ends the bench with what it said."""
    started = time.perf_counter()
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          cwd=folder, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stdout[-2000:]}")
    return time.perf_counter() - started


def paired(table: Table, what: str, ours: Sequence[str], against: str, theirs: Sequence[str],
           repeats: int = REPEATS, folder: Path | None = None) -> None:
    """A row: medians of both, and the median of the ratios pair by pair."""
    seconds(ours, folder), seconds(theirs, folder)  # warm both
    pairs = [(seconds(ours, folder), seconds(theirs, folder)) for _ in range(repeats)]
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    table.add_row(what, f"{mine:.2f} s", against, f"{other:.2f} s", f"{ratio:.2f}")


def document(arguments: Sequence[str]) -> Any:
    """What a verb answers with ``--json``."""
    done = subprocess.run([*arguments, "--json"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def import_release(fleet: Path, version: str, seed: int) -> None:
    """A release of a model of 100 MB, in the bundle."""
    file = str(fleet / f"{version}.gguf")
    seconds([OPSCTL, "lab", "model", file, "--size", "mid", "--seed", str(seed)])
    seconds([OPSCTL, "model", "import", file, "--service", "chat", "--version", version, "--set", "threads=1",
             "--inventory", str(fleet / "inventory.ini")])


def fleet_rows(table: Table, directory: Path) -> None:
    """Provision and status of a provisioned fleet of 1 + 2 machines; then an update and a rollback of it."""
    fleet = directory / "fleet"
    inventory = fleet / "inventory.ini"
    seconds([OPSCTL, "lab", "up", "--name", "bench", "--gpu-hosts", "2", "--fleet", str(fleet)])
    seconds([OPSCTL, "bundle", "build", str(inventory)])
    import_release(fleet, "v1", seed=0)
    table.add_row("provision, bare to serving", f"{seconds([OPSCTL, 'provision', str(inventory)]):.2f} s", "", "", "")
    change_rows(table, fleet)
    paired(table, "provision, nothing to do", [OPSCTL, "provision", str(inventory)], "ansible-playbook site.yml",
           [str(BIN / "ansible-playbook"), "-i", str(inventory), str(ROOT / "playbooks" / "site.yml")],
           repeats=2, folder=fleet)
    paired(table, "status of three hosts", [OPSCTL, "status", str(inventory)], "ansible all -m ping",
           [str(BIN / "ansible"), "-i", str(inventory), "all", "-m", "ping"],
           repeats=2, folder=fleet)
    scale_rows(table, fleet)


def change_rows(table: Table, fleet: Path) -> None:
    """How long an instance gets no requests, over what its engine needs to start; going back, over going there."""
    import_release(fleet, "v2", seed=1)
    inventory = str(fleet / "inventory.ini")
    out, start, there, back = [], [], [], []
    for _ in range(CHANGES):
        began = time.perf_counter()
        changed = document([OPSCTL, "update-model", inventory, "--version", "v2", "--yes", "--allow-bad"])
        there.append(time.perf_counter() - began)
        back.append(seconds([OPSCTL, "rollback", inventory, "--yes"]))
        out += [instance["out_of_rotation_s"] for instance in changed["instances"]]
        start += [instance["start_s"] for instance in changed["instances"]]
    ratio = statistics.median(gone / bare for gone, bare in zip(out, start, strict=True))
    table.add_row("an instance out of rotation", f"{statistics.median(out):.2f} s", "the engine's bare start",
                  f"{statistics.median(start):.2f} s", f"{ratio:.2f}")
    ratio = statistics.median(home / away for home, away in zip(back, there, strict=True))
    table.add_row("rollback of two hosts", f"{statistics.median(back):.2f} s", "update-model of two hosts",
                  f"{statistics.median(there):.2f} s", f"{ratio:.2f}")


def scale_rows(table: Table, fleet: Path) -> None:
    """Seconds and memory of what looks at a whole fleet, against the number of its hosts."""
    allow = "printf 'MaxStartups 100\\n' >/etc/ssh/sshd_config.d/bench.conf && systemctl reload ssh"
    for machine in ("gpu-1", "gpu-2"):  # sixteen names each: sshd drops logins when too many come at once
        seconds(["ssh", "-F", str(fleet / ".opsctl/ssh_config"), machine, shlex.join(["sudo", "sh", "-c", allow])])
    planned = ["--version", "v2", "--plan", "--allow-bad"]
    smallest: dict[str, float] = {}
    for hosts in SIZES:
        inventory = str(larger(fleet, hosts))
        for what, words in (("status", ["status", inventory]),
                            ("update-model --plan", ["update-model", inventory, *planned]),
                            ("plan", ["plan", inventory, "--limit", "gpu"])):
            took, mebibytes = cost([OPSCTL, *words])
            first = smallest.setdefault(what, took)
            table.add_row(f"{what}, {hosts} GPU hosts", f"{took:.2f} s, {mebibytes:.0f} MiB", f"{SIZES[0]} GPU hosts",
                          f"{first:.2f} s", f"{took / first:.2f}")


def larger(fleet: Path, hosts: int) -> Path:
    """The inventory of a fleet of so many: gpu-1 and gpu-2 answer under an address of its own for each of them."""
    text, known = (fleet / "inventory.ini").read_text(), (fleet / "known_hosts").read_text()
    lines = [line for line in text.splitlines() if line.startswith("gpu-") and "ansible_host=" in line]
    names, pins = [], []
    for at, line in enumerate(lines):
        name, where, *more = line.split()
        network, key = where.partition("=")[2].rpartition(".")[0], pin_of(known, name)
        added = {f"{name}-{number}": f"{network}.{100 + 50 * at + number}"
                 for number in range(2, hosts // len(lines) + 1)}
        names += [" ".join([new, f"ansible_host={address}", *more]) for new, address in added.items()]
        pins += [f"{new},{address} {key}" for new, address in added.items()]
        script = "".join(f"ip address replace {address}/24 dev host0; " for address in added.values())
        order = shlex.join(["sudo", "sh", "-c", f"{script}true"])
        seconds(["ssh", "-F", str(fleet / ".opsctl/ssh_config"), name, order])
    (fleet / "known_hosts").write_text("\n".join(dict.fromkeys([*known.splitlines(), *pins])) + "\n")
    path = fleet / f"inventory-{hosts}.ini"
    path.write_text(text.replace(lines[-1], "\n".join([lines[-1], *names])))
    return path


def pin_of(known: str, name: str) -> str:
    """The host key of a machine, as known_hosts has it."""
    return next(line.split(" ", 1)[1] for line in known.splitlines() if line.split(" ")[0].split(",")[0] == name)


def cost(arguments: Sequence[str]) -> tuple[float, float]:
    """Wall seconds and the most memory (MiB) of a command; exit 10 says that something is to do, which is well here."""
    started = time.perf_counter()
    with subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 10):
        sys.exit(f"{' '.join(arguments)}: exit {process.returncode}\n{said[-2000:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    table = Table("what", "opsctl", "against", "theirs", "ratio", title="medians; ratio below 1: opsctl is faster")
    paired(table, "help", [OPSCTL, "--help"], "ansible-playbook --help",
           [str(BIN / "ansible-playbook"), "--help"])
    try:
        if os.geteuid() == 0:
            with tempfile.TemporaryDirectory() as directory:
                try:
                    fleet_rows(table, Path(directory))
                finally:
                    seconds([OPSCTL, "lab", "down", "--name", "bench"])
    finally:
        Console().print(table)  # what there is of it, also when it is interrupted


guard.main()  # half a minute, and nobody else's machine
main()
