"""Sends a signed release to the gateway: resumable, only what it lacks, checked there before it gets its name."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from opsctl.agent import manifest as manifests
from opsctl.engines.events import Emit, Progress
from opsctl.releases.remote import Channel, ask, send
from opsctl.releases.store import Stored

CHUNK = 1 << 20
SLOWEST_HASHING = 50_000_000  # bytes per second that a gateway surely hashes


def publish(channel: Channel, stored: Stored, emit: Emit, *, host: str) -> bool:
    """Brings a release of the bundle to the gateway; True when it was not there.

    Raises:
        OpsctlError: what the gateway said, or the connection broke. The same again goes on where this stopped.
    """
    manifest = (stored.directory / manifests.MANIFEST).read_bytes()
    signature = (stored.directory / manifests.SIGNATURE).read_bytes()
    body = {"manifest": base64.b64encode(manifest).decode(), "signature": base64.b64encode(signature).decode()}
    begun = ask(channel, ["release-begin"], host=host, stdin=json.dumps(body).encode(),
                timeout_s=_patience(stored.release.size))
    if begun["accepted"]:
        return False
    where = ["--service", begun["service"], "--release", begun["release"]]
    needed = begun["needed"]
    total = sum(file["size"] for file in needed)
    tell = _teller(emit, f"sending {begun['service']} {begun['release']}", host, total)
    tell(sum(file["have"] for file in needed))
    for file in needed:
        path = stored.directory / manifests.FILES / file["path"]
        verb = ["receive", *where, "--path", file["path"], "--offset", str(file["have"])]
        send(channel, verb, _chunks(path, file["have"], tell), host=host, timeout_s=_patience(file["size"]))
    ask(channel, ["release-accept", *where], host=host, timeout_s=_patience(stored.release.size))
    return True


def _chunks(path: Path, offset: int, tell: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while chunk := file.read(CHUNK):
            yield chunk
            tell(len(chunk))


def _teller(emit: Emit, subject: str, host: str, total: int) -> Callable[[int], None]:
    started, shown, done = time.monotonic(), 0.0, 0

    def tell(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown >= 0.5 or done >= total:
            shown = now
            emit(Progress(subject, done, total, per_second=done / max(now - started, 0.001), host=host))

    return tell


def _patience(size: int) -> float:
    """Seconds that the gateway may be silent: it hashes what it got."""
    return 60.0 + size / SLOWEST_HASHING
