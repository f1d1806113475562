"""The lock of a host that has no agent yet: a folder that comes to be with its owner in it, in one rename.

``/var/lib/opsctl-provision.lock/owner`` holds the holder and its heartbeat by the host's ``/proc/uptime``. Coreutils
are all that is needed. Who takes over from somebody makes a folder named after him inside: only one can. An owner that
a power cut left empty, and a takeover that was cut off, go stale by the age of their folders.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from opsctl.errors import OpsctlError
from opsctl.releases.remote import Channel
from opsctl.runs.identity import Holder
from opsctl.runs.judge import STALE_S

PLACE = "/var/lib/opsctl-provision.lock"
OWNER = f"{PLACE}/owner"
TIMEOUT_S = 15.0
ATTEMPTS = 100


@dataclass(frozen=True)
class Owner:
    """What lies there; ``beat_s``: seconds since the last heartbeat. Without a token when it cannot be read."""

    holder: dict[str, Any]
    beat_s: float

    @property
    def token(self) -> str:
        return str(self.holder.get("token") or "")


def owner(channel: Channel) -> Owner | None:
    """Who has it; None when nobody has."""
    found = channel.run(["cat", OWNER, "/proc/uptime"], timeout_s=TIMEOUT_S)
    lines = found.stdout.splitlines()
    try:
        if found.returncode:
            return _nameless(channel)
        uptime = float(lines[-1].split()[0])
        document = json.loads(lines[0])
        beat = float(document["beat"])
        holder = dict(document["holder"])
    except (ValueError, KeyError, TypeError):
        return _nameless(channel)
    return Owner(holder, uptime - beat if beat <= uptime else uptime)  # a beat of an earlier boot


def take(channel: Channel, holder: Holder, over: Owner | None = None) -> bool:
    """Takes it when nobody has it, or from ``over``; False when somebody was faster."""
    if over is not None:
        if not _over(channel, over.token):
            return False
        _write(channel, PLACE, holder)
        return True
    mine = f"{PLACE}.{holder.token}"
    _must(channel, ["mkdir", "-p", mine])
    _write(channel, mine, holder)
    _must(channel, ["sync", mine])
    # rename(2) takes no folder's place that has something in it
    if channel.run(["mv", "-T", mine, PLACE], timeout_s=TIMEOUT_S).returncode:
        _must(channel, ["rm", "-rf", mine])
        return False
    return True


def renew(channel: Channel, holder: Holder) -> Owner | None:
    """A heartbeat; gives who has it."""
    found = owner(channel)
    if found is not None and found.token == holder.token:
        _write(channel, PLACE, holder)
    return found


def drop(channel: Channel, token: str) -> bool:
    """Gives it back; False when it was not ``token``'s."""
    found = owner(channel)
    if found is None or found.token != token:
        return False
    _must(channel, ["rm", "-rf", PLACE])
    return True


def _nameless(channel: Channel) -> Owner | None:
    """The owner of a folder that does not say whose it is: somebody, last heard of when the folder changed."""
    age_s = _age_s(channel, PLACE)
    return None if age_s is None else Owner({"verb": "provision", "user": "somebody"}, age_s)


def _over(channel: Channel, token: str) -> bool:
    """The right to take over from ``token``: one alone gets it, and another one when that one was cut off."""
    for attempt in range(ATTEMPTS):
        folder = f"{PLACE}/over.{token}{f'.{attempt}' if attempt else ''}"
        if not channel.run(["mkdir", folder], timeout_s=TIMEOUT_S).returncode:
            now = owner(channel)  # one that was cut off long ago may be one that ended well long ago
            return now is not None and now.token == token
        if (_age_s(channel, folder) or 0.0) <= STALE_S:
            return False
    return False


def _age_s(channel: Channel, path: str) -> float | None:
    """Seconds since something changed in a folder, by the host's calendar; None: there is none."""
    changed = channel.run(["stat", "-c", "%Y", path], timeout_s=TIMEOUT_S)
    now = channel.run(["date", "+%s"], timeout_s=TIMEOUT_S)
    return max(0.0, float(now.stdout) - float(changed.stdout)) if not changed.returncode else None


def _write(channel: Channel, folder: str, holder: Holder) -> None:
    """Replaces the owner in one step."""
    uptime = channel.run(["cat", "/proc/uptime"], timeout_s=TIMEOUT_S).stdout.split()
    text = json.dumps({"holder": holder.as_document(), "beat": float(uptime[0]) if uptime else 0.0}) + "\n"
    new = f"{folder}/owner.{holder.token}"
    _must(channel, ["tee", new], text.encode())
    _must(channel, ["sync", new])
    _must(channel, ["mv", "-T", new, f"{folder}/owner"])


def _must(channel: Channel, argv: list[str], stdin: bytes = b"") -> None:
    done = channel.run(argv, timeout_s=TIMEOUT_S, stdin=stdin)
    if done.returncode:
        raise OpsctlError("lock.bare", f"{argv[0]} of the lock in /var/lib failed: {done.stderr.strip()}.",
                          hint="/var/lib there must be writable for root")
