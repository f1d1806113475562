"""Asks all hosts at once what ``probe.py`` captures, and compares each as it answers. Nothing on a host is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml

from opsctl.checking.hosts import wanted_of
from opsctl.checking.model import Captured
from opsctl.checking.sending import ask
from opsctl.drifting.differences import drift_of
from opsctl.drifting.model import Drift, Expected
from opsctl.engines.events import Emit, PhaseStarted, TaskResult, discard, one_at_a_time
from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.gpus import VERSION
from opsctl.fleet.model import Fleet, Host
from opsctl.planning import roles_for
from opsctl.resolving import read_lock
from opsctl.resources import resource
from opsctl.role_tasks import holds_of, packages_of
from opsctl.stack.lock import Lock
from opsctl.verifying import codename_in, versions_in

PROBE = Path(__file__).with_name("probe.py")
NEEDED = ("files", "kernels")  # readings without which nothing can be said


def drift_of_hosts(fleet: Fleet, hosts: Sequence[Host], emit: Emit = discard) -> dict[str, Drift | OpsctlError]:
    """What is to be said of each host, in the order of ``hosts``; the error of one that does not answer.

    Raises:
        ConfigurationError: stack.lock is wrong.
    """
    emit = one_at_a_time(emit)
    emit(PhaseStarted(f"Look at {len(hosts)} host{'s' if len(hosts) != 1 else ''}", tuple(host.name for host in hosts)))
    lock = read_lock(fleet.lock_file)

    def look(session: Session) -> Drift:
        expected = expected_of(fleet, session.host, lock)
        captured = capture(session, [*expected.patterns, *expected.packages, *expected.holds])
        bundle = bundle_versions(fleet, codename_in(captured.file("/etc/os-release") or ""))
        found = drift_of(captured, replace(expected, bundle=bundle))
        emit(event_of(session.host.name, found))
        return found

    answers = on_each(fleet, hosts, look)
    for name, answer in answers.items():
        if isinstance(answer, OpsctlError):
            emit(TaskResult(name, "drift", "unreachable", answer.message))
    return answers


def capture(session: Session, packages: Sequence[str]) -> Captured:
    """What the probe says on one host, as root. ``packages``: names and patterns.

    Raises:
        OpsctlError: the host does not answer; ``drift.no_python``, ``drift.no_probe``, ``drift.no_dpkg``: it does, and
            the probe, or dpkg, does not.
    """
    host = session.host.name
    captured = Captured(ask(session, PROBE, {"packages": list(dict.fromkeys(packages))}, "drift"))
    late = [name for name in NEEDED if name in captured.document.get("late", ())]
    if captured.exit("dpkg-list") in (None, 127) or late:
        what = ", ".join(late) or "dpkg"
        raise RefusedError("drift.no_dpkg", f"{host}: {what} did not answer in time, so nothing can be compared.",
                           hint=f"opsctl check --limit {host}")
    return captured


def expected_of(fleet: Fleet, host: Host, lock: Lock | None) -> Expected:
    """What lock, inventory and roles want of a host, without the bundle."""
    roles = roles_for(fleet, host)
    own = role_variables()
    return Expected(
        wanted_of(fleet, host), fleet.lock_file.name if VERSION in host.locked else "the inventory",
        lock.hosts.get(host.name) if lock else None, tuple(own["nvidia_driver_patterns"]), blacklist(),
        tuple(name for role in roles for name in packages_of(role)),
        tuple(name for role in roles for name in holds_of(role)))


@cache
def role_variables() -> Mapping[str, Any]:
    text = (resource("roles") / "nvidia_driver" / "vars" / "main.yml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@cache
def blacklist() -> str:
    """The file that keeps unattended upgrades away from the driver, as the role writes it."""
    made = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
                              autoescape=False)  # noqa: S701 - a configuration file
    text = (resource("roles") / "nvidia_driver" / "templates" / "51opsctl-nvidia.j2").read_text(encoding="utf-8")
    return made.from_string(text).render(role_variables())


def bundle_versions(fleet: Fleet, codename: str) -> Mapping[str, set[str]] | None:
    """By package, from the bundle beside the inventory; None where hosts do not take theirs from one that is there."""
    index = fleet.directory / "bundle" / "apt" / "dists" / codename / "main" / "binary-amd64" / "Packages"
    if fleet.package_source != "gateway" or not codename or not index.is_file():
        return None
    return versions_in(index.read_text(encoding="utf-8"))


def event_of(host: str, found: Drift) -> TaskResult:
    """What views hear of a host that has been compared."""
    if found.skipped:
        return TaskResult(host, "drift", "skipped", found.skipped)
    count = len(found.differences)
    return TaskResult(host, "drift", "failed" if count else "ok", f"{count} differ" if count else "")
