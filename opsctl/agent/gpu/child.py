"""The process that talks to NVML: ``python -m opsctl.agent.gpu.child LOCK``. Writes one JSON object a line.

``sample``: everything, each second. ``thermal``: what the guard needs, four times a second while a GPU is near its
limit. ``waiting``: a call that has not returned for a second, told by a thread that does not wait for it. ``xid``: an
event. It never writes to a GPU. A signal ends it after the call in flight, never within: whoever kills a process inside
the driver may freeze the GPU.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsctl.agent.drains import boot_clock
from opsctl.agent.gpu import sample as samples
from opsctl.agent.gpu.nvml import GPU_IS_LOST, TIMEOUT, GoneError, LostError, Nvml, code_of
from opsctl.agent.guard.model import Policy

EVERY_S = 1.0
QUICK_S = 0.25  # between two looks at temperatures while a GPU is near its limit
NEAR_C = 15  # what "near" means: degrees of margin
SLOW_S = 1.0  # a call that takes longer is told
EVENT_WAIT_MS = 1000
XID_EVENT = 8  # nvmlEventTypeXidCriticalError
EXIT_LOCKED = 75  # another reader, of an agent before this one, has not ended yet
OOM_SCORE = 500  # when memory is short this process goes, and the load balancer's voice stays


class Teller:
    """Writes lines to the agent; ends the process when nobody reads any more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def tell(self, kind: str, **what: Any) -> None:
        line = json.dumps({"kind": kind, "at": boot_clock(), **what}, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._descriptor, line):]
            except BrokenPipeError:
                os._exit(0)


class Stop:
    """Set by a signal's handler, waited for by all threads.

    No ``threading.Event``: a handler that sets one deadlocks when it interrupts that thread's own wait, which holds the
    event's lock.
    """

    def __init__(self) -> None:
        self._came = False
        self._waiting, self._telling = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def set(self, *_: object) -> None:
        """Also as a handler."""
        if not self._came:
            self._came = True
            os.write(self._telling, b"\n")  # never read: it wakes everybody

    def is_set(self) -> bool:
        return self._came

    def wait(self, seconds: float) -> None:
        select.select([self._waiting], [], [], max(0.0, seconds))


def read_for_ever(nvml: Nvml, teller: Teller, stop: Stop) -> None:
    """Samples each second until ``stop``. Raises GoneError."""
    nvml.start()
    facts = samples.host_facts(nvml)
    gpus = samples.open_gpus(nvml)
    threading.Thread(target=wait_for_xids, args=(nvml, gpus, teller, stop), daemon=True).start()
    due = boot_clock()
    while not stop.is_set():
        began = boot_clock()
        found = [samples.sample(nvml, gpu) for gpu in gpus if not stop.is_set()]
        if stop.is_set():
            return
        teller.tell("sample", state="ok", words="", wall=time.time(), took_s=boot_clock() - began, **facts, gpus=found)
        due = max(due + EVERY_S, boot_clock())
        if hurry(found):
            look_quickly(nvml, gpus, teller, stop, due)
        stop.wait(due - boot_clock())


def hurry(gpus: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a GPU, or its memory, is so near its limit that a second is a long time. Pure.

    One that tells no margin is taken for one with the guard's own fallback of a limit.
    """
    for gpu in gpus:
        core, memory = gpu.get("temperature_c"), gpu.get("memory_temperature_c")
        highest = gpu.get("thresholds_c", {}).get("memory_max")
        margins = [gpu["margin_c"]] if "margin_c" in gpu else []
        if not margins and core is not None:
            margins.append(Policy.fallback_max_operating_c - core)
        if memory is not None and highest is not None:
            margins.append(highest - memory)
        if gpu["state"] == "ok" and any(margin <= NEAR_C for margin in margins):
            return True
    return False


def look_quickly(nvml: Nvml, gpus: list[samples.Gpu], teller: Teller, stop: Stop, due: float) -> None:
    """Temperatures and reasons of all GPUs, until the next sample is ``due``. Raises GoneError."""
    mark = boot_clock() + QUICK_S
    while mark < due - QUICK_S / 2:
        stop.wait(mark - boot_clock())
        found = [samples.thermal(nvml, gpu) for gpu in gpus if not stop.is_set()]
        if stop.is_set():
            return
        teller.tell("thermal", gpus=found)
        mark = max(mark, boot_clock()) + QUICK_S


def wait_for_xids(nvml: Nvml, gpus: list[samples.Gpu], teller: Teller, stop: Stop) -> None:
    """Tells every critical error that the driver reports; the kernel's log has some more."""
    library = nvml.library
    events = Nvml(library)  # waiting is no call that hangs
    try:
        waiting = events.ask(-1, ("nvmlEventSetCreate",))
        if waiting is None:
            return
        for gpu in gpus:
            if gpu.handle is not None:
                events.ask(gpu.index, ("nvmlDeviceRegisterEvents", gpu.handle, XID_EVENT, waiting))
        by_address = {address(gpu.handle): gpu for gpu in gpus if gpu.handle is not None}
        while not stop.is_set():
            try:
                event = library.nvmlEventSetWait_v2(waiting, EVENT_WAIT_MS)
            except library.NVMLError as error:
                if code_of(error) == TIMEOUT:
                    continue
                if code_of(error) != GPU_IS_LOST:
                    return
                stop.wait(EVERY_S)
                continue
            gpu_of_it = by_address.get(address(event.device))
            if event.eventType == XID_EVENT and gpu_of_it is not None:
                teller.tell("xid", xid=int(event.eventData), pci=gpu_of_it.identity.get("pci", ""))
    except (GoneError, LostError):
        return  # the samples say so


def address(handle: Any) -> int:
    """What tells one device handle of NVML's from another."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def tell_of_waiting(nvml: Nvml, teller: Teller) -> None:
    """A call that hangs is named while it hangs, also when this process was told to end meanwhile."""
    while True:
        time.sleep(EVERY_S)
        call = nvml.call
        if call is not None and boot_clock() - call.since > SLOW_S:
            teller.tell("waiting", call=call.name, gpu=call.gpu, since=call.since)


def take_lock(path: Path) -> int | None:
    """One reader at a time on a host, also when an agent before this one left one that hangs. None: it is taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def main(argv: list[str] | None = None) -> int:
    """Ends with 0 when told to, or when NVML cannot be asked; the last sample says why."""
    (lock,) = sys.argv[1:] if argv is None else argv
    teller = Teller(sys.stdout.fileno())
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGABRT):  # the second is systemd's when the agent's watchdog was not heard
        signal.signal(number, stop.set)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE), encoding="ascii")
    held = take_lock(Path(lock))
    if held is None:
        return EXIT_LOCKED
    try:
        library = importlib.import_module("pynvml")
    except ImportError as error:
        teller.tell("sample", state="no_library", words=f"nvidia-ml-py cannot be loaded: {error}", gpus=[])
        return 0
    nvml = Nvml(library)
    threading.Thread(target=tell_of_waiting, args=(nvml, teller), daemon=True).start()
    try:
        read_for_ever(nvml, teller, stop)
    except GoneError as error:
        teller.tell("sample", state=error.state, words=str(error), gpus=[])
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a thread may still wait inside NVML
