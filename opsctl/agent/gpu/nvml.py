"""How NVML is asked: by the newest name first, by the older one where the library lacks it, and never with a zero for
what a GPU does not have. Only ever reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opsctl.agent.drains import boot_clock

# Return codes of nvml.h
UNINITIALIZED = 1
DRIVER_NOT_LOADED = 9
TIMEOUT = 10
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
RESET_REQUIRED = 16
MISMATCH = 18
ARGUMENT_VERSION_MISMATCH = 25
ASK_OLDER = frozenset({FUNCTION_NOT_FOUND, ARGUMENT_VERSION_MISMATCH})
ABSENT = frozenset({2, 3, 4, 6, 21})  # invalid argument, not supported, no permission, not found, no data
LOST = {GPU_IS_LOST: "fell off the bus", RESET_REQUIRED: "needs a reset"}
STATES = {DRIVER_NOT_LOADED: "no_driver", LIBRARY_NOT_FOUND: "no_library", MISMATCH: "mismatch",
          UNINITIALIZED: "no_driver"}

Attempt = tuple[Any, ...]  # the function's name, then its arguments


class LostError(Exception):
    """This GPU answers no more."""


class GoneError(Exception):
    """NVML answers nothing at all; ``state`` is a word of ``STATES`` or ``failed``."""

    def __init__(self, state: str, words: str) -> None:
        super().__init__(words)
        self.state = state


@dataclass(frozen=True)
class Call:
    """A call that has not returned. ``since`` is the boot clock's, in seconds; ``gpu`` an index, -1 for none."""

    name: str
    gpu: int
    since: float


class Nvml:
    """The library, and which call of ours it is busy with."""

    def __init__(self, library: Any, clock: Callable[[], float] = boot_clock) -> None:
        self.library = library
        self.call: Call | None = None  # another thread looks at it
        self.troubles: list[str] = []  # since somebody cleared it: answers that are neither a value nor "not supported"
        self._clock = clock

    def start(self) -> None:
        """Raises GoneError when there is nothing to ask."""
        try:
            self._do(-1, "nvmlInit", self.library.nvmlInit, ())
        except self.library.NVMLError as error:
            raise GoneError(STATES.get(code_of(error), "failed"), str(error)) from None

    def ask(self, gpu: int, *attempts: Attempt) -> Any:
        """The first answer of several names for one question; None: this GPU or library does not have it.

        Raises:
            LostError: the GPU answers no more.
            GoneError: NVML answers no more.
        """
        for name, *arguments in attempts:
            function = getattr(self.library, name, None)
            if function is None:  # an older or newer nvidia-ml-py
                continue
            try:
                return self._do(gpu, name, function, arguments)
            except self.library.NVMLError as error:
                code = code_of(error)
                if code in LOST:
                    raise LostError(f"{LOST[code]} ({name})") from None
                if code in STATES and code != LIBRARY_NOT_FOUND:
                    raise GoneError(STATES[code], f"{name}: {error}") from None
                if code in ABSENT:
                    return None
                if code not in ASK_OLDER:
                    self.troubles.append(f"{name}: {error}")
                    return None
        return None

    def _do(self, gpu: int, name: str, function: Callable[..., Any], arguments: Any) -> Any:
        self.call = Call(name, gpu, self._clock())
        try:
            return function(*arguments)
        finally:
            self.call = None


def code_of(error: Any) -> int:
    """NVML's return code of an NVMLError."""
    return int(getattr(error, "value", 0))
