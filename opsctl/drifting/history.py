"""Who changed a package last, from the logs of apt and dpkg and what was typed under sudo. Pure.

dpkg's log knows that a package changed, apt's history who asked apt to; what only dpkg knows was done without apt. Who
holds a package, or no longer does, neither writes down: there only what was typed can tell. All times are the host's
own, as ``2026-11-22 14:03:42``, and so sort as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

T = TypeVar("T")
By = Literal["apt", "unattended-upgrade", "dpkg", "opsctl", "a hand"]
TIME = "%Y-%m-%d %H:%M:%S"
LISTS = ("Install", "Reinstall", "Upgrade", "Downgrade", "Remove", "Purge")
# "libnvidia-ml1:amd64 (580.126.09-1, 595.71.05-1)"; the last of a log that was cut lacks its bracket.
ITEM = re.compile(r"(?P<name>[^\s:,()]+)(?::(?P<arch>[^\s,()]+))? \((?P<versions>[^()]*)(?:\)|$)")
LOGGED = re.compile(r"(?P<when>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?P<act>install|upgrade|remove|purge) "
                    r"(?P<name>[^\s:]+)(?::\S+)? (?P<old>\S+)(?: (?P<new>\S+))?")
NONE = "<none>"
# How opsctl's own transaction calls apt (driver_transaction.py), and how Ansible's module for apt does.
OPSCTL = "-o APT::Get::Purge=false -o DPkg::Lock::Timeout=300"
ANSIBLE = re.compile(r"apt-get -y -o \"?Dpkg::Options::=--force-confdef\"? -o \"?Dpkg::Options::=--force-confold\"? ")
UNATTENDED = re.compile(r"(?:^|/)unattended-upgrades?(?:\s|$)")
SUDO = re.compile(r"(?P<when>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\S* \S+ sudo(?:\[\d+\])?:\s+(?P<user>\S+) : "
                  r"(?:.*? ; )?COMMAND=(?P<command>.*)$")
AUDIT = re.compile(r"(?P<when>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\S* \S+ opsctl-audit(?:\[\d+\])?: (?P<document>\{.*\})$")
UNHOLDS = re.compile(r"apt-mark\W.*\bunhold\b|--set-selections")
SELECTIONS = re.compile(r"\S*dpkg (?:--set-selections|--clear-selections)")  # of what, its standard input says
PROBES = "python3 -"  # opsctl's own questions name every package, and change none
NEAR_S = 600  # how long what was typed may take until dpkg comes to a package
CUT_S = 3600  # how long a transaction may have lasted whose end is not written


@dataclass(frozen=True)
class Culprit:
    """The last who changed something. ``command`` and ``user`` are empty where nobody wrote them down.

    ``act``: ``upgrade``, ``install``, ``remove``, ``purge``, ...; versions are empty where there was none.
    """

    when: str
    by: By
    act: str = ""
    old: str = ""
    new: str = ""
    command: str = ""
    user: str = ""

    @property
    def words(self) -> str:
        """``dpkg without apt, 2026-11-22 14:03:42, upgrade 580.126.09-1 -> 595.71.05-1 (ann: dpkg -i x.deb)``."""
        who = {"dpkg": "dpkg without apt", "opsctl": "opsctl itself"}.get(self.by, self.by)
        versions = " -> ".join(filter(None, (self.old, self.new)))
        what = " ".join(filter(None, (self.act, versions)))
        asked = ": ".join(filter(None, (self.user, self.command)))
        return ", ".join(filter(None, (who, self.when, what))) + (f" ({asked})" if asked else "")


@dataclass(frozen=True)
class Change:
    """One package in a transaction, or in dpkg's log."""

    name: str
    act: str
    old: str = ""
    new: str = ""
    when: str = ""


@dataclass(frozen=True)
class Transaction:
    """An entry of apt's history. ``ended`` is empty where the log was cut; ``error``: what apt said of its end."""

    began: str
    ended: str
    command: str
    user: str
    changes: tuple[Change, ...]
    error: str = ""

    def covers(self, logged: Change) -> bool:
        """Whether a line of dpkg's log is of this transaction: its time, and what became of the package."""
        if not self.began <= logged.when <= (self.ended or _later(self.began, CUT_S)):
            return False
        gone = ("remove", "purge")
        cut = not self.ended  # the last version of such a log may be half of one
        return any(change.name == logged.name and (
            change.act in gone if logged.act in gone
            else logged.new == change.new or (cut and logged.new.startswith(change.new))) for change in self.changes)


@dataclass(frozen=True)
class Typed:
    """What somebody ran as root, by sudo or by ``opsctl exec``."""

    when: str
    user: str
    command: str

    def names(self, package: str) -> bool:
        """Whether a word of it, which may be a pattern, is this package."""
        words = (word.partition(":")[0] for word in re.split(r"[\s'\"\\;&|]+", self.command))
        return any(fnmatchcase(package, word) for word in words if word.strip("*"))


@dataclass(frozen=True)
class History:
    """All that a host's logs tell."""

    transactions: tuple[Transaction, ...] = ()
    logged: tuple[Change, ...] = ()
    typed: tuple[Typed, ...] = ()

    def last(self, package: str) -> Culprit | None:
        """Who changed it last; None where no log that is kept tells."""
        logged = _latest([one for one in self.logged if one.name == package], lambda one: one.when)
        asked = [one for one in self.transactions if any(change.name == package for change in one.changes)]
        covering = [one for one in asked if logged and one.covers(logged)]
        newest = _latest(asked, lambda one: one.began)
        # One that failed may never have come to this package; else it is dpkg's log that ends too early.
        later = newest and logged and newest.began > logged.when and not newest.error
        if logged and not covering and not later:
            typed = self.before(logged.when, r"\bdpkg\b|\.deb\b")
            return Culprit(logged.when, "dpkg", logged.act, logged.old, logged.new,
                           typed.command if typed else "", typed.user if typed else "")
        transaction = newest if later else _latest(covering, lambda one: one.began) or newest
        if transaction is None:
            return None
        change = next(one for one in reversed(transaction.changes) if one.name == package)
        return Culprit(transaction.began, _by(transaction.command), change.act, change.old, change.new,
                       _shown(transaction.command), transaction.user)

    def unheld(self, package: str, since: str) -> Culprit | None:
        """Who took its hold away after ``since``: whoever typed it, else who changed the package past its hold.

        Both ``dpkg -i`` and an apt that is told to change a held package take its hold off (seen: dpkg 1.21, apt 2.6).
        An empty ``since`` is not known: then only what was typed counts.
        """
        typed = [one for one in self.typed if one.when >= since and (
            (UNHOLDS.search(one.command) and one.names(package)) or SELECTIONS.fullmatch(one.command))]
        if typed:
            last = max(typed, key=_order)
            return Culprit(last.when, "a hand", command=last.command, user=last.user)
        changed = self.last(package)
        return changed if since and changed and changed.when > since and changed.by != "opsctl" else None

    def wrote(self, path: str, when: str) -> Culprit:
        """Who wrote a file that was last written at ``when``: an apt or dpkg of that time does not count as one."""
        near = [one for one in self.typed if one.when <= when <= _later(one.when, NEAR_S) and path in one.command]
        last = max(near, key=_order, default=Typed("", "", ""))
        return Culprit(when, "a hand", command=last.command, user=last.user)

    def before(self, when: str, pattern: str) -> Typed | None:
        """The last that was typed shortly before, of what fits a pattern."""
        near = [one for one in self.typed if one.when <= when <= _later(one.when, NEAR_S)
                and re.search(pattern, one.command)]
        return max(near, key=_order, default=None)


def read_history(apt: str, dpkg: str, typed: str = "") -> History:
    """What the texts of ``history.log``, ``dpkg.log`` and journalctl's lines of sudo and opsctl-audit tell.

    Entries that cannot be read are passed over: logs are cut, rotated and written to by others.
    """
    return History(tuple(transactions(apt)), tuple(logged(dpkg)), tuple(typed_in(typed)))


def _latest(found: Sequence[T], when: Callable[[T], str]) -> T | None:
    """The last one, by its second; of several in one second the one that was written last."""
    return max(reversed(found), key=when, default=None)


def transactions(text: str) -> list[Transaction]:
    """The entries of apt's history, as they stand."""
    found = []
    for part in re.split(r"^(?=Start-Date: )", text, flags=re.MULTILINE):
        fields: dict[str, str] = {}
        for line in part.splitlines():
            key, mark, value = line.partition(": ")
            if mark:
                fields.setdefault(key, value)
        began = _time(fields.get("Start-Date", ""))
        if not began:
            continue
        changes = tuple(change for key in LISTS for change in _changes(key, fields.get(key, "")))
        user = fields.get("Requested-By", "")
        found.append(Transaction(began, _time(fields.get("End-Date", "")), fields.get("Commandline", ""),
                                 re.sub(r" \(\d+\)$", "", user), changes, fields.get("Error", "")))
    return found


def logged(text: str) -> list[Change]:
    """The lines of dpkg's log that change a package."""
    found = []
    for line in text.splitlines():
        match = LOGGED.match(line)
        if match:
            old, new = (version if version and version != NONE else "" for version in (match["old"], match["new"]))
            found.append(Change(match["name"], match["act"], old, new, match["when"]))
    return found


def typed_in(text: str) -> list[Typed]:
    """Of journalctl's lines what was typed by people: opsctl's own questions are none."""
    found = []
    for line in text.splitlines():
        one = _sudo(line) or _audit(line)
        if one and PROBES not in one.command:
            found.append(one)
    return found


def _sudo(line: str) -> Typed | None:
    match = SUDO.match(line)
    return Typed(match["when"].replace("T", " "), match["user"], match["command"]) if match else None


def _audit(line: str) -> Typed | None:
    match = AUDIT.match(line)
    if not match:
        return None
    try:
        said = json.loads(match["document"])
    except ValueError:
        return None
    argv = said.get("argv") if isinstance(said, dict) else None
    if not isinstance(argv, list):
        return None
    return Typed(match["when"].replace("T", " "), str(said.get("by") or said.get("user") or ""),
                 "opsctl exec -- " + " ".join(map(str, argv)))


def _changes(act: str, text: str) -> Iterable[Change]:
    for match in ITEM.finditer(text):
        versions = [one.strip() for one in match["versions"].split(",") if one.strip() != "automatic"]
        first, second = (*versions, "", "")[:2]
        installs = act in ("Install", "Reinstall")
        yield Change(match["name"], act.lower(), "" if installs else first, first if installs else second)


def _by(command: str) -> By:
    if UNATTENDED.search(command):
        return "unattended-upgrade"
    return "opsctl" if OPSCTL in command else "apt"


def _shown(command: str) -> str:
    """A command line for a person to read."""
    if OPSCTL in command:
        return "opsctl-driver.service"
    if ANSIBLE.search(command):
        command = f"Ansible, opsctl provision or another playbook: {command}"
    return command if len(command) <= 300 else f"{command[:297]}..."


def _time(text: str) -> str:
    """apt writes two spaces between day and time."""
    words = " ".join(text.split())
    return words if re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", words) else ""


def _later(when: str, seconds: int) -> str:
    try:
        return (datetime.strptime(when, TIME) + timedelta(seconds=seconds)).strftime(TIME)
    except ValueError:
        return when


def _order(one: Typed) -> tuple[str, bool]:
    """opsctl exec leaves two lines: its own names the operator, sudo's the login."""
    return one.when, one.command.startswith("opsctl exec")
