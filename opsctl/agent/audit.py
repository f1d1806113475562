"""Every act of an operator is one JSON line in the system journal: ``journalctl -t opsctl-audit``."""

from __future__ import annotations

import json
import os
import pwd
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

JOURNAL = Path("/run/systemd/journal/socket")
IDENTIFIER = "opsctl-audit"


def operator(environment: Mapping[str, str]) -> str:
    """Who acts: the user behind sudo, or the user of this process."""
    behind = environment.get("SUDO_USER")
    if behind:
        return behind
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def message(user: str, verb: str, what: Mapping[str, object]) -> str:
    return json.dumps({"user": user, "verb": verb, **what}, sort_keys=True, default=str)


def record(verb: str, what: Mapping[str, object], journal: Path = JOURNAL) -> None:
    """Writes the line by the journal's own protocol. Never waits and never raises: without a journal, or with one that
    hears nothing now, there is nowhere to write, and the act comes first."""
    text = message(operator(os.environ), verb, what)
    fields = f"MESSAGE={text}\nSYSLOG_IDENTIFIER={IDENTIFIER}\nPRIORITY=5\n"
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
        channel.sendto(fields.encode(), str(journal))
