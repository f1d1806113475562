"""The gateway's side: takes releases in, checks them, and keeps the ledger. It hashes; it has no private key."""

from __future__ import annotations

import base64
import binascii
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from opsctl.agent import ledger, trust
from opsctl.agent import manifest as manifests
from opsctl.agent.durable import (
    locked,
    make_directory,
    make_read_only,
    remove_tree,
    sync_directory,
    sync_tree,
    write_atomically,
)
from opsctl.agent.fetch import CHUNK, PARTIAL, sha256_of
from opsctl.agent.ledger import Line
from opsctl.agent.manifest import ReleaseFile
from opsctl.agent.paths import Paths
from opsctl.agent.progress import Meter, silent
from opsctl.agent.stage import check_space, fault_of, free_bytes_of, link_what_holds, plan_files, sweep
from opsctl.agent.store import same_files, stored_releases, verify_files
from opsctl.agent.trust import Signed
from opsctl.errors import LockedError, OpsctlError, RefusedError, UsageError

INCOMING = ".incoming"


def begin(paths: Paths, body: bytes, free_bytes: Callable[[Path], int] | None = None) -> dict[str, Any]:
    """Takes ``{"manifest", "signature"}`` (base64) and says which files to send.

    Returns ``{"accepted", "service", "release", "needed": [{"path", "size", "have"}]}``: ``have`` bytes are here
    already. Files of other releases are linked, so a release with the same weights sends none. A release that is here
    and broken is thrown away and taken again.

    Raises:
        RefusedError: unsigned, foreign, tampered, its version's name is taken by another release, or not enough space
            for what is missing.
    """
    try:
        document = json.loads(body)
        manifest, signature = (base64.b64decode(document[key], validate=True) for key in ("manifest", "signature"))
    except (ValueError, KeyError, TypeError, binascii.Error):
        raise UsageError("gateway.bad_input", "release-begin wants JSON with manifest and signature.") from None
    signed = trust.verify(manifest, signature, paths.allowed_signers, "the release sent to the gateway")
    service = signed.release.service
    answer = {"service": service, "release": signed.directory_name, "needed": []}
    releases = paths.gateway_releases / service
    make_directory(releases)
    target = releases / signed.directory_name
    if target.is_dir() and not fault_of(target, paths.allowed_signers):
        return {**answer, "accepted": True}
    _check_version(releases, signed)
    incoming = _incoming(paths, service, signed.directory_name)
    with _only_one(incoming):
        remove_tree(target)  # broken: taken anew
        write_atomically(incoming / manifests.MANIFEST, manifest)
        write_atomically(incoming / manifests.SIGNATURE, signature)
        files = incoming / manifests.FILES
        make_directory(files)
        plan = plan_files(signed, files, same_files(releases))
        free = free_bytes or free_bytes_of
        check_space(plan, free(releases), signed.directory_name)
        plan = link_what_holds(plan, files, Meter(signed.release.size, silent))
        check_space(plan, free(releases), signed.directory_name)
        needed = [{"path": entry.path, "size": entry.size, "have": _have(files / entry.path)} for entry in plan.fetch]
    return {**answer, "accepted": False, "needed": needed}


def receive(paths: Paths, service: str, release: str, path: str, offset: int, source: IO[bytes]) -> dict[str, Any]:
    """Appends ``source`` to a file that is on its way, from byte ``offset``; returns ``{"have", "complete"}``.

    Raises:
        RefusedError: no such file in the manifest, another offset than what is here, or wrong bytes in the end.
    """
    incoming = _incoming(paths, service, release)
    with _only_one(incoming):
        entry = _entry(_begun(paths, incoming), path)
        target = incoming / manifests.FILES / entry.path
        partial = target.with_name(target.name + PARTIAL)
        if target.is_file():
            return {"have": entry.size, "complete": True}
        make_directory(target.parent)
        have = _have(target)
        if have != offset:
            raise RefusedError("gateway.offset", f"{path}: {have} bytes are here, not {offset}.",
                               hint="ask release-begin again and send from there")
        with partial.open("ab") as file:
            while chunk := source.read(min(CHUNK, entry.size - have + 1)):
                have += len(chunk)
                if have > entry.size:
                    break
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if have < entry.size:
            return {"have": have, "complete": False}
        if have > entry.size or sha256_of(partial) != entry.sha256:
            partial.unlink()
            raise RefusedError("release.tampered", f"{path} arrived with other bytes than were signed.",
                               hint="opsctl model verify on the sending machine; then the same again")
        partial.chmod(0o444)
        partial.replace(target)
        sync_directory(target.parent)
    return {"have": have, "complete": True}


def accept(paths: Paths, service: str, release: str) -> dict[str, Any]:
    """Checks signature and every file once more and gives the release its name; ``changed`` false: it had it.

    Raises:
        RefusedError: not all of it is here, or some of it is wrong.
    """
    releases = paths.gateway_releases / _service(service)
    target = releases / _release(release)
    if target.is_dir():
        trust.read_signed(target, paths.allowed_signers)
        return {"changed": False, "release": release}
    incoming = _incoming(paths, service, release)
    with _only_one(incoming):
        signed = _begun(paths, incoming)
        for entry in signed.release.files:  # before anything is swept: what is half here is sent on later
            if not (incoming / manifests.FILES / entry.path).is_file():
                raise RefusedError("gateway.incomplete", f"{release}: {entry.path} is not all here.",
                                   hint="the same command again sends the rest")
        sweep(incoming, signed)
        verify_files(incoming, signed.release)
        sync_tree(incoming)
        make_read_only(incoming)
        incoming.chmod(0o755)
        incoming.rename(target)
        target.chmod(0o555)
        sync_directory(releases)
    return {"changed": True, "release": release}


def releases(paths: Paths, service: str) -> dict[str, Any]:
    found = stored_releases(paths.gateway_releases / _service(service))
    return {"service": service, "releases": [stored.as_document() for stored in found]}


def manifest(paths: Paths, service: str, release: str) -> dict[str, Any]:
    """``{"manifest", "signature"}`` (base64) of a release, for whoever wants its files under another name.

    Raises:
        RefusedError: it is not here, or its signature is wrong.
    """
    directory = paths.gateway_releases / _service(service) / _release(release)
    if not directory.is_dir():
        raise RefusedError("gateway.no_release", f"{release} of {service} is not on the gateway.",
                           hint="opsctl model list shows what is")
    trust.read_signed(directory, paths.allowed_signers)
    return {key: base64.b64encode((directory / name).read_bytes()).decode()
            for key, name in (("manifest", manifests.MANIFEST), ("signature", manifests.SIGNATURE))}


def show_ledger(paths: Paths, service: str, *, copy: bool = False) -> dict[str, Any]:
    """``{"service", "lines": [...]}``, oldest first; ``copy``: of this host's copy, empty when it has none."""
    lines, _ = _read_ledger(_ledger(paths, service, copy=copy), copy=copy)
    return {"service": service, "lines": [{**vars(line), "release": line.release} for line in lines]}


def append_ledger(paths: Paths, service: str, version: str, digest: str, *, after: int, by: str, run: str = "",
                  note: str = "", action: str = ledger.SERVE, now: float | None = None) -> dict[str, Any]:
    """Appends one line, as ``extend_ledger`` does; ``{"changed", "number"}``."""
    line = Line(0, version, digest, "", by, run, note, action)
    done = extend_ledger(paths, service, [line], after=after, now=now)
    return {"changed": done["changed"], "number": done["number"]}


def extend_ledger(paths: Paths, service: str, wanted: Sequence[Line], *, after: int, now: float | None = None
                  ) -> dict[str, Any]:
    """Appends lines after line ``after`` (0: the ledger is empty): all of them at once, whatever happens, or none.

    Numbers and dates are given here. What the ledger says already is left out. Returns ``{"changed", "number",
    "added"}``: lines that the ledger has now, and for each of ``wanted`` whether it was new.

    Raises:
        RefusedError: a release is neither accepted here nor known to the ledger, or a line contradicts it.
        LockedError: somebody else has written since line ``after``.
    """
    path = _ledger(paths, service)
    make_directory(path.parent)
    with locked(path.with_name(f".{path.name}.lock")):
        before, whole = _read_ledger(path)
        at = _utc(time.time() if now is None else now)
        lines, added = list(before), []
        for one in wanted:
            added.append(not ledger.says(lines, one))
            if added[-1]:
                ledger.check_tip(before, after)
                line = replace(one, number=len(lines) + 1, at=at)
                ledger.check(lines, line)
                _check_known(paths, service, lines, line)
                lines.append(line)
        if any(added):
            content = path.read_bytes()[:whole] if whole else b""  # without a line that a power cut tore
            write_atomically(path, content + ledger.to_bytes(lines[len(before):]))
    return {"changed": any(added), "number": len(lines), "added": added}


def _check_known(paths: Paths, service: str, lines: Sequence[Line], line: Line) -> None:
    """Hosts may have what the ledger knows: a gateway that was installed anew keeps nobody from going back to it."""
    known = any((earlier.version, earlier.digest) == (line.version, line.digest) for earlier in lines)
    if line.action == ledger.SERVE and not known and not (paths.gateway_releases / service / line.release).is_dir():
        raise RefusedError("ledger.no_release", f"{line.release} of {service} is not on the gateway.",
                           hint="publish it before the ledger names it")


def put_ledger(paths: Paths, service: str, body: bytes, *, copy: bool = False) -> dict[str, Any]:
    """Takes a whole ledger that begins with what is here; ``{"changed", "lines": N}``. A shorter one changes nothing.

    Raises:
        UsageError: ``body`` does not end with a whole line.
        LockedError: what is here says something else: somebody wrote to one while the other was out of reach.
    """
    path = _ledger(paths, service, copy=copy)
    given, whole = ledger.parse(body)
    if whole != len(body):
        raise UsageError("ledger.torn", "the ledger that was sent ends in the middle of a line.")
    make_directory(path.parent)
    with locked(path.with_name(f".{path.name}.lock")):
        lines, _ = _read_ledger(path, copy=copy)
        if ledger.is_prefix(given, lines):
            return {"changed": False, "lines": len(lines)}
        if not ledger.is_prefix(lines, given):
            raise LockedError("ledger.diverged", f"{path} and the ledger that was sent for {service} differ.",
                              hint="opsctl history shows both; a person removes the one that is wrong")
        write_atomically(path, ledger.to_bytes(given))
    return {"changed": True, "lines": len(given)}


def _read_ledger(path: Path, *, copy: bool = False) -> tuple[tuple[Line, ...], int]:
    """The lines, and how many bytes they are.

    Raises:
        OpsctlError: something else wrote to it.
    """
    try:
        return ledger.parse(path.read_bytes() if path.is_file() else b"")
    except OpsctlError as error:
        hint = "it is a copy: remove it, the next write brings it again" if copy else error.hint
        raise type(error)(error.code, f"{path}: {error.message}", hint=hint) from None


def _ledger(paths: Paths, service: str, *, copy: bool = False) -> Path:
    return (paths.ledger_copies if copy else paths.ledgers) / f"{_service(service)}.jsonl"


def _incoming(paths: Paths, service: str, release: str) -> Path:
    return paths.gateway_releases / _service(service) / INCOMING / _release(release)


def _service(name: str) -> str:
    if not manifests.SERVICE.fullmatch(name):
        raise UsageError("gateway.bad_service", f"{name!r} is not the name of a service.")
    return name


def _release(name: str) -> str:
    if not manifests.FOLDER.fullmatch(name):
        raise UsageError("gateway.bad_release", f"{name!r} is not VERSION-DIGEST12.")
    return name


class _only_one:  # noqa: N801 - reads as a statement
    """One sender at a time for a release."""

    def __init__(self, incoming: Path) -> None:
        self._incoming = incoming
        self._lock = locked(incoming.parent / f".{incoming.name}.lock", wait=False)

    def __enter__(self) -> None:
        if not self._lock.__enter__():
            self._lock.__exit__(None, None, None)
            raise LockedError("gateway.busy", f"somebody else is sending {self._incoming.name} to the gateway now.",
                              hint="wait for them, then the same again")

    def __exit__(self, *_: object) -> None:
        self._lock.__exit__(None, None, None)


def _begun(paths: Paths, incoming: Path) -> Signed:
    if not (incoming / manifests.MANIFEST).is_file():
        raise RefusedError("gateway.not_begun", f"nobody began to send {incoming.name}.", hint="release-begin first")
    return trust.read_signed(incoming, paths.allowed_signers)


def _entry(signed: Signed, path: str) -> ReleaseFile:
    for entry in signed.release.files:
        if entry.path == path:
            return entry
    raise RefusedError("release.extra_file", f"{path} is not in the manifest.", hint="only what was signed is taken")


def _check_version(releases: Path, signed: Signed) -> None:
    """A version name is taken once, whoever imports, wherever."""
    for stored in stored_releases(releases):
        if stored.release.version == signed.release.version and stored.digest != signed.digest:
            raise RefusedError("release.version_taken", f"{signed.release.service} {signed.release.version} is on the "
                               "gateway already, and it is another.",
                               hint="a version name is taken once: import yours under another")


def _have(target: Path) -> int:
    partial = target.with_name(target.name + PARTIAL)
    return partial.stat().st_size if partial.is_file() else 0


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
