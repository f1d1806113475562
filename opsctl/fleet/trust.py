"""Pinning host keys: ask the machines, compare with what is pinned and what the operator knows, write known_hosts.

``compare`` and ``read_fingerprints`` decide and are pure; ``scan`` asks one machine and logs in nowhere but at the
jumps on the way, whose keys have to be pinned before.
"""

from __future__ import annotations

import logging
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import paramiko

from opsctl.agent.durable import write_atomically
from opsctl.errors import ConfigurationError, OpsctlError, RefusedError
from opsctl.fleet.known_hosts import HostKey, Pin, pin_name, pinned_text, pins_of
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.ssh_config import CONNECT_TIMEOUT_S

SCAN_TIMEOUT_S = 15.0
WORKERS = 16
# In the order in which one is chosen for pinning. A server speaks rsa-sha2-512 with the key that is called ssh-rsa.
ASKED_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "rsa-sha2-512")

logging.getLogger("paramiko").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Target:
    """A machine whose key is to be pinned: a host of the inventory, or a jump outside it."""

    name: str
    address: str
    port: int
    jumps: tuple[str, ...] = ()  # through which it is reached, the first one first, as ProxyJump names them

    @property
    def pin_name(self) -> str:
        return pin_name(self.address, self.port)


class Verdict(StrEnum):
    PINNED = "pinned"  # the same key is pinned already
    NEW = "new"  # nothing is pinned: to be pinned when the operator says so
    REPLACED = "replaced"  # another key is pinned, and the operator asked to replace it
    CHANGED = "changed"  # another key is pinned: refused
    MISMATCH = "mismatch"  # not the fingerprint in the operator's file: refused
    UNLISTED = "unlisted"  # not in the operator's file: refused
    SILENT = "silent"  # it does not answer


@dataclass(frozen=True)
class Finding:
    """What was found of one target. ``key`` is the key to pin, or that was shown; ``pinned`` the one in the way."""

    target: Target
    verdict: Verdict
    key: HostKey | None = None
    pinned: Pin | None = None
    problem: str = ""


def targets(fleet: Fleet, hosts: Sequence[Host]) -> list[list[Target]]:
    """Whose keys these hosts need, in rounds: first those reached directly, then those behind them, and so on."""
    found: dict[str, Target] = {}
    depth: dict[str, int] = {}
    by_name = {host.name: host for host in fleet.hosts}

    def add(host: Host) -> int:
        if host.name not in depth:
            hops = [hop.strip() for hop in host.proxy_jump.split(",") if hop.strip()]
            level = 0
            for index, hop in enumerate(hops):
                level = 1 + (add(by_name[hop]) if hop in by_name else add_hop(hop, tuple(hops[:index]), level))
            found[host.name] = Target(host.name, host.address, host.port, tuple(hops))
            depth[host.name] = level
        return depth[host.name]

    def add_hop(hop: str, before: tuple[str, ...], level: int) -> int:
        found.setdefault(hop, Target(hop, *split_hop(hop), before))
        return depth.setdefault(hop, level)

    for host in hosts:
        if host.connection == "ssh":
            add(host)
    rounds: list[list[Target]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name, target in found.items():
        rounds[depth[name]].append(target)
    return rounds


def split_hop(hop: str) -> tuple[str, int]:
    """``ann@bastion:2222`` -> ``("bastion", 2222)``; an IPv6 address stands in brackets."""
    place = hop.rpartition("@")[2]
    if place.startswith("["):
        address, _, rest = place[1:].partition("]")
        port = rest.lstrip(":")
    else:
        address, _, port = place.partition(":")
    if port and not port.isdecimal():
        raise ConfigurationError("inventory.bad_value", f"proxy_jump={hop} has no number after the colon.",
                                 hint="user@host:port")
    return address, int(port or 22)


def read_fingerprints(text: str, path: Path) -> dict[str, set[str]]:
    """``host SHA256:...`` a line, the host by its inventory name or address; several lines for a host's several keys.

    What ``ssh-keygen -l`` prints (``256 SHA256:... root@gpu-1 (ED25519)``) is no such line: its host is a comment.

    Raises:
        ConfigurationError: ``trust.bad_fingerprints``; the message names the line.
    """
    found: dict[str, set[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        if len(fields) != 2 or not fields[1].startswith("SHA256:") or len(fields[1].rstrip("=")) != 50:
            raise ConfigurationError("trust.bad_fingerprints", f"{path}:{number}: this is not `host SHA256:...`.",
                                     hint="on the host itself: ssh-keygen -l -f /etc/ssh/ssh_host_ed25519_key.pub")
        found.setdefault(fields[0], set()).add(fields[1].rstrip("="))
    return found


def compare(target: Target, keys: Sequence[HostKey], pins: Sequence[Pin], *, replace: bool = False,
            fingerprints: Mapping[str, set[str]] | None = None) -> Finding:
    """What to do about the keys that a machine shows, the preferred first, given what is pinned and what is known."""
    pinned = pins_of(pins, target.pin_name)
    same = [key for key in keys for pin in pinned if key == pin.key]
    known: set[str] = set()
    if fingerprints is not None:
        known = set().union(*(fingerprints.get(name, set()) for name in (target.name, target.address, target.pin_name)))
        right = [key for key in keys if key.fingerprint in known]
        if not right:
            verdict = Verdict.MISMATCH if known else Verdict.UNLISTED
            return Finding(target, verdict, keys[0], pinned[0] if pinned else None, ", ".join(sorted(known)))
        if pinned and not any(key in same for key in right):
            return Finding(target, Verdict.REPLACED if replace else Verdict.CHANGED, right[0], pinned[0])
        return Finding(target, Verdict.PINNED if pinned else Verdict.NEW, right[0])
    if same:
        return Finding(target, Verdict.PINNED, same[0])
    if pinned:
        return Finding(target, Verdict.REPLACED if replace else Verdict.CHANGED, keys[0], pinned[0])
    return Finding(target, Verdict.NEW, keys[0])


def examine(fleet: Fleet, wanted: Sequence[Target], pins: Sequence[Pin], *, replace: Sequence[str] = (),
            fingerprints: Mapping[str, set[str]] | None = None,
            scanner: Callable[[Fleet, Target, bool], tuple[HostKey, ...]] | None = None) -> list[Finding]:
    """Scans all of ``wanted`` at once and compares each. A machine that does not answer is a finding, not an error."""
    ask = scanner or scan

    def look(target: Target) -> Finding:
        # All types cost a connection each: they are asked for only where the preferred one may not be the one known.
        every = fingerprints is not None or bool(pins_of(pins, target.pin_name))
        try:
            keys = ask(fleet, target, every)
        except OpsctlError as error:
            return Finding(target, Verdict.SILENT, problem=error.message)
        return compare(target, keys, pins, replace=target.name in replace, fingerprints=fingerprints)

    if not wanted:
        return []
    with ThreadPoolExecutor(max_workers=min(WORKERS, len(wanted))) as pool:
        return list(pool.map(look, wanted))


def refusal(findings: Sequence[Finding], known_hosts: Path) -> RefusedError | None:
    """The error for keys that must not be pinned, or None."""
    for finding in findings:
        shown = finding.key.fingerprint if finding.key else ""
        name = finding.target.name
        if finding.verdict is Verdict.CHANGED and finding.pinned:
            return RefusedError(
                "trust.changed_key", f"{name} shows the host key {shown}, and {known_hosts}:{finding.pinned.line} pins "
                f"{finding.pinned.key.fingerprint}: it is another machine, or one that was installed anew.",
                hint=f"if that is so and {shown} is right: opsctl trust --replace {name}")
        if finding.verdict is Verdict.MISMATCH:
            return RefusedError("trust.mismatch", f"{name} shows the host key {shown}, and the file of fingerprints "
                                f"says {finding.problem}.",
                                hint="someone may stand between: look on the machine's own console")
        if finding.verdict is Verdict.UNLISTED:
            return RefusedError("trust.unlisted", f"the file of fingerprints says nothing of {name} "
                                f"({finding.target.pin_name}).", hint=f"add the line, if it is right: {name} {shown}")
    return None


def pin(fleet: Fleet, findings: Sequence[Finding]) -> int:
    """Writes the new and the replaced keys to known_hosts, whole or not at all; returns how many."""
    path = fleet.known_hosts
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    text, count = before, 0
    for finding in findings:
        if finding.verdict in (Verdict.NEW, Verdict.REPLACED) and finding.key:
            text = pinned_text(text, finding.target.pin_name, finding.key, finding.target.name)
            count += 1
    if count:
        write_atomically(path, text)
    return count


def scan(fleet: Fleet, target: Target, every: bool) -> tuple[HostKey, ...]:
    """The host keys that a machine shows, the preferred type first; only that one unless ``every``.

    Raises:
        RefusedError: ``host.unreachable``: it does not answer, or the jump on the way does not.
    """
    found: list[HostKey] = []
    for asked in ASKED_TYPES:
        key = _scan_type(fleet, target, asked)
        if key is not None and key not in found:
            found.append(key)
            if not every:
                break
    if not found:
        raise RefusedError("host.unreachable", f"{target.name}: {target.pin_name} shows no host key of a type that "
                           "opsctl knows.", hint=f"ssh-keyscan -p {target.port} {target.address}")
    return tuple(found)


def _scan_type(fleet: Fleet, target: Target, asked: str) -> HostKey | None:
    with _wire(fleet, target) as (wire, complaint):
        transport = paramiko.Transport(wire)
        try:
            transport.banner_timeout = SCAN_TIMEOUT_S
            transport.get_security_options().key_types = (asked,)
            transport.start_client(timeout=SCAN_TIMEOUT_S)
            key = transport.get_remote_server_key()
            return HostKey(key.get_name(), key.get_base64())
        except paramiko.ssh_exception.IncompatiblePeer:
            return None
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise _silent(target, complaint() or " ".join(str(error).split()) or type(error).__name__) from None
        finally:
            transport.close()


@contextmanager
def _wire(fleet: Fleet, target: Target) -> Iterator[tuple[socket.socket, Callable[[], str]]]:
    """A socket to the machine's SSH port, and whom to ask when it breaks; behind jumps, ``ssh -W`` is its other end."""
    if not target.jumps:
        try:
            connected = socket.create_connection((target.address, target.port), timeout=CONNECT_TIMEOUT_S)
        except OSError as error:
            raise _silent(target, str(error.strerror or error).lower()) from None
        with connected:
            yield connected, lambda: ""
        return
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(jump_command(fleet.ssh_config, target), stdin=theirs.fileno(), stdout=theirs.fileno(),
                               stderr=subprocess.PIPE, text=True, errors="replace")
    theirs.close()

    def complaint() -> str:
        ours.close()
        lines = process.communicate(timeout=SCAN_TIMEOUT_S)[1].strip().splitlines()
        return lines[-1] if lines else ""

    try:
        with ours:
            yield ours, complaint
    finally:
        process.kill()
        process.communicate()


def jump_command(ssh_config: Path, target: Target) -> list[str]:
    """``ssh -W`` to a target through its jumps, by the generated configuration (strict host keys at each of them)."""
    *before, last = target.jumps
    address = f"[{target.address}]" if ":" in target.address else target.address
    # ControlMaster would outlive us with our pipe in its hands
    return ["ssh", "-F", str(ssh_config), "-o", "ControlMaster=no", "-o", "ControlPath=none",
            *(["-J", ",".join(before)] if before else []), "-W", f"{address}:{target.port}",
            f"ssh://{last}" if ":" in last else last]


def _silent(target: Target, why: str) -> RefusedError:
    through = f" through {', '.join(target.jumps)}" * bool(target.jumps)
    return RefusedError("host.unreachable", f"{target.name}: {target.pin_name} does not answer{through}: {why}.",
                        hint="is it on, is the address right, does sshd run?")
