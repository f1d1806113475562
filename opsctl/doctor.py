"""What is wrong between an operator and their fleet: measured facts in, findings out. Pure; ``measuring.py`` measures.

A finding is ``PASS``, ``WARN`` (it works, and will hurt) or ``FIX`` (something cannot work), the latter two with the
command that mends it. Names of checks are stable.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

HERE = "this computer"
OLDEST_PYTHON = (3, 11)
OLDEST_SSH = (8, 2)  # ssh-keygen -Y sign and verify as they are now; Debian 11 has 8.4
ANSIBLE, PYINFRA = "2.19.", "3.10."  # what pyproject.toml asks for
LITTLE_BYTES, TOO_LITTLE_BYTES = 5_000_000_000, 1_000_000_000
SLOW_CONNECT_S, SLOW_COMMAND_S, SLOW_PROFILE_S = 2.0, 0.5, 0.5
CLOCK_APART_S = 2.0
FEW_SESSIONS, FEW_STARTUPS = 4, 10  # sshd's own defaults are 10 and 10:30:100
MOUNTS = ("/srv", "/opt", "/var")
ROOM = {"/srv": "opsctl gc", "/opt": "opsctl gc", "/var": "opsctl exec --limit {host} -- journalctl --vacuum-size=500M"}


class Level(StrEnum):
    PASS = "PASS"  # noqa: S105 - a verdict
    WARN = "WARN"
    FIX = "FIX"


@dataclass(frozen=True)
class Finding:
    """``where``: a host's name or ``HERE``; ``check``: its stable name; ``fix``: what to type, empty when it passed."""

    where: str
    check: str
    level: Level
    message: str
    fix: str = ""

    def as_document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Here:
    """This computer and the fleet's folder. Versions are empty when the program is missing; paths are relative."""

    python: tuple[int, int]
    ansible: str
    pyinfra: str
    ssh: tuple[int, int] | None
    signs: str  # why ssh-keygen -Y does not sign and verify; empty: it does
    missing_programs: tuple[str, ...]
    free_bytes: int
    clock_behind_s: float  # how long before the newest file of the fleet it is now by this clock
    open_keys: tuple[str, ...]  # private files that others may read
    missing_keys: tuple[str, ...]
    keys_in_git: tuple[str, ...]
    missing_trust: tuple[str, ...]
    bundle: str  # "" verified, "missing", or what is wrong with it
    not_pinned: tuple[str, ...]  # hosts without a line in known_hosts


@dataclass(frozen=True)
class There:
    """One host. What was not measured is None; ``error`` (code, message, hint) says why nothing was."""

    error: Mapping[str, str] | None = None
    connect_s: float | None = None
    command_s: float | None = None
    profile_s: float | None = None  # what a login shell costs beyond the command itself
    max_sessions: int | None = None
    max_startups: int | None = None
    clock_offset_s: float | None = None  # its clock less ours
    clock_error_s: float = 0.0
    sudo_error: Mapping[str, str] | None = None
    disks: tuple[tuple[str, int, int], ...] = ()  # path as in MOUNTS, free bytes, number of its file system
    agent: str | None = None  # its version; empty: there is none
    agent_error: str = ""
    deaf_instances: tuple[str, ...] = ()  # those of which the agent's port says nothing

    def as_document(self) -> dict[str, Any]:
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def judge_here(here: Here) -> list[Finding]:
    """What is to be said of this computer; always the same checks in the same order."""
    return [found for judge in (_programs, _keys, _folder) for found in judge(here)]


def judge_host(name: str, there: There, agent: str) -> list[Finding]:
    """What is to be said of one host; ``agent`` is the version that this opsctl brings."""
    if there.error is not None:
        return [Finding(name, "ssh", Level.FIX, there.error["message"], there.error["hint"])]
    parts: tuple[Callable[[str, There], Iterator[Finding]], ...] = (_latency, _sshd, _clock, _sudo, _disks)
    return [*(found for part in parts for found in part(name, there)), *_agent(name, there, agent)]


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """``{"PASS": 20, "WARN": 1, "FIX": 0}``."""
    levels = [one.level for one in findings]
    return {level.value: levels.count(level) for level in Level}


def _here(check: str, good: bool, message: str, wrong: str, fix: str, level: Level = Level.FIX) -> Finding:
    return Finding(HERE, check, Level.PASS, message) if good else Finding(HERE, check, level, wrong, fix)


def _programs(here: Here) -> Iterator[Finding]:
    python = ".".join(map(str, here.python))
    yield _here("python", here.python >= OLDEST_PYTHON, f"Python {python}", f"Python {python} is too old",
                "apt-get install python3   (3.11 or newer), and install opsctl with that one")
    for name, version, wanted in (("ansible-core", here.ansible, ANSIBLE), ("pyinfra", here.pyinfra, PYINFRA)):
        yield _here(name, version.startswith(wanted), f"{name} {version}",
                    f"{name} is {version or 'missing'}, and {wanted}x is wanted", f"pip install '{name}=={wanted}*'")
    ssh = ".".join(map(str, here.ssh)) if here.ssh else "missing"
    yield _here("ssh", here.ssh is not None and here.ssh >= OLDEST_SSH, f"OpenSSH {ssh}",
                f"the ssh program is {ssh}, and {'.'.join(map(str, OLDEST_SSH))} is the oldest that will do",
                "apt-get install openssh-client")
    yield _here("ssh-keygen", not here.signs, "ssh-keygen -Y signs and verifies",
                f"ssh-keygen -Y does not sign and verify: {here.signs}", "apt-get install openssh-client")
    yield _here("gpg", not here.missing_programs, "gpg and gpgv", f"{' and '.join(here.missing_programs)} missing",
                "apt-get install gpg gpgv")


def _keys(here: Here) -> Iterator[Finding]:
    yield _here("keys", not here.missing_keys, "the private keys are here", "not here: "
                f"{', '.join(here.missing_keys)}: this computer can sign nothing new",
                "cp -a YOUR-BACKUP/keys .   (a new fleet: opsctl init)", Level.WARN)
    yield _here("keys-mode", not here.open_keys, "nobody else can read the private keys",
                f"others may read {_some(here.open_keys)}", f"chmod go= {shlex.join(here.open_keys)}")
    yield _here("keys-git", not here.keys_in_git, "no private key is in git",
                f"in git, and so with everybody who has it: {_some(here.keys_in_git)}",
                f"git rm -r --cached {shlex.join(here.keys_in_git)}   (then make new keys: these are known)")
    yield _here("trust", not here.missing_trust, "trust/ has the public keys", f"missing: "
                f"{', '.join(here.missing_trust)}", "opsctl init   (completes what is missing)")


def _folder(here: Here) -> Iterator[Finding]:
    yield _room(HERE, "disk", "the fleet's folder", here.free_bytes, "du -xhd1 . | sort -h")
    yield _here("clock", here.clock_behind_s <= 60, "the clock is not behind the fleet's files",
                f"the clock is {here.clock_behind_s:.0f} s behind the newest file of the fleet: one of them is wrong",
                "timedatectl set-ntp true")
    if here.bundle == "missing":
        yield Finding(HERE, "bundle", Level.WARN, "there is no bundle: nothing can be provisioned",
                      "opsctl bundle build")
    else:
        yield _here("bundle", not here.bundle, "the bundle is whole and signed", here.bundle, "opsctl bundle build")
    yield _here("known-hosts", not here.not_pinned, "every host's key is pinned",
                f"no host key is pinned of {_some(here.not_pinned)}", "opsctl trust")


def _latency(name: str, there: There) -> Iterator[Finding]:
    limit = f"opsctl exec --limit {name} --"
    if there.connect_s is not None:
        slow = there.connect_s > SLOW_CONNECT_S
        yield Finding(name, "connect", Level.WARN if slow else Level.PASS,
                      f"connecting takes {there.connect_s * 1000:.0f} ms" + (": its sshd may ask a dead DNS server who "
                                                                             "you are" * slow),
                      f"{limit} sh -c 'sshd -T | grep usedns; cat /etc/resolv.conf'" * slow)
    if there.command_s is not None:
        slow = there.command_s > SLOW_COMMAND_S
        yield Finding(name, "command", Level.WARN if slow else Level.PASS,
                      f"a command takes {there.command_s * 1000:.0f} ms", f"{limit} uptime" * slow)
    if there.profile_s is not None:
        slow = there.profile_s > SLOW_PROFILE_S
        yield Finding(name, "login-shell", Level.WARN if slow else Level.PASS,
                      f"the profile of its login shell costs {max(there.profile_s, 0) * 1000:.0f} ms",
                      f"{limit} bash -lxc true" * slow)


def _sshd(name: str, there: There) -> Iterator[Finding]:
    for check, value, few, wanted in (("MaxSessions", there.max_sessions, FEW_SESSIONS, "10"),
                                      ("MaxStartups", there.max_startups, FEW_STARTUPS, "10:30:100")):
        if value is None:
            continue
        low = value < few
        yield Finding(name, check.lower(), Level.WARN if low else Level.PASS, f"sshd has {check} {value}" + (
            f": engines that work at once are refused below {few}" * low),
            f"opsctl exec --limit {name} -- sh -c 'echo {check} {wanted} > /etc/ssh/sshd_config.d/00-opsctl.conf && "
            "systemctl reload ssh'" * low)


def _clock(name: str, there: There) -> Iterator[Finding]:
    if there.clock_offset_s is None:
        return
    apart = abs(there.clock_offset_s) - there.clock_error_s > CLOCK_APART_S
    where = "ahead of" if there.clock_offset_s > 0 else "behind"
    words = (f"its clock is {abs(there.clock_offset_s):.1f} s {where} this computer's" if apart
             else "its clock is this computer's")
    yield Finding(name, "clock", Level.WARN if apart else Level.PASS, words,
                  f"opsctl exec --limit {name} -- timedatectl set-ntp true" * apart)


def _sudo(name: str, there: There) -> Iterator[Finding]:
    if there.sudo_error is None:
        yield Finding(name, "sudo", Level.PASS, "sudo asks for no password")
    else:
        yield Finding(name, "sudo", Level.FIX, there.sudo_error["message"], there.sudo_error["hint"])


def _disks(name: str, there: There) -> Iterator[Finding]:
    """One finding a file system: /srv, /opt and /var often are one."""
    seen: dict[int, list[tuple[str, int]]] = {}
    for path, free, device in there.disks:
        seen.setdefault(device, []).append((path, free))
    for same in seen.values():
        path, free = same[0]
        yield _room(name, f"disk{path}", " ".join(one for one, _ in same), free, ROOM[path].format(host=name))


def _agent(name: str, there: There, wanted: str) -> Iterator[Finding]:
    provision = f"opsctl provision --limit {name}"
    if there.sudo_error is not None or there.agent is None:
        if there.agent_error:
            yield Finding(name, "agent", Level.FIX, there.agent_error, provision)
        return
    if not there.agent:
        yield Finding(name, "agent", Level.WARN, "not provisioned: there is no opsctl-agent", provision)
        return
    same = there.agent == wanted
    yield Finding(name, "agent", Level.PASS if same else Level.WARN, f"opsctl-agent {there.agent}" + (
        f", and this opsctl brings {wanted}" * (not same)), f"opsctl bundle build && {provision}" * (not same))
    if there.deaf_instances:
        yield Finding(name, "agent-port", Level.FIX, "the agent says nothing of "
                      f"{_some(there.deaf_instances)}: load balancers take it for down",
                      f"opsctl exec --limit {name} -- systemctl restart opsctl-agent")


def _room(where: str, check: str, what: str, free: int, fix: str) -> Finding:
    level = Level.FIX if free < TOO_LITTLE_BYTES else Level.WARN if free < LITTLE_BYTES else Level.PASS
    return Finding(where, check, level, f"{what}: {free / 1e9:.1f} GB free", fix if level is not Level.PASS else "")


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Answers of programs, as facts.

def parse_ssh_version(text: str) -> tuple[int, int] | None:
    """``OpenSSH_9.2p1 Debian-2+deb12u5, OpenSSL 3.0.15`` -> ``(9, 2)``."""
    head = text.partition("OpenSSH_")[2].partition(" ")[0]
    major, _, rest = head.partition(".")
    minor = rest[:len(rest) - len(rest.lstrip("0123456789"))]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def parse_sshd(text: str) -> tuple[int | None, int | None]:
    """MaxSessions and the first number of MaxStartups, from ``sshd -T``."""
    values = dict(line.split(maxsplit=1) for line in text.splitlines() if len(line.split(maxsplit=1)) == 2)
    numbers = [values.get("maxsessions", ""), values.get("maxstartups", "").partition(":")[0]]
    sessions, startups = (int(one) if one.strip().isdigit() else None for one in numbers)
    return sessions, startups


def parse_disks(text: str) -> tuple[tuple[str, int, int], ...]:
    """``stat -f``'s ``path free-blocks block-size file-system-id`` a line."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 4 and fields[1].isdigit() and fields[2].isdigit():
            found.append((fields[0], int(fields[1]) * int(fields[2]), int(fields[3], 16)))
    return tuple(found)


def clock_offset(before: float, after: float, text: str) -> tuple[float, float] | None:
    """The host's clock less ours and how wrong that may be, in seconds: ``date +%s.%N``, asked between two times."""
    try:
        there = float(text.strip())
    except ValueError:
        return None
    return there - (before + after) / 2, (after - before) / 2
