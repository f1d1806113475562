"""Single keys of a terminal while something is drawn on it."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def reading() -> Iterator[bool]:
    """Inside, keys come one by one and unseen; Ctrl-C goes on being a signal. Yields False: stdin is no terminal."""
    if not sys.stdin.isatty():
        yield False
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield True
    finally:
        with suppress(termios.error):  # it may be gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def wait(seconds: float, *, heard: bool) -> str:
    """The key that is pressed within ``seconds``; empty when none is, ``q`` when the terminal is gone.

    ``heard``: what ``reading`` yielded.
    """
    if not heard:
        time.sleep(seconds)
        return ""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    if not ready:
        return ""
    try:
        return os.read(sys.stdin.fileno(), 1).decode("ascii", "replace") or "q"
    except OSError:  # EIO: whoever had the terminal hung up
        return "q"
