"""What each verb of the lab does, in order.

Every step looks at what is there first: any of them may be repeated after a crash, and ``down`` takes away a lab in
whatever state it is.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsctl.engines.events import Emit, Note, PhaseStarted, Progress, TaskResult
from opsctl.errors import RefusedError, UsageError
from opsctl.lab import cgroups, fleet_files, layers, machines, network, state
from opsctl.lab.base import DEFAULT_SUITE, SUITES, ensure_base
from opsctl.lab.commands import run
from opsctl.lab.gpu import faults, silicon, trees
from opsctl.lab.gpu.faults import Faults
from opsctl.lab.gpu.profiles import Gpus, parse_gpus
from opsctl.lab.mounts import unmount_below
from opsctl.lab.requirements import require
from opsctl.lab.state import Lab, Machine
from opsctl.lab.subnets import choose_subnet
from opsctl.lab.vendor.repository import ensure_repository

BOOT_DEADLINE_S = 120.0  # four take 3 s on two idle cores; a busy computer may take thirty times as long
FIRST_ADDRESS = 10  # ops-1 is .10, gpu-N is .10+N; this computer is .1
GPU_HOSTS = 3
# systemd and udev watch files: about five inotify instances a machine, of 128 for all of root's processes (measured:
# the 26th machine did not boot).
INOTIFY_LIMIT = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_PER_MACHINE = 8
INOTIFY_RESERVE = 64


@dataclass(frozen=True)
class Brought:
    """What ``up`` found or made."""

    lab: Lab
    booted: tuple[str, ...]


def up(name: str, gpu_hosts: int | None, fleet: Path | None, suite: str | None, emit: Emit,
       gpus: str | None = None) -> Brought:
    """Brings a lab up: makes it, continues a half-made one, boots what is off; one that runs stays as it is.

    Args:
        gpu_hosts: how many; None: as many as it has, 3 in a new lab.
        fleet: where its fleet directory is to be; None: where it is, ``./NAME`` in a new lab.
        suite: Debian of its machines; None: what it has, bookworm in a new lab.
        gpus: simulated GPUs, ``8xH200`` or ``gpu-1=8xH200,gpu-2=4xL40S``; None: what it has, none in a new lab.

    Raises:
        RefusedError: ``lab.missing`` and others, before anything was changed.
        OpsctlError: a machine did not boot.
    """
    require()
    state.check_name(name)
    if suite is not None and suite not in SUITES:
        raise UsageError("lab.no_such_suite", f"the lab cannot boot {suite}.", hint=f"suites: {', '.join(SUITES)}")
    with state.locked(state.STATE_ROOT / name, _waiting(name, emit)):
        lab = state.load(name)
        if lab is None:
            directory = (fleet or Path(name)).absolute()
            lab = _allocate(name, gpu_hosts or GPU_HOSTS, directory, suite or DEFAULT_SUITE, emit, gpus)
        else:
            _check_same(lab, gpu_hosts, fleet, suite, gpus)
        lab = _with_base(lab, emit)
        lab = _prepare(lab, emit)
        wanted = tuple(machine.name for machine in lab.machines if machine.condition != "running")
        lab = _boot(lab, wanted, emit)
        if wanted and network.bridged_traffic_is_filtered() and not _machines_reach_each_other(lab):
            emit(Note("this computer's firewall (Docker's, most likely) keeps the machines from each other; mend it: "
                      f"iptables -I FORWARD -i {lab.bridge} -o {lab.bridge} -j ACCEPT", "warning"))
        return Brought(lab, wanted)


def _with_base(lab: Lab, emit: Emit) -> Lab:
    """The lab with its base root there.

    Raises:
        RefusedError: the base that its disks lie above was removed, and another one would not fit below them.
    """
    if lab.base is not None and lab.base.is_dir():
        return lab
    base = ensure_base(lab.suite, emit)
    if lab.base not in (None, base) and any(machine.prepared for machine in lab.machines):
        raise RefusedError("lab.base_gone", f"the base root of the lab {lab.name}, {lab.base}, is gone.",
                           hint=f"opsctl lab down --name {lab.name}, then up makes it anew")
    return state.save(dataclasses.replace(lab, base=base))


def _check_same(lab: Lab, gpu_hosts: int | None, fleet: Path | None, suite: str | None, gpus: str | None) -> None:
    """A lab is not changed by ``up``: the answer to other wishes is another lab.

    Raises:
        RefusedError: the wishes differ from what the lab is.
    """
    has = len(lab.machines) - 1
    for what, is_now, wanted in (("GPU hosts", has, gpu_hosts), ("suite", lab.suite, suite),
                                 ("fleet directory", lab.fleet, fleet.absolute() if fleet else None)):
        if wanted not in (None, is_now):
            raise RefusedError("lab.differs", f"the lab {lab.name} is there with {what} {is_now}, not {wanted}.",
                               hint=f"opsctl lab down --name {lab.name} first, or another --name")
    hosts = [machine.name for machine in lab.machines[1:]]
    if gpus is not None and _gpus_of(lab) != parse_gpus(gpus, hosts):
        raise RefusedError("lab.differs", f"the lab {lab.name} is there with GPUs {_gpu_words(lab)}, not {gpus}.",
                           hint=f"opsctl lab down --name {lab.name} first, or another --name")


def _gpus_of(lab: Lab) -> dict[str, Gpus]:
    return {machine.name: machine.gpus for machine in lab.machines if machine.gpus}


def _gpu_words(lab: Lab) -> str:
    return ",".join(f"{host}={gpus.count}x{gpus.model}" for host, gpus in _gpus_of(lab).items()) or "none"


def _allocate(name: str, gpu_hosts: int, fleet: Path, suite: str, emit: Emit, gpus: str | None) -> Lab:
    """Takes a number and a subnet that no other lab has, and writes both down before anyone else may look."""
    names = [f"gpu-{index}" for index in range(1, gpu_hosts + 1)]
    has = parse_gpus(gpus, names) if gpus is not None else {}
    with state.locked(state.STATE_ROOT, lambda: emit(Note("another lab is just choosing its subnet; waiting"))):
        others = tuple(lab for lab in state.load_all() if lab.name != name)
        fleet_files.check_free(fleet, name, others)
        subnet = choose_subnet([*network.used_networks(), *(lab.subnet for lab in others)])
        taken = {lab.number for lab in others}
        number = next(candidate for candidate in range(1, len(taken) + 1000)
                      if candidate not in taken and not network.exists(f"opslab{candidate}"))
        ops = Machine("ops-1", str(subnet[FIRST_ADDRESS]), ("lb", "gateway", "monitor"))
        serving = tuple(
            Machine(host, str(subnet[FIRST_ADDRESS + index]), ("gpu",), user=fleet_files.login_name(index),
                    proxy_jump=fleet_files.jump_of(index), gpus=has.get(host))
            for index, host in enumerate(names, 1))
        return state.save(Lab(name=name, number=number, suite=suite, subnet=subnet, fleet=fleet,
                              fleet_is_ours=not fleet.exists(), machines=(ops, *serving)))


def _prepare(lab: Lab, emit: Emit) -> Lab:
    """Writes the fleet directory, and the disks of machines that have none yet."""
    if all(machine.prepared for machine in lab.machines):
        return lab
    emit(PhaseStarted(f"Lab {lab.name}: {SUITES[lab.suite]}, {lab.subnet}, fleet directory {lab.fleet}",
                      tuple(machine.name for machine in lab.machines)))
    vendor = ensure_repository(emit) if any(machine.gpus for machine in lab.machines) else None
    login_key = fleet_files.write_fleet(lab, vendor)
    layers.share(lab.places)
    keys = {machine.name: _host_key(lab, machine) for machine in lab.machines}
    # before a machine counts as prepared: whoever continues a lab of prepared machines does not come here
    fleet_files.pin_host_keys(lab, [(machine, _public(keys[machine.name]).read_text()) for machine in lab.machines])
    for machine in lab.machines:
        if not machine.prepared:
            made = machines.prepare(lab, machine, host_key=keys[machine.name], login_key=login_key)
            lab = state.save(lab.with_machine(made))
    return lab


def _host_key(lab: Lab, machine: Machine) -> Path:
    """The machine's host key, made once: it is pinned before the machine first boots."""
    key = lab.place(machine) / "ssh_host_ed25519_key"
    key.parent.mkdir(parents=True, exist_ok=True)
    if not _public(key).exists():
        key.unlink(missing_ok=True)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"root@{machine.name}", "-f", key])
    return key


def _public(key: Path) -> Path:
    return key.with_name(key.name + ".pub")


def _boot(lab: Lab, names: Iterable[str], emit: Emit) -> Lab:
    """Boots machines at once and waits for all of them."""
    names = tuple(names)
    if not names:
        silicon.start(lab)
        return lab
    _make_room_for_watches(emit)
    layers.share(lab.places)
    network.create_bridge(lab.bridge, lab.host_address, lab.subnet.prefixlen)
    started = time.monotonic()
    for name in names:
        machines.insert_gpus(lab, lab.machine(name))
    silicon.start(lab)
    for name in names:
        lab = state.save(lab.with_machine(machines.boot(lab, lab.machine(name))))
    for done, name in enumerate(names, 1):
        lab = state.save(lab.with_machine(machines.wait_until_up(lab, lab.machine(name), started + BOOT_DEADLINE_S)))
        emit(TaskResult(name, "boot", "changed", f"answers SSH after {time.monotonic() - started:.1f} s"))
        emit(Progress("Machines up", done, len(names), "items"))
    return lab


def _machines_reach_each_other(lab: Lab) -> bool:
    """Whether the first machine's ping comes back from the second."""
    first, second = lab.machines[:2]
    init = machines.find_init(first)
    return init is not None and network.pings(init.pid, second.address)


def _make_room_for_watches(emit: Emit) -> None:
    """Raises the kernel's limit when the machines of all labs would not boot under it; says so."""
    count = sum(len(lab.machines) for lab in state.load_all())
    needed = INOTIFY_RESERVE + INOTIFY_PER_MACHINE * count
    limit = int(INOTIFY_LIMIT.read_text())
    if limit < needed:
        INOTIFY_LIMIT.write_text(f"{needed}\n")
        emit(Note(f"raised fs.inotify.max_user_instances from {limit} to {needed}, until the next boot: "
                  f"{count} machines need it", "warning"))


def down(name: str, *, keep_fleet: bool, emit: Emit) -> tuple[str, ...]:
    """Removes a lab, finished or not; returns files of its fleet directory that stay, for a person made them.

    Raises:
        OpsctlError: ``lab.busy``: something on this computer holds one of its mounts. The same command again goes on.
    """
    state.check_name(name)
    if not (state.STATE_ROOT / name).is_dir():
        return ()
    require_root()
    with state.locked(state.STATE_ROOT / name, _waiting(name, emit)):
        kept: tuple[str, ...] = ()
        lab = state.load(name)
        if lab is not None:
            silicon.stop(lab)
            for machine in lab.machines:
                lab = state.save(lab.with_machine(machines.end(lab, machine)))
            unmount_below(lab.directory)  # now that no machine is left that could hold another's disk
            for machine in lab.machines:
                layers.unmount(lab.place(machine))
            network.remove(lab.bridge)
            cgroups.remove(lab.name)
            if not keep_fleet:
                kept = fleet_files.remove_fleet(lab)
        shutil.rmtree(state.STATE_ROOT / name)
    with state.locked(state.STATE_ROOT, lambda: None):
        pass  # the last lab's end takes the folder of all labs with it
    return kept


def power_cut(name: str | None, hosts: Iterable[str], emit: Emit) -> Lab:
    """Pulls the plug of running machines; one that is off stays off."""
    def cut(lab: Lab) -> Lab:
        for machine in [lab.machine(host) for host in hosts]:
            if machine.condition == "running":
                lab = state.save(lab.with_machine(machines.cut_power(lab, machine)))
                emit(TaskResult(machine.name, "power cut", "changed"))
            else:
                emit(Note("is off already", host=machine.name))
        return lab
    return _with_lab(name, cut, emit)


def power_on(name: str | None, hosts: Iterable[str], emit: Emit) -> Lab:
    """Boots machines that are off, and waits until they answer; one that runs stays as it is."""
    def turn_on(lab: Lab) -> Lab:
        wanted = [machine.name for machine in [lab.machine(host) for host in hosts] if machine.condition != "running"]
        return _boot(lab, wanted, emit)
    return _with_lab(name, turn_on, emit)


def fault(name: str | None, host: str, gpu: int | None, act: Callable[[Faults, tuple[int, ...]], Faults]) -> Lab:
    """Breaks or mends the GPUs of a machine; it may be off.

    Args:
        gpu: which one; None: all.
        act: the change, of the faults there are and the GPUs meant.

    Raises:
        UsageError: no such machine, or it has no such GPU.
    """
    def change(lab: Lab) -> Lab:
        machine = lab.machine(host)
        meant = faults.chosen(gpu, machine.gpus.count if machine.gpus else 0, host)
        path = trees.faults_path(lab.place(machine))
        faults.save(path, act(faults.load(path), meant))
        silicon.start(lab)
        return lab
    return _with_lab(name, change, lambda _: None)


def snapshot(name: str | None, label: str, emit: Emit) -> Lab:
    """Keeps the disks of all machines and which of them ran; stops and boots them for it. Replaces one of that name."""
    state.check_name(label)

    def take(lab: Lab) -> Lab:
        running = tuple(machine.name for machine in lab.machines if machine.condition == "running")
        for machine in lab.machines:
            lab = state.save(lab.with_machine(machines.power_off(lab, machine)))
        kept = lab.directory / "snapshots" / label
        kept.mkdir(parents=True, exist_ok=True)
        kept.parent.chmod(0o700)
        if label in lab.snapshots:  # half a snapshot is none
            lab = state.save(dataclasses.replace(lab, snapshots={
                known: ran for known, ran in lab.snapshots.items() if known != label}))
        for done, machine in enumerate(lab.machines, 1):
            layers.copy_image(layers.image(lab.place(machine)), kept / f"{machine.name}.img")
            emit(Progress(f"Snapshot {label}", done, len(lab.machines), "items"))
        lab = state.save(dataclasses.replace(lab, snapshots={**lab.snapshots, label: running}))
        return _boot(lab, running, emit)
    return _with_lab(name, take, emit)


def restore(name: str | None, label: str, emit: Emit) -> Lab:
    """Puts the disks back as a snapshot has them, and boots the machines that ran then. What was written since is lost.

    Raises:
        UsageError: there is no such snapshot.
    """
    def put_back(lab: Lab) -> Lab:
        if label not in lab.snapshots:
            raise UsageError("lab.no_such_snapshot", f"the lab {lab.name} has no snapshot {label}.",
                             hint=f"snapshots: {', '.join(lab.snapshots) or 'none'}; opsctl lab snapshot takes one")
        kept = lab.directory / "snapshots" / label
        for done, machine in enumerate(lab.machines, 1):
            lab = state.save(lab.with_machine(machines.kill(lab, machine)))
            layers.copy_image(kept / f"{machine.name}.img", layers.image(lab.place(machine)))
            emit(Progress(f"Restore {label}", done, len(lab.machines), "items"))
        return _boot(lab, lab.snapshots[label], emit)
    return _with_lab(name, put_back, emit)


def inbox_of(name: str | None) -> tuple[Machine, Path]:
    """The machine that has a lab's inbox, and its file system.

    Raises:
        RefusedError: ``lab.no_inbox``, ``lab.off``: nothing can arrive.
    """
    lab = state.find(name)
    require_root()
    found = [machine for machine in lab.machines if machines.has_inbox(lab, machine)]
    if not found:
        raise RefusedError("lab.no_inbox", f"the lab {lab.name} has no inbox: that comes with GPUs and a monitor.",
                           hint="opsctl lab up --gpus 8xH200 --name ANOTHER makes a lab that has one")
    if found[0].condition != "running":
        raise RefusedError("lab.off", f"{found[0].name}, which has the inbox of the lab {lab.name}, is off.",
                           hint=f"opsctl lab power-on {found[0].name} --name {lab.name}")
    return found[0], layers.root(lab.place(found[0]))


def describe(lab: Lab) -> dict[str, Any]:
    """The lab as ``status`` shows it; ``disk_bytes`` is what a machine's disk takes on this computer."""
    return {
        "name": lab.name, "suite": lab.suite, "subnet": str(lab.subnet), "bridge": lab.bridge, "fleet": str(lab.fleet),
        "snapshots": sorted(lab.snapshots),
        "machines": [{
            "name": machine.name, "groups": list(machine.groups), "address": machine.address, "user": machine.user,
            "proxy_jump": machine.proxy_jump, "state": machine.condition,
            "pid": init.pid if (init := machines.find_init(machine)) else None,
            "disk_bytes": _disk_bytes(layers.image(lab.place(machine))),
            "console": str(machines.console_log(lab.place(machine))),
            "gpus": dataclasses.asdict(machine.gpus) if machine.gpus else None,
            "faults": _fault_words(lab, machine),
        } for machine in lab.machines],
    }


def _fault_words(lab: Lab, machine: Machine) -> list[str]:
    """What is broken on a machine's GPUs; the machines' folder is root's to see."""
    if machine.gpus is None:
        return []
    try:
        return list(faults.words(faults.load(trees.faults_path(lab.place(machine))), faults.monotonic_ns()))
    except PermissionError:
        return []


def _disk_bytes(image: Path) -> int | None:
    """None: there is none yet, or it is root's to see."""
    try:
        return image.stat().st_blocks * 512
    except (FileNotFoundError, PermissionError):
        return None


def require_root() -> None:
    """Raises:
        RefusedError: not root.
    """
    if os.geteuid() != 0:
        raise RefusedError("lab.missing", "a lab needs what is missing here: root.", hint="the same command with sudo")


def _with_lab(name: str | None, act: Callable[[Lab], Lab], emit: Emit) -> Lab:
    """Does something to an existing lab, alone."""
    lab = state.find(name)
    require_root()
    with state.locked(lab.directory, _waiting(lab.name, emit)):
        return act(state.find(lab.name))


def _waiting(name: str, emit: Emit) -> Callable[[], None]:
    return lambda: emit(Note(f"another opsctl lab command works on {name}; waiting for it"))
