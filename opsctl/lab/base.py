"""The root that all machines share: a bare Debian, built once with debootstrap, named by the hash of its recipe.

debootstrap gets no mirror: its own default, and this computer's apt proxy settings, are as good here as anywhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

from opsctl.engines.child import die_with_parent, stop_group
from opsctl.engines.events import Emit, Note, PhaseStarted, Progress
from opsctl.errors import OpsctlError
from opsctl.lab.commands import CommandError, run, tool_environment
from opsctl.lab.mounts import mounts_below, unmount_below
from opsctl.lab.requirements import KEYRING
from opsctl.lab.state import CACHE_ROOT, locked

DEFAULT_SUITE = "bookworm"
SUITES = {"bookworm": "Debian 12", "trixie": "Debian 13"}
LOG_LINES = 10

# What the Debian installer's "standard system utilities" and "SSH server" leave behind that roles may meet. No curl,
# no gnupg, no venv: a bare host lacks them too.
PACKAGES = (
    "ca-certificates", "cron", "dbus", "iproute2", "iputils-ping", "kmod", "less", "libpam-systemd", "logrotate",
    "netbase", "openssh-server", "pciutils", "procps", "python3", "python3-apt", "sudo", "systemd", "systemd-sysv",
    "systemd-timesyncd", "vim-tiny",
)
ENABLED = ("systemd-networkd.service", "ssh.service")
# They would take the dpkg lock at a time of their own; a host where they do is a test of its own.
DISABLED = ("apt-daily.timer", "apt-daily-upgrade.timer")
STEP = re.compile(r"I: (Retrieving|Validating|Extracting|Unpacking|Configuring) (\S+)")


def recipe(suite: str) -> str:
    """Hash of everything that decides what the base holds: suite, packages, architecture, this file."""
    parts = {"suite": suite, "packages": PACKAGES, "machine": os.uname().machine,
             "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def ensure_base(suite: str, emit: Emit) -> Path:
    """The base root of a suite, built now if it is not there. Two that build at once build once.

    Raises:
        OpsctlError: ``lab.base_failed`` with debootstrap's last lines.
    """
    bases = CACHE_ROOT / "base"
    wanted = bases / recipe(suite)
    if wanted.is_dir():
        return wanted
    with locked(bases, lambda: emit(Note("another opsctl lab builds a base root; waiting for it"))):
        if wanted.is_dir():
            return wanted
        for leftover in bases.glob("*.building"):
            try:
                _discard(leftover)
            except (OSError, OpsctlError):
                emit(Note(f"{leftover}, of a build that was killed, is still in use; it goes with the next build"))
        emit(PhaseStarted(f"Base root: {SUITES[suite]}, built once (about a minute and a half)"))
        building = bases / f"{wanted.name}.{os.getpid()}.building"  # its own: a killed build's dpkg may write on
        log = bases / "debootstrap.log"
        try:
            _bootstrap(suite, building, log, emit)
            _finish(building)
        except BaseException:
            _discard(building)
            raise
        os.sync()
        building.rename(wanted)
    return wanted


def debootstrap_argv(suite: str, target: Path) -> list[str]:
    """The vector; signatures are checked, never skipped for want of a keyring."""
    return ["debootstrap", "--variant=minbase", "--force-check-gpg", f"--keyring={KEYRING}",
            f"--include={','.join(PACKAGES)}", suite, os.fspath(target)]


def _bootstrap(suite: str, target: Path, log: Path, emit: Emit) -> None:
    process = subprocess.Popen(debootstrap_argv(suite, target), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True,
                               env={**tool_environment(), "DEBIAN_FRONTEND": "noninteractive"},
                               preexec_fn=die_with_parent)  # noqa: PLW1509 - the lab starts no threads
    assert process.stdout is not None  # noqa: S101 - for the type checker
    try:
        said = follow(io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace"), log, emit)
    except BaseException:
        stop_group(process, signal.SIGTERM)
        raise
    finally:
        process.stdout.close()
    if process.wait():
        detail = target / "debootstrap/debootstrap.log"
        if detail.exists():
            said = [*said, *detail.read_text(errors="replace").splitlines()]
        raise OpsctlError("lab.base_failed", f"debootstrap could not build {SUITES[suite]}.",
                          hint=f"does this computer reach a Debian mirror (a proxy: http_proxy)? The whole log: {log}",
                          log_tail=said[-LOG_LINES:])


def follow(output: Iterable[str], log: Path, emit: Emit) -> list[str]:
    """Turns debootstrap's lines into progress, keeps all in ``log``; returns them. The first step tells the total."""
    said: list[str] = []
    counts: dict[str, set[str]] = {}
    with log.open("w") as stream:
        for line in output:
            stream.write(line)
            said.append(line.rstrip())
            step = STEP.match(line)
            if step:
                names = counts.setdefault(step[1], set())
                names.add(step[2])
                total = 0 if step[1] == "Retrieving" else max(len(found) for found in counts.values())
                emit(Progress(f"{step[1]} packages", len(names), total, "items"))
    return said


def _finish(root: Path) -> None:
    """Makes of debootstrap's root a host that was just installed, with nothing in it that must differ between hosts."""
    for name in ("etc/apt/sources.list", "var/log/bootstrap.log", "etc/hostname"):
        (root / name).unlink(missing_ok=True)  # no package source: the fleet's gateway is the only one it will have
    for pattern in ("ssh/ssh_host_*", "apt/sources.list.d/*", "../var/lib/apt/lists/*", "../var/cache/apt/archives/*"):
        for found in (root / "etc").glob(pattern):
            if found.is_file():
                found.unlink()
    (root / "etc/machine-id").write_text("")  # each machine gets its own at its first boot
    (root / "var/lib/dbus/machine-id").unlink(missing_ok=True)
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").write_text("")  # debootstrap's copy of ours names servers out of reach
    (root / "var/log/journal").mkdir(parents=True, exist_ok=True)  # persistent, as on an installed Debian
    for verb, units in (("enable", ENABLED), ("disable", DISABLED)):
        run(["systemctl", f"--root={root}", verb, *units])


def _discard(building: Path) -> None:
    """Removes an unfinished base; never through a mount, for debootstrap mounts /proc and /sys in it."""
    if not building.exists():
        return
    unmount_below(building)
    if mounts_below(building):
        raise CommandError("lab.busy", f"{building} still has mounts; it is left alone.")
    shutil.rmtree(building)


