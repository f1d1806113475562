"""The silicon: one process outside the machines of a lab that is all of its GPUs.

    python -m opsctl.lab.gpu.silicon /var/lib/opsctl-lab/LAB/

Ten times a second it reads what the machines' instances compute, steps each GPU (``board.py``), writes what NVML then
says into the machines' shared state, and holds the instances to their GPUs' clocks (``throttle.py``). It sees a machine
boot, binds the trees into it (``trees.py``) and loads its driver when nvidia-modprobe asks. It ends with its lab.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from opsctl.errors import OpsctlError
from opsctl.lab import machines
from opsctl.lab import state as labs
from opsctl.lab.commands import CommandError
from opsctl.lab.gpu import faults, trees, units
from opsctl.lab.gpu.board import Board
from opsctl.lab.gpu.faults import Faults, kernel_line
from opsctl.lab.gpu.profiles import named
from opsctl.lab.gpu.state_file import BUSES, FABRIC_COMPLETED, FABRIC_NOT_STARTED, StateFile, gpu_uuids
from opsctl.lab.gpu.throttle import Throttle
from opsctl.lab.processes import PROC, Process, all_processes, arguments, send, wait_gone
from opsctl.lab.state import Lab, Machine

MODULE = "opsctl.lab.gpu.silicon"
TICK_S = 0.1
LOOK_S = 0.3  # for a machine's boot, for requests of its driver
SCAN_S = 1.0  # for units and their processes
END_S = 5.0
JOURNAL = "run/systemd/journal/socket"


class Host:
    """One machine with GPUs."""

    def __init__(self, lab: Lab, machine: Machine) -> None:
        assert machine.gpus is not None  # noqa: S101 - only machines with GPUs come here
        self.lab_name, self.machine = lab.name, machine
        self.place = lab.place(machine)
        self.profile = named(machine.gpus.model)
        self.uuids = gpu_uuids(lab.name, machine.name, machine.gpus)
        self.broken, self._faults_changed = _faults(self.place)
        self.board = Board(self.profile, StateFile(trees.state_path(self.place)), self.broken)
        self.init: Process | None = None
        self._throttles: dict[str, Throttle] = {}
        self._logged = ""

    def look(self) -> None:
        """Notices a boot, a request of the driver, other faults."""
        init = machines.find_init(self.machine)
        if init is None or init != self.init:
            self.init = None
            if init and _has_begun(init):
                self._meet(init)
        machine = self.board.state.machine
        if machine.request != machine.answered:
            self._load_module()
        self._read_faults()

    def _meet(self, init: Process) -> None:
        """A machine that has booted, or that ran already when this silicon began."""
        if not trees.bound(init):
            trees.hide_module(self.place)
            self.board.boot()
            try:
                trees.bind(init)
            except CommandError as error:  # it ends just now; if not, the next look tries again
                self._log(error.message)
                return
            self._log(f"booted, pid {init.pid}")
        self.init = init

    def _load_module(self) -> None:
        machine = self.board.state.machine
        version, _, flavour = machine.requested_version.decode().partition(" ")
        usual = "proprietary" if self.profile.architecture == "volta" else "open"
        if version:
            trees.show_module(self.place, version, flavour or usual, self.profile, self.uuids)
        else:
            trees.hide_module(self.place)
        machine.module_version = version.encode()
        machine.answered = machine.request

    def _read_faults(self) -> None:
        before = self._faults_changed
        self.broken, self._faults_changed = _faults(self.place, self.broken, before)
        if before != self._faults_changed and self.broken == faults.clear(self.broken):
            self.board.mend()

    def scan(self) -> None:
        """Looks for instances and the fabric manager."""
        tree = units.machine_cgroup(self.init) if self.init else None
        self.board.found(units.instances(tree, self.uuids) if tree else ())
        running = tree is not None and units.has_fabric_manager(tree)
        self.board.state.machine.fabric_state = FABRIC_COMPLETED if running else FABRIC_NOT_STARTED

    def tick(self, seconds: float) -> None:
        for gpu, xid in self.board.tick(self.broken, seconds):
            self._write_to_kernel_log(kernel_line(BUSES[gpu], xid))
        for instance in self.board.instances:
            limit = self.board.limits.get(instance.name)
            if instance.name in self._throttles or limit is not None:
                throttle = self._throttles.setdefault(
                    instance.name, Throttle(self.lab_name, self.machine.name, instance.name, instance.cgroup))
                try:
                    throttle.hold((worker.pid for worker in instance.workers), limit)
                except OSError as error:
                    self._log(f"{instance.name} cannot be held back: {error}")

    def _log(self, line: str) -> None:
        """Into silicon.log, once as long as it is the same."""
        if line != self._logged:
            self._logged = line
            print(f"{self.machine.name}: {line}", flush=True)  # noqa: T201 - the log

    def _write_to_kernel_log(self, line: str) -> None:
        """A machine has no kernel log of its own (nspawn gives none): its journal gets the line as the kernel's."""
        self._log(line)
        if self.init is None:
            return
        entry = f"MESSAGE={line}\nPRIORITY=3\nSYSLOG_FACILITY=0\nSYSLOG_IDENTIFIER=kernel\n"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            try:
                journal.sendto(entry.encode(), str(PROC / str(self.init.pid) / "root" / JOURNAL))
            except OSError:
                return  # the machine is just booting or ending

    def release(self) -> None:
        """Lets every instance run freely."""
        for name, throttle in self._throttles.items():
            throttle.hold((worker.pid for instance in self.board.instances if instance.name == name
                           for worker in instance.workers), None)


def _faults(place: Path, known: Faults | None = None, changed: int = -1) -> tuple[Faults, int]:
    """The machine's faults and when they were written; what is known while the file is as old."""
    try:
        now = trees.faults_path(place).stat().st_mtime_ns
    except FileNotFoundError:
        now = 0
    if known is not None and now == changed:
        return known, now
    return faults.load(trees.faults_path(place)), now


def _has_begun(init: Process) -> bool:
    """Whether it is systemd already, and no longer nspawn on the way there: then /proc and /sys are mounted."""
    try:
        return (PROC / str(init.pid) / "comm").read_text().strip() == "systemd"
    except OSError:
        return False


def run(directory: Path) -> None:
    """Is the GPUs of a lab until the lab is gone, or a signal says so."""
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))
    hosts: dict[str, Host] = {}
    known = looked = scanned = 0.0
    last = time.monotonic()
    while not stopped:
        now = time.monotonic()
        if now - looked >= LOOK_S:
            looked = now
            try:
                changed = (directory / "state.json").stat().st_mtime
            except FileNotFoundError:
                break
            if changed != known:
                known = changed
                _learn(directory.name, hosts)
            for host in hosts.values():
                host.look()
        if now - scanned >= SCAN_S:
            scanned = now
            for host in hosts.values():
                host.scan()
        for host in hosts.values():
            host.tick(now - last)
        last = now
        time.sleep(max(0.0, TICK_S - (time.monotonic() - now)))
    for host in hosts.values():
        host.release()


def _learn(name: str, hosts: dict[str, Host]) -> None:
    """Takes over what the lab's state says of its machines: their keepers change at each boot."""
    lab = labs.load(name)
    for machine in lab.machines if lab else ():
        if machine.name in hosts:
            hosts[machine.name].machine = machine
        elif lab and machine.gpus and trees.state_path(lab.place(machine)).exists():
            hosts[machine.name] = Host(lab, machine)


def start(lab: Lab) -> None:
    """Starts the lab's silicon if it has GPUs and none runs. Its log is ``silicon.log`` beside the lab's state."""
    if not any(machine.gpus for machine in lab.machines) or find(lab):
        return
    with (lab.directory / "silicon.log").open("ab") as log:  # the slash: no other lab's name begins like this
        subprocess.Popen([sys.executable, "-m", MODULE, f"{lab.directory}/"], stdin=subprocess.DEVNULL, stdout=log,
                         stderr=subprocess.STDOUT, start_new_session=True, cwd="/",
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})


def find(lab: Lab) -> tuple[Process, ...]:
    """The silicon processes of a lab: one, or none."""
    return tuple(process for process in all_processes()
                 if MODULE in (words := arguments(process)) and words[-1].rstrip("/") == str(lab.directory))


def stop(lab: Lab) -> None:
    """Ends the lab's silicon.

    Raises:
        OpsctlError: it does not end.
    """
    for process in find(lab):
        send(process, signal.SIGTERM)
        if not wait_gone(process, END_S):
            send(process, signal.SIGKILL)
            if not wait_gone(process, END_S):
                raise OpsctlError("lab.silicon_stuck", f"the silicon of the lab {lab.name}, pid {process.pid}, "
                                                       "does not end.")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
