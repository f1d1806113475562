"""Starts the process that asks NVML, hears it, and replaces it when it is really gone. ``next_step`` decides; pure.

It gets SIGTERM and never SIGKILL: killing a process inside the driver may freeze the GPU. One that hangs there for good
is left to a person, and is told as long as it hangs.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opsctl.agent.drains import boot_clock
from opsctl.agent.gpu.child import EXIT_LOCKED
from opsctl.agent.gpu.sample import parts_of

STALE_S = 15.0  # a sample that is older counts no more
TICK_S = 1.0
RETRY_S = 10.0  # after NVML could not be asked: no driver, another version
PAUSE_S = 1.0  # before it is started again; doubles with each failure up to the next
LONGEST_PAUSE_S = 60.0
LOOK_AGAIN_S = 300.0  # a GPU that is lost or missing may be back, and only a new process finds it
THERMAL = ("temperature_c", "memory_temperature_c", "margin_c", "margin_source", "reasons")  # what goes by quick lines
STAYS = ("index", "power_limits_w", "thresholds_c", "clock_sm_max_mhz")  # besides IDENTITY, of a GPU that is lost
IDENTITY = ("uuid", "name", "pci", "minor", "serial", "vbios")  # what stays as it is when a GPU is lost
LINE_LIMIT = 16 << 20  # bytes without a newline: that is none of ours

Step = Literal["start", "stop", "replace", "wait"]


@dataclass
class View:
    """What is known of the reader. Times are the boot clock's, in seconds; None: never."""

    wanted_since: float | None = None
    began: float | None = None  # the process that runs
    ended: float | None = None  # the one before
    told_to_end: float | None = None
    heard: float | None = None
    good: float | None = None  # the last sample, or thermal line, in which NVML answered
    sample: dict[str, Any] | None = None  # the last, good or not
    thermal: dict[int, dict[str, Any]] = field(default_factory=dict)  # by index: what is younger than the sample
    gpus: dict[str, dict[str, Any]] = field(default_factory=dict)  # by PCI address: the last known of each GPU
    call: dict[str, Any] | None = None  # that has not returned: name, gpu, since
    pid: int = 0
    samples: int = 0
    restarts: int = 0
    failed: bool = False  # the process before this one, or this one so far
    failures: int = 0  # in a row
    exit_status: int | None = None

    def hear(self, line: dict[str, Any], now: float) -> None:
        """Takes in one line of the reader's."""
        self.heard = now
        if line["kind"] == "waiting":
            self.call = {"name": line["call"], "gpu": line["gpu"], "since": line["since"]}
        elif line["kind"] == "thermal":
            self.call = None
            self.good = line["at"]
            self.thermal = {gpu["index"]: gpu for gpu in line["gpus"]}
        elif line["kind"] == "sample":
            self.call, self.thermal = None, {}
            self.sample = line
            if line["state"] == "ok":
                self.good = line["at"]
                self.samples += 1
                self.failures = 0
                self.sample = {**line, "gpus": named(line["gpus"], self.gpus.values())}
                self.gpus.update({gpu["pci"]: gpu for gpu in self.sample["gpus"] if "pci" in gpu})

    def gpus_now(self) -> list[dict[str, Any]]:
        """Those of the last sample with the temperatures, margins and states that came since."""
        gpus = self.sample["gpus"] if self.sample is not None else []
        return [overlaid(gpu, self.thermal.get(gpu["index"])) for gpu in gpus]

    def age(self, now: float) -> float:
        """Of the last good sample, in seconds; without one, since it was wanted."""
        since = self.good if self.good is not None else self.wanted_since
        return 0.0 if since is None else max(0.0, now - since)

    def call_age(self, now: float) -> float:
        return 0.0 if self.call is None else max(0.0, now - float(self.call["since"]))

    def fresh(self, now: float) -> bool:
        """Whether the last sample is a good one and young enough to count."""
        return (self.good is not None and self.sample is not None and self.sample["state"] == "ok"
                and now - self.good <= STALE_S)


def overlaid(gpu: dict[str, Any], younger: dict[str, Any] | None) -> dict[str, Any]:
    """A sample with what a thermal line says of the same GPU; of one that is gone no old values stay. Pure.

    Its parts (MIG) stay, as who they are: an instance on one is no more lost than the GPU.
    """
    if younger is None:
        return gpu
    if younger["state"] == "ok":
        return {**{key: value for key, value in gpu.items() if key not in THERMAL}, **younger}
    parts = parts_of(gpu)
    return {**{key: gpu[key] for key in gpu if key in STAYS + IDENTITY}, **({"mig": parts} if parts else {}), **younger}


def named(gpus: Sequence[dict[str, Any]], known: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """``gpus`` with the names of those that NVML gives none for: a GPU that was lost before this reader began. Pure.

    By its old index, and only where those without a name are in the places of just those that are not there: else
    they may have been counted anew, and a wrong name is worse than none.
    """
    nameless = sorted(gpu["index"] for gpu in gpus if not gpu.get("uuid"))
    there = {gpu.get("uuid") for gpu in gpus}
    gone = {one["index"]: one for one in known if one.get("uuid") and one["uuid"] not in there}
    if nameless != sorted(gone):
        return list(gpus)
    of_old = {index: {key: one[key] for key in IDENTITY if key in one} for index, one in gone.items()}
    return [gpu if gpu.get("uuid") else {**of_old[gpu["index"]], **gpu} for gpu in gpus]


def next_step(view: View, now: float, wanted: bool, incomplete: bool) -> Step:
    """What to do with the reader. ``incomplete``: a GPU that was expected is lost or not there."""
    if view.began is None:
        if not wanted:
            return "wait"
        return "start" if view.ended is None or now - view.ended >= pause(view) else "wait"
    if view.told_to_end is not None:
        return "wait"
    last = max(view.began, view.heard if view.heard is not None else 0.0)
    silent = now - last > STALE_S or view.call_age(now) > STALE_S
    again = incomplete and now - view.began > LOOK_AGAIN_S
    if silent:
        return "replace"
    return "stop" if again or not wanted else "wait"


def pause(view: View) -> float:
    """Seconds to leave between the end of one reader and the start of the next."""
    if view.exit_status == EXIT_LOCKED or (view.exit_status == 0 and view.sample and view.sample["state"] != "ok"):
        return RETRY_S
    return float(min(LONGEST_PAUSE_S, PAUSE_S * 2 ** min(view.failures, 10)))


class Reader:
    """One process at most. ``lock`` is a file that it holds while it lives; ``on_xid`` hears PCI address, XID, time.

    ``on_sample`` is called in the loop when the view took in a good sample or a thermal line.
    """

    def __init__(self, lock: Path, say: Callable[[str], None], on_xid: Callable[[str, int, float], None],
                 command: Sequence[str] = (sys.executable, "-I", "-m", "opsctl.agent.gpu.child"),
                 clock: Callable[[], float] = boot_clock, on_sample: Callable[[], None] = lambda: None) -> None:
        self.view = View()
        self._on_sample = on_sample
        self._complained = ""
        self._command = (*command, str(lock))
        self._say = say
        self._on_xid = on_xid
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def tick(self, wanted: bool, incomplete: bool) -> None:
        """Looks after the process: call it about once a second, in the loop."""
        now = self._clock()
        self.view.wanted_since = (self.view.wanted_since or now) if wanted else None
        self._reap(now)
        step = next_step(self.view, now, wanted, incomplete)
        if step == "start":
            self._start(now)
        elif step in ("stop", "replace"):
            self.view.failed = step == "replace"
            if self.view.failed:
                self._say(f"the GPU reader (process {self.view.pid}) is silent, or a call hangs: it shall end after it")
            self.stop()

    def stop(self) -> None:
        """Asks it to end after the call in flight."""
        if self._process is not None and self.view.told_to_end is None:
            self.view.told_to_end = self._clock()
            self._process.terminate()

    def _start(self, now: float) -> None:
        view = self.view
        view.restarts, view.failed = view.restarts + view.failed, False
        try:
            # subprocess itself, not asyncio's: that one kills what still runs when the loop ends
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        except OSError as error:
            view.ended, view.exit_status, view.failures = now, -1, view.failures + 1
            self._say(f"the GPU reader cannot be started: {error}")
            return
        view.pid, view.began, view.told_to_end, view.heard, view.call = self._process.pid, now, None, None, None
        self._rest = b""
        descriptor = self._output()
        os.set_blocking(descriptor, False)
        asyncio.get_running_loop().add_reader(descriptor, self._readable)

    def _output(self) -> int:
        assert self._process is not None  # noqa: S101 - whoever calls has just started it
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        return self._process.stdout.fileno()

    def _readable(self) -> None:
        with suppress(BlockingIOError):
            if not self._take():
                asyncio.get_running_loop().remove_reader(self._output())

    def _take(self) -> bool:
        """Hears what came; False at the end of it. Raises BlockingIOError when nothing came."""
        data = os.read(self._output(), 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest if len(self._rest) <= LINE_LIMIT else b""
        for line in lines:
            self._hear(line)
        return bool(data)

    def _hear(self, line: bytes) -> None:
        try:
            document = json.loads(line)
            if document["kind"] == "xid":
                self._on_xid(document["pci"], document["xid"], document["at"])
            self.view.hear(document, self._clock())
        except (ValueError, KeyError, TypeError) as error:
            self._say(f"the GPU reader wrote what nobody understands ({error}): {line[:200]!r}")
            return
        if document["kind"] == "thermal" or (document["kind"] == "sample" and document["state"] == "ok"):
            self._tell_listener()

    def _tell_listener(self) -> None:
        """What breaks there is said, and the reader is heard all the same."""
        try:
            self._on_sample()
        except Exception as error:  # noqa: BLE001 - whatever it is, the next line must be heard
            words = f"what listens to the GPU reader: unexpected {type(error).__name__}: {error}"
            if words != self._complained:
                self._say(words)
            self._complained = words

    def _reap(self, now: float) -> None:
        if self._process is None or self._process.poll() is None:
            return
        with suppress(BlockingIOError):  # what it left; a child of its own may still hold the pipe, so no end may come
            while self._take():
                pass
        asyncio.get_running_loop().remove_reader(self._output())
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        self._process.stdout.close()
        view, status = self.view, self._process.returncode
        view.failed = view.failed or status not in (0, EXIT_LOCKED)
        if view.failed:
            view.failures += 1
            how = f"by signal {-status}" if status < 0 else f"with exit code {status}"
            self._say(f"the GPU reader (process {view.pid}) ended {how}; another one takes its place")
        view.began, view.ended, view.exit_status, view.told_to_end, view.call = None, now, status, None, None
        self._process = None
