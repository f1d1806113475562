"""Sends a signed release to the gateway: resumable, only what it lacks, checked there before it gets its name.

``Published`` is what an import asks: which release the gateway has under a name, and may it have one more whose files
are there already.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opsctl.agent import manifest as manifests
from opsctl.agent.trust import Signed, verify
from opsctl.engines.events import Emit, Note, Progress
from opsctl.engines.session import Session
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.model import Fleet
from opsctl.fleet.placements import gateway as gateway_of
from opsctl.releases.remote import Channel, ask, has_agent, send
from opsctl.releases.store import Stored

CHUNK = 1 << 20
OUT_OF_REACH = ("host.unreachable", "host.connection_lost", "host.timed_out", "host.not_trusted")
SLOWEST_HASHING = 50_000_000  # bytes per second that a gateway surely hashes


class Published:
    """The gateway's releases. What it gives was signed by somebody whom ``allowed_signers`` trusts."""

    def __init__(self, channel: Channel, host: str, allowed_signers: Path) -> None:
        self._channel = channel
        self._host = host
        self._allowed_signers = allowed_signers

    def find(self, service: str, version: str) -> Signed | None:
        """The release of a version; None when there is none.

        Raises:
            RefusedError: its signature is wrong.
        """
        listed = ask(self._channel, ["releases", "--service", service], host=self._host)["releases"]
        for release in listed:
            if release["version"] != version:
                continue
            folder = manifests.directory_name(version, release["digest"])
            given = ask(self._channel, ["release-manifest", "--service", service, "--release", folder], host=self._host)
            manifest, signature = (base64.b64decode(given[key]) for key in ("manifest", "signature"))
            return verify(manifest, signature, self._allowed_signers, f"release {folder} on {self._host}")
        return None

    def take(self, signed: Signed) -> None:
        """Gives it a release by its manifest alone: all files are those of releases that it has.

        Raises:
            RefusedError: ``gateway.lacks_files``: they are not, or are not whole any more.
        """
        begun = _begin(self._channel, signed.manifest, signed.signature, signed.release.size, self._host)
        if begun["needed"]:
            raise RefusedError("gateway.lacks_files", f"{self._host} has no whole copy of {begun['needed'][0]['path']} "
                               f"any more, which {signed.release.version} would share.",
                               hint="import the model from its files, then the same again")
        if not begun["accepted"]:
            _accept(self._channel, begun, signed.release.size, self._host)


@contextmanager
def published_releases(fleet: Fleet, emit: Emit) -> Iterator[Published | None]:
    """The gateway's releases; None, and a note that says why, when it does not answer or is bare."""
    gateway = gateway_of(fleet)
    with Session(fleet, gateway) as session:
        try:
            known = has_agent(session)
        except OpsctlError as error:
            if error.code not in OUT_OF_REACH:
                raise
            emit(Note(f"only the bundle was asked which version names are taken: {error.message}", "warning"))
            known = False
        yield Published(session, gateway.name, fleet.directory / "trust" / "allowed_signers") if known else None


def publish(channel: Channel, stored: Stored, emit: Emit, *, host: str) -> bool:
    """Brings a release of the bundle to the gateway; True when it was not there.

    Raises:
        OpsctlError: what the gateway said, or the connection broke. The same again goes on where this stopped.
    """
    manifest = (stored.directory / manifests.MANIFEST).read_bytes()
    signature = (stored.directory / manifests.SIGNATURE).read_bytes()
    begun = _begin(channel, manifest, signature, stored.release.size, host)
    if begun["accepted"]:
        return False
    needed = begun["needed"]
    total = sum(file["size"] for file in needed)
    tell = _teller(emit, f"sending {begun['service']} {begun['release']}", host, total)
    tell(sum(file["have"] for file in needed))
    for file in needed:
        path = stored.directory / manifests.FILES / file["path"]
        verb = ["receive", *_where(begun), "--path", file["path"], "--offset", str(file["have"])]
        send(channel, verb, _chunks(path, file["have"], tell), host=host, timeout_s=_patience(file["size"]))
    _accept(channel, begun, stored.release.size, host)
    return True


def _begin(channel: Channel, manifest: bytes, signature: bytes, size: int, host: str) -> dict[str, Any]:
    """What the gateway says to a manifest: whether it has the release, and which files to send."""
    body = {"manifest": base64.b64encode(manifest).decode(), "signature": base64.b64encode(signature).decode()}
    return ask(channel, ["release-begin"], host=host, stdin=json.dumps(body).encode(), timeout_s=_patience(size))


def _accept(channel: Channel, begun: dict[str, Any], size: int, host: str) -> None:
    ask(channel, ["release-accept", *_where(begun)], host=host, timeout_s=_patience(size))


def _where(begun: dict[str, Any]) -> list[str]:
    return ["--service", begun["service"], "--release", begun["release"]]


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
