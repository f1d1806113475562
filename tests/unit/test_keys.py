"""Keys of a terminal, and a terminal that is gone: nothing may be drawn for ever on one."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from opsctl.cli import keys
with keys.reading() as heard:
    print(heard, flush=True)
    for _ in range(200):
        key = keys.wait(0.1, heard=heard)
        if key == "q":
            sys.exit(7)
sys.exit(8)
"""


@pytest.mark.parametrize("how", ["key", "hang-up", "end"])
def test_a_key_or_the_end_of_the_terminal(how: str) -> None:
    terminal, theirs = pty.openpty()
    # in a session of its own, so that no SIGHUP comes: only the terminal itself says that it is gone
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=theirs, stdout=subprocess.PIPE,
                               start_new_session=True)
    os.close(theirs)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 20)[0]
        assert process.stdout.readline() == b"True\n"
        if how == "key":
            os.write(terminal, b"q")
        elif how == "end":
            os.write(terminal, b"\x04")
            os.close(terminal)
        else:
            os.close(terminal)
        assert process.wait(20) == 7
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
