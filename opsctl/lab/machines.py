"""One machine: its files, its boot, its clean end and its power cut.

systemd-nspawn only watches: killing it does not end the machine, killing the machine's init does.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from opsctl.errors import OpsctlError
from opsctl.lab import cgroups, inbox, layers, network
from opsctl.lab.commands import run, tool_environment
from opsctl.lab.gpu import state_file, trees
from opsctl.lab.gpu.profiles import named
from opsctl.lab.mounts import mounts
from opsctl.lab.processes import Process, all_processes, arguments, children, identify, send, wait_gone
from opsctl.lab.state import Lab, Machine

SSH_PORT = 22
CONSOLE_LINES = 15
STOP_DEADLINE_S = 90.0  # systemd's own: after it, units are killed
END_DEADLINE_S = 10.0
POWER_OFF = signal.SIGRTMIN + 4  # systemd(1): starts poweroff.target
KEEP_BOOTED = Path(__file__).with_name("keep-booted.sh")
NSPAWN_STATE = Path("/run/systemd/nspawn")
MARK = "etc/opsctl-lab"  # what the lab's packages look for: they install nowhere else
OPERATOR = "operator"  # a group of this name is part of every Debian


def console_log(place: Path) -> Path:
    return place / "console.log"


def nspawn_argv(lab: Lab, machine: Machine, *, keep_unit: bool) -> list[str]:
    """The vector that boots a machine. ``keep_unit``: there is no systemd here to ask for a scope."""
    return [
        "systemd-nspawn",
        "--quiet",
        "--settings=no",
        f"--directory={layers.root(lab.place(machine))}",
        f"--machine={network.machine_name(lab.number, machine.name)}",
        f"--hostname={machine.name}",
        f"--network-bridge={lab.bridge}",
        "--boot",
        "--register=no",
        *(["--keep-unit"] if keep_unit else []),
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
        "--console=read-only",
        *([f"--bind={trees.shared(lab.place(machine))}:{trees.INSIDE}"] if machine.gpus else []),
    ]


def hosts_file(lab: Lab) -> str:
    """/etc/hosts: the machines of the lab know each other by name."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    return "\n".join([*lines, *(f"{machine.address} {machine.name}" for machine in lab.machines)]) + "\n"


def network_file(lab: Lab, machine: Machine) -> str:
    """systemd-networkd's file for the one interface. No gateway: there is no way out."""
    return (f"[Match]\nName=host0\n\n[Network]\nAddress={machine.address}/{lab.subnet.prefixlen}\n"
            "LinkLocalAddressing=no\nIPv6AcceptRA=no\nLLDP=no\n")


def prepare(lab: Lab, machine: Machine, *, host_key: Path, login_key: str) -> Machine:
    """Makes the machine's disk and writes what makes it this machine; leaves it mounted.

    Args:
        host_key: private host key (OpenSSH, ed25519); the public one lies beside it with ``.pub``.
        login_key: public key line of who may log in.
    """
    assert lab.base is not None, "the base is there before machines are"  # noqa: S101 - for the type checker
    place = lab.place(machine)
    layers.unmount(place)
    layers.create(place)
    layers.mount(place, lab.base)
    root = layers.root(place)
    _write(root / "etc/hostname", machine.name + "\n")
    _write(root / MARK, f"This machine is part of the lab {lab.name} of opsctl; its GPUs, if any, are simulated.\n")
    _write(root / "etc/hosts", hosts_file(lab))
    _write(root / "etc/systemd/network/10-host0.network", network_file(lab, machine))
    for suffix, mode in (("", 0o600), (".pub", 0o644)):
        _write(root / f"etc/ssh/ssh_host_ed25519_key{suffix}",
               host_key.with_name(host_key.name + suffix).read_text(), mode)
    home = root / "root"
    owner = (0, 0)
    if machine.user != "root":
        run(["chroot", root, "useradd", "--create-home", "--shell", "/bin/bash", "--gid", OPERATOR, machine.user])
        _write(root / "etc/sudoers.d" / machine.user, f"{machine.user} ALL=(ALL) NOPASSWD: ALL\n", 0o440)
        home = root / "home" / machine.user
        owner = (home.stat().st_uid, home.stat().st_gid)
    (home / ".ssh").mkdir(mode=0o700, exist_ok=True)
    _write(home / ".ssh/authorized_keys", login_key, 0o600)
    for path in (home / ".ssh", home / ".ssh/authorized_keys"):
        os.chown(path, *owner)
    if has_inbox(lab, machine):
        inbox.install(root)
    layers.sync(place)
    return replace(machine, prepared=True)


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.write_text(text)
    path.chmod(mode)


def has_inbox(lab: Lab, machine: Machine) -> bool:
    """Whether alerts are sent to it: it watches, and there are GPUs to be watched."""
    return "monitor" in machine.groups and any(other.gpus for other in lab.machines)


def boot(lab: Lab, machine: Machine) -> Machine:
    """Starts a machine and comes back at once; ``wait_until_up`` waits."""
    assert lab.base is not None, "a prepared machine has a base"  # noqa: S101 - for the type checker
    place = lab.place(machine)
    if strays(place):  # booted by a command that died before it could say so
        end(lab, machine)
    layers.mount(place, lab.base)
    network.remove(network.link_of(lab.number, machine.name))
    insert_gpus(lab, machine)
    environment = tool_environment()
    if not cgroups.is_unified():
        environment["SYSTEMD_NSPAWN_UNIFIED_HIERARCHY"] = "1"
    argv = ["/bin/sh", str(KEEP_BOOTED), *map(str, cgroups.create(lab.name, machine.name)), "--",
            *nspawn_argv(lab, machine, keep_unit=not cgroups.systemd_runs_here())]
    with console_log(place).open("wb") as console:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
                                   start_new_session=True, env=environment)
    return replace(machine, keeper=identify(process.pid), init=None)


def insert_gpus(lab: Lab, machine: Machine) -> None:
    """Writes the files of the machine's GPUs, if they are not there yet."""
    if machine.gpus is None:
        return
    place = lab.place(machine)
    trees.write(place, machine.gpus)
    if not trees.state_path(place).exists():
        uuids = state_file.gpu_uuids(lab.name, machine.name, machine.gpus)
        state_file.create(trees.state_path(place), uuids, named(machine.gpus.model))


def wait_until_up(lab: Lab, machine: Machine, deadline: float) -> Machine:
    """Waits until a login over SSH is welcome; returns the machine with its init.

    Args:
        deadline: on the monotonic clock, seconds.

    Raises:
        OpsctlError: ``lab.boot_failed`` or ``lab.boot_slow``, with the console's last lines.
    """
    while True:
        init = find_init(machine)
        if init and _sshd_answers(machine.address) and not _logins_are_refused(init):
            return replace(machine, init=init)
        if not (machine.keeper and machine.keeper.alive):
            raise OpsctlError("lab.boot_failed", f"the machine {machine.name} of lab {lab.name} ended while it booted.",
                              hint=f"its console: {console_log(lab.place(machine))}; opsctl lab down removes the lab",
                              log_tail=console_tail(lab.place(machine)))
        if time.monotonic() > deadline:
            raise OpsctlError("lab.boot_slow", f"the machine {machine.name} of lab {lab.name} does not answer SSH.",
                              hint=f"its console: {console_log(lab.place(machine))}; opsctl lab down removes the lab",
                              log_tail=console_tail(lab.place(machine)))
        time.sleep(0.05)


def console_tail(place: Path) -> tuple[str, ...]:
    """The console's last lines that say something; what a terminal would have hidden is left out."""
    try:
        text = console_log(place).read_text(errors="replace")
    except FileNotFoundError:
        return ()
    lines = ["".join(letter for letter in line if letter.isprintable()).rstrip() for line in text.splitlines()]
    return tuple(line for line in lines if line)[-CONSOLE_LINES:]


def find_init(machine: Machine) -> Process | None:
    """The machine's init now, below keeper and nspawn: after a reboot it is another than it was booted with."""
    if machine.keeper and machine.keeper.alive:
        for nspawn in children(machine.keeper):
            for init in children(nspawn):
                return init
        return None
    return machine.init if machine.init and machine.init.alive else None


def _sshd_answers(address: str) -> bool:
    try:
        with socket.create_connection((address, SSH_PORT), timeout=1.0) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _logins_are_refused(init: Process) -> bool:
    """pam_nologin turns users other than root away until systemd-user-sessions has run."""
    return Path(f"/proc/{init.pid}/root/run/nologin").exists()


def power_off(lab: Lab, machine: Machine) -> Machine:
    """Stops a machine as its power button would, and unmounts its disk.

    Raises:
        OpsctlError: it did not stop; its console's last lines.
    """
    init = find_init(machine)
    if init:
        send(init, POWER_OFF)
        if machine.keeper and not wait_gone(machine.keeper, STOP_DEADLINE_S):
            raise OpsctlError("lab.stop_stuck", f"the machine {machine.name} did not stop in {STOP_DEADLINE_S:.0f} s.",
                              hint=f"opsctl lab power-cut {machine.name} --name {lab.name}",
                              log_tail=console_tail(lab.place(machine)))
    return kill(lab, machine)


def cut_power(lab: Lab, machine: Machine) -> Machine:
    """What a pulled plug does: no farewell on the network, nothing more on the disk, no process left."""
    network.unplug(network.link_of(lab.number, machine.name))
    layers.lose_power(lab.place(machine))
    return kill(lab, machine)


def kill(lab: Lab, machine: Machine) -> Machine:
    """Ends whatever is left of a machine, and unmounts its disk."""
    ended = end(lab, machine)
    layers.unmount(lab.place(machine))
    return ended


def end(lab: Lab, machine: Machine) -> Machine:
    """Ends all processes of a machine and removes its cable; the disk stays mounted.

    Finds processes by what they are too, not only by what was recorded: a command may have died before it could.
    """
    place = lab.place(machine)
    init = find_init(machine)
    if init:
        send(init, signal.SIGKILL)
        wait_gone(init, END_DEADLINE_S)
    if machine.keeper:
        wait_gone(machine.keeper, END_DEADLINE_S)
    for process in strays(place):
        send(process, signal.SIGKILL)
        wait_gone(process, END_DEADLINE_S)
    network.remove(network.link_of(lab.number, machine.name))
    _forget_nspawn(network.machine_name(lab.number, machine.name))
    return replace(machine, keeper=None, init=None)


def strays(place: Path) -> tuple[Process, ...]:
    """Processes that live on a machine's disk, its init first (the others go with it); then those that watch it."""
    root, layer = layers.root(place), layers.layer(place)
    inside, watching = [], []
    for process in all_processes():
        if process.pid == os.getpid():
            continue
        if f"--directory={root}" in arguments(process):
            watching.append(process)
        elif any(mount.point == Path("/") and f"upperdir={layer}/upper" in mount.options.split(",")
                 for mount in mounts(process.pid)):
            inside.append(process)
    return (*sorted(inside, key=_age), *sorted(watching, key=_age))


def _age(process: Process) -> tuple[int, int]:
    return process.started, process.pid


def _forget_nspawn(name: str) -> None:
    """Removes the folder that a killed nspawn leaves; an empty mount point on a tmpfs."""
    directory = NSPAWN_STATE / "propagate" / name
    if directory.is_dir():
        shutil.rmtree(directory)
