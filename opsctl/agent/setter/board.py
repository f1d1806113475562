"""The acts on one GPU, by NVML: written down first, then set, and undone as far as they are still ours.

Clocks that somebody else locked cannot be read back, so a release gives the clocks to the driver. A power limit can:
one that is no longer what we set is somebody's, and is left alone.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from opsctl.agent.gpu.nvml import (
    DRIVER_NOT_LOADED,
    FUNCTION_NOT_FOUND,
    GPU_IS_LOST,
    MISMATCH,
    RESET_REQUIRED,
    UNINITIALIZED,
    code_of,
)
from opsctl.agent.setter.book import Book, Entry
from opsctl.agent.setter.protocol import Answer, RefusedRequest

INVALID_ARGUMENT = 2
CODES = {INVALID_ARGUMENT: "invalid", 3: "not_supported", 4: "no_permission", 6: "unknown_gpu",
         FUNCTION_NOT_FOUND: "not_supported", GPU_IS_LOST: "lost", RESET_REQUIRED: "lost"}
BEGIN_AGAIN = frozenset({UNINITIALIZED, DRIVER_NOT_LOADED, GPU_IS_LOST, RESET_REQUIRED, MISMATCH})
LEAST_MHZ = 210  # where a GPU does not list its clocks; the driver takes the nearest that it has
SAME_MW = 1000  # drivers round to watts


class Board:
    """Sets, and restores, what ``book`` says."""

    def __init__(self, book: Book, library: Callable[[], Any] = lambda: importlib.import_module("pynvml")) -> None:
        self._book = book
        self._library = library
        self._lock = threading.Lock()
        self._anchored = False  # NVML is kept open while something is set: clocks may be lost with the last who has it
        self._ended = False

    def end(self) -> None:
        """What is set from now on, by a call that came back from the driver late, is undone at once."""
        self._ended = True
        self._book.close()

    def clocks(self, gpu: str, max_mhz: int) -> Answer:
        """Holds the SM clock at ``max_mhz`` or below; nearest that the GPU has."""
        with self._gpu(gpu) as (nvml, handle):
            least, most = _clock_range(nvml, handle)
            wanted = max(least, min(max_mhz, most))
            before = self._note(gpu, replace(self._book.of(gpu), max_mhz=wanted))
            try:
                _lock_clocks(nvml, handle, least, wanted)
            except nvml.NVMLError:
                self._note(gpu, before)
                raise
            if self._ended:
                self._undo_clocks(nvml, handle, gpu)
            return {"max_mhz": wanted}

    def power(self, gpu: str, watts: int) -> Answer:
        """Sets the power limit, as near as the GPU allows, and never above the one that was in force before ours."""
        with self._gpu(gpu) as (nvml, handle):
            least, most = nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)
            now = nvml.nvmlDeviceGetPowerManagementLimit(handle)
            old = self._book.of(gpu)
            ours = old.limit_mw is not None and abs(now - old.limit_mw) <= SAME_MW
            before_mw = old.before_mw if ours and old.before_mw is not None else now
            wanted = max(least, min(watts * 1000, most, before_mw))
            before = self._note(gpu, replace(old, limit_mw=wanted, before_mw=before_mw))
            try:
                # not _v2: nvidia-ml-py drops its error code
                nvml.nvmlDeviceSetPowerManagementLimit(handle, wanted)
            except nvml.NVMLError:
                self._note(gpu, before)
                raise
            self._note_what_it_took(nvml, handle, gpu)
            if self._ended:
                self._undo_power(nvml, handle, gpu)
            return {"watts": round(nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000)}

    def _note_what_it_took(self, nvml: Any, handle: Any, gpu: str) -> None:
        """A driver may round: what it says now is ours, and only another value is somebody else's."""
        with suppress(nvml.NVMLError, RefusedRequest):  # then what was asked counts
            taken = nvml.nvmlDeviceGetPowerManagementLimit(handle)
            self._note(gpu, replace(self._book.of(gpu), limit_mw=taken))

    def release(self, gpu: str) -> Answer:
        """Restores what was set on a GPU; ``words`` say what was left as it is."""
        entry = self._book.of(gpu)
        if entry == Entry():
            return {}
        with self._gpu(gpu) as (nvml, handle):
            if entry.max_mhz is not None:
                self._undo_clocks(nvml, handle, gpu)
            return {"words": words} if entry.limit_mw is not None and (
                words := self._undo_power(nvml, handle, gpu)) else {}

    def back_to(self, gpu: str, entry: Entry) -> None:
        """Sets a GPU to what it was at some time before."""
        now = self._book.of(gpu)
        if now.max_mhz != entry.max_mhz and entry.max_mhz is not None:
            self.clocks(gpu, entry.max_mhz)
        if now.limit_mw != entry.limit_mw and entry.limit_mw is not None:
            self.power(gpu, entry.limit_mw // 1000)
        with self._gpu(gpu) as (nvml, handle):
            if now.max_mhz is not None and entry.max_mhz is None:
                self._undo_clocks(nvml, handle, gpu)
            if now.limit_mw is not None and entry.limit_mw is None:
                self._undo_power(nvml, handle, gpu)

    def _undo_clocks(self, nvml: Any, handle: Any, gpu: str) -> None:
        nvml.nvmlDeviceResetGpuLockedClocks(handle)
        self._note(gpu, replace(self._book.of(gpu), max_mhz=None))

    def _undo_power(self, nvml: Any, handle: Any, gpu: str) -> str:
        entry = self._book.of(gpu)
        now = nvml.nvmlDeviceGetPowerManagementLimit(handle)
        words = ""
        if entry.limit_mw is not None and abs(now - entry.limit_mw) > SAME_MW:
            words = (f"{gpu}: somebody set its power limit to {now / 1000:.0f} W after the setter's "
                     f"{entry.limit_mw / 1000:.0f} W; left as it is")
        elif entry.before_mw is not None:
            nvml.nvmlDeviceSetPowerManagementLimit(handle, entry.before_mw)
        self._note(gpu, replace(entry, limit_mw=None, before_mw=None))
        return words

    def _note(self, gpu: str, entry: Entry) -> Entry:
        """Writes an entry down and gives the one before."""
        before = self._book.of(gpu)
        try:
            self._book.put(gpu, entry)
        except OSError as error:
            raise RefusedRequest("failed", f"what is to be set cannot be written down: {error}") from None
        return before

    @contextmanager
    def _gpu(self, uuid: str) -> Iterator[tuple[Any, Any]]:
        """NVML and the GPU's handle. Raises RefusedRequest for whatever NVML does not do."""
        try:
            nvml = self._library()
        except ImportError as error:
            raise RefusedRequest("failed", f"nvidia-ml-py cannot be loaded: {error}") from None
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise RefusedRequest("failed", f"NVML does not answer: {error}") from None
        try:
            yield nvml, _handle(nvml, uuid)
        except nvml.NVMLError as error:
            if code_of(error) in BEGIN_AGAIN:
                self._anchor(nvml, False)
            raise RefusedRequest(CODES.get(code_of(error), "failed"), f"{uuid}: {error}") from None
        else:
            self._anchor(nvml, bool(self._book.entries()))
        finally:
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    def _anchor(self, nvml: Any, wanted: bool) -> None:
        """Keeps NVML open, or gives it back: a driver can be changed while nothing is set. NVML counts its users."""
        with self._lock:
            change, self._anchored = self._anchored != wanted, wanted
        if change:
            with suppress(nvml.NVMLError):
                nvml.nvmlInit() if wanted else nvml.nvmlShutdown()


def _handle(nvml: Any, uuid: str) -> Any:
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError as error:
        if code_of(error) == INVALID_ARGUMENT:  # what some drivers say of a UUID that they do not know
            raise RefusedRequest("unknown_gpu", f"there is no {uuid} here") from None
        raise


def _clock_range(nvml: Any, handle: Any) -> tuple[int, int]:
    """Lowest and highest SM clock in MHz that may be asked for."""
    most = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
    try:
        memory = max(nvml.nvmlDeviceGetSupportedMemoryClocks(handle))
        least = min(nvml.nvmlDeviceGetSupportedGraphicsClocks(handle, memory))
    except (nvml.NVMLError, ValueError):
        least = LEAST_MHZ
    return min(least, most), most


def _lock_clocks(nvml: Any, handle: Any, least_mhz: int, most_mhz: int) -> None:
    try:
        nvml.nvmlDeviceSetGpuLockedClocks(handle, least_mhz, most_mhz)
    except nvml.NVMLError as error:
        if code_of(error) != INVALID_ARGUMENT:
            raise
        nvml.nvmlDeviceSetGpuLockedClocks(handle, most_mhz, most_mhz)  # its lowest clock is not the one supposed
