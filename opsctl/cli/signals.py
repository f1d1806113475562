"""Ctrl-C, SIGTERM and SIGHUP: the first one is answered at once and puts things in order, the second one leaves.

Putting in order is bounded: an engine that does not stop, or a host that does not answer, keeps nobody waiting. Whoever
is left behind then, children of ours, dies with this process (``PR_SET_PDEATHSIG``); what runs on hosts ends there by
itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from opsctl.errors import ExitCode

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLEANUP_S = 15.0
WORDS = f"interrupted: putting things in order, at most {CLEANUP_S:.0f} s; again to leave at once\n"


class Interrupts:
    """Takes the signals from ``begin`` to ``end``. ``last_words`` are said when things could not be put in order.

    Who is ``careful`` changes hosts and has something to put in order; others just end.
    """

    def __init__(self, last_words: Callable[[], str]) -> None:
        self.careful = False
        self._last_words = last_words
        self._came = False
        self._before: dict[signal.Signals, Any] = {}

    def begin(self) -> None:
        """One that whoever started us wanted ignored (``nohup``, a shell's ``&``) stays ignored."""
        for number in NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._hear)

    def end(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        if self._came:
            os._exit(ExitCode.INTERRUPTED)
        self._came = True
        if self.careful:
            timer = threading.Timer(CLEANUP_S, self._leave)
            timer.daemon = True  # goes on to the last moment: what is left of threads may hang too
            timer.start()
            _say("\n" + WORDS)
        raise KeyboardInterrupt

    def _leave(self) -> None:
        try:
            _say("not all could be put in order in time\n" + self._last_words())
        finally:
            os._exit(ExitCode.INTERRUPTED)


def _say(text: str) -> None:
    """Past all buffers and locks: a handler may have interrupted whoever holds them. Nobody has to be listening."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
