"""The lock of a host that has no agent yet: a folder that comes to be with its owner in it, in one rename.

``/var/lib/opsctl-provision.lock/owner`` holds the holder and its heartbeat by the host's ``/proc/uptime``. Coreutils
are all that is needed. Who takes over from somebody makes a folder named after him inside: only one can.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from opsctl.errors import OpsctlError
from opsctl.releases.remote import Channel
from opsctl.runs.identity import Holder

PLACE = "/var/lib/opsctl-provision.lock"
OWNER = f"{PLACE}/owner"
TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Owner:
    """What lies there; ``beat_s``: seconds since the last heartbeat."""

    holder: dict[str, Any]
    beat_s: float


def owner(channel: Channel) -> Owner | None:
    """Who has it; None when nobody has."""
    found = channel.run(["cat", OWNER, "/proc/uptime"], timeout_s=TIMEOUT_S)
    lines = found.stdout.splitlines()
    if found.returncode or len(lines) < 2:
        return None
    uptime = float(lines[-1].split()[0])
    try:
        document = json.loads(lines[0])
        beat = float(document["beat"])
        holder = dict(document["holder"])
    except (ValueError, KeyError, TypeError):
        return None
    return Owner(holder, uptime - beat if beat <= uptime else uptime)  # a beat of an earlier boot


def take(channel: Channel, holder: Holder, over: Owner | None = None) -> bool:
    """Takes it when nobody has it, or from ``over``; False when somebody was faster."""
    if over is not None:
        if channel.run(["mkdir", f"{PLACE}/over.{over.holder.get('token', '')}"], timeout_s=TIMEOUT_S).returncode:
            return False
        _write(channel, PLACE, holder)
        return True
    mine = f"{PLACE}.{holder.token}"
    _must(channel, ["mkdir", "-p", mine])
    _write(channel, mine, holder)
    # rename(2) takes no folder's place that has something in it
    if channel.run(["mv", "-T", mine, PLACE], timeout_s=TIMEOUT_S).returncode:
        _must(channel, ["rm", "-rf", mine])
        return False
    return True


def renew(channel: Channel, holder: Holder) -> Owner | None:
    """A heartbeat; gives who has it."""
    found = owner(channel)
    if found is not None and found.holder.get("token") == holder.token:
        _write(channel, PLACE, holder)
    return found


def drop(channel: Channel, token: str) -> bool:
    """Gives it back; False when it was not ``token``'s."""
    found = owner(channel)
    if found is None or found.holder.get("token") != token:
        return False
    _must(channel, ["rm", "-rf", PLACE])
    return True


def _write(channel: Channel, folder: str, holder: Holder) -> None:
    """Replaces the owner in one step."""
    uptime = channel.run(["cat", "/proc/uptime"], timeout_s=TIMEOUT_S).stdout.split()
    text = json.dumps({"holder": holder.as_document(), "beat": float(uptime[0]) if uptime else 0.0}) + "\n"
    new = f"{folder}/owner.{holder.token}"
    _must(channel, ["tee", new], text.encode())
    _must(channel, ["mv", "-T", new, f"{folder}/owner"])


def _must(channel: Channel, argv: list[str], stdin: bytes = b"") -> None:
    done = channel.run(argv, timeout_s=TIMEOUT_S, stdin=stdin)
    if done.returncode:
        raise OpsctlError("lock.bare", f"{argv[0]} of the lock in /var/lib failed: {done.stderr.strip()}.",
                          hint="/var/lib there must be writable for root")
