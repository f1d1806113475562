"""Host patterns as Ansible's ``--limit``: names, groups, globs, ``~regex``, ``a,b``, ``!not``, ``&and``, ``gpu[0]``."""

from __future__ import annotations

import difflib
import fnmatch
import re

from opsctl.errors import UsageError
from opsctl.fleet.model import Fleet, Host, Service

SUBSCRIPT = re.compile(r"(?P<pattern>.+?)\[(?P<first>-?\d+)(?:[:-](?P<last>-?\d*))?\]")
SEPARATOR = re.compile(r"[,:](?![^\[]*\])")  # not inside [0:2]


def select_hosts(fleet: Fleet, limit: str) -> tuple[Host, ...]:
    """The hosts that a pattern names, in the inventory's order; all of them when it is empty.

    Raises:
        UsageError: ``limit.no_match``: a part of the pattern, or the whole of it, matches nothing.
    """
    parts = [part.strip() for part in SEPARATOR.split(limit) if part.strip()]
    plain = [part for part in parts if part[0] not in "!&"] or ["all"]
    chosen = {name for part in plain for name in _match(fleet, part)}
    for part in parts:
        if part[0] == "&":
            chosen &= set(_match(fleet, part[1:]))
    for part in parts:
        if part[0] == "!":
            chosen -= set(_match(fleet, part[1:]))
    if not chosen:
        raise UsageError("limit.no_match", f"--limit {limit} leaves no host of {fleet.inventory}.",
                         hint="hosts: " + ", ".join(host.name for host in fleet.hosts))
    return tuple(host for host in fleet.hosts if host.name in chosen)


def _match(fleet: Fleet, part: str) -> list[str]:
    subscript = SUBSCRIPT.fullmatch(part)
    pattern = subscript["pattern"] if subscript else part
    names = [host.name for host in fleet.hosts]
    groups = sorted({group for host in fleet.hosts for group in host.groups} | {"all"})
    if pattern.startswith("~"):
        try:
            expression = re.compile(pattern[1:])
        except re.error as error:
            raise UsageError("limit.bad_pattern", f"--limit: {pattern} is not a regular expression: {error}.",
                             hint="a glob such as 'gpu-*' may do") from None
        wanted = {name for name in (*names, *groups) if expression.match(name)}
    else:
        wanted = {name for name in (*names, *groups) if fnmatch.fnmatchcase(name, pattern)}
    if not wanted:
        near = difflib.get_close_matches(pattern, (*names, *groups), n=1)
        raise UsageError("limit.no_match", f"--limit: {pattern} is no host and no group of {fleet.inventory}.",
                         hint=f"did you mean {near[0]}?" if near else f"hosts: {', '.join(names)}")
    found = [host.name for host in fleet.hosts if host.name in wanted or "all" in wanted or wanted & set(host.groups)]
    return _subscripted(found, subscript) if subscript else found


def _subscripted(found: list[str], subscript: re.Match[str]) -> list[str]:
    """``gpu[0]`` is the first, ``gpu[1:2]`` the second and third, ``gpu[1:]`` all but the first, as in Ansible."""
    first, last = int(subscript["first"]), subscript["last"]
    if last is None:
        return found[first:][:1]
    end = int(last) if last else len(found) - 1
    return found[first:end + 1 if end != -1 else None]


def the_service(fleet: Fleet, name: str) -> Service:
    """The service that is named, or the only one.

    Raises:
        UsageError: ``fleet.which_service``: there are several and none was named; or there is none of that name.
    """
    if name:
        return fleet.service(name)
    if len(fleet.services) != 1:
        raise UsageError("fleet.which_service", f"{fleet.services_file} has {len(fleet.services)} services.",
                         hint="say which: --service NAME, one of " + ", ".join(one.name for one in fleet.services))
    return fleet.services[0]
