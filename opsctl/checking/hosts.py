"""Asks all hosts at once what ``probe.py`` captures, and judges each as it answers. Nothing on a host is changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from opsctl.agent import manifest as manifests
from opsctl.checking.model import Captured, Finding, Wanted
from opsctl.checking.sending import ask
from opsctl.checking.table import counts, findings_for, unreachable
from opsctl.engines.events import Emit, PhaseStarted, TaskResult, discard, one_at_a_time
from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet import gpus
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.placements import gateway, gateway_url

PROBE = Path(__file__).with_name("probe.py")
SAMPLES = 5  # commands that are timed; the median counts


def check_hosts(fleet: Fleet, hosts: Sequence[Host], emit: Emit = discard) -> dict[str, tuple[Finding, ...]]:
    """What is to be said of each host, in the order of ``hosts``; one that does not answer has one finding."""
    emit = one_at_a_time(emit)
    emit(PhaseStarted(f"Look at {len(hosts)} host{'s' if len(hosts) != 1 else ''}", tuple(host.name for host in hosts)))

    def look(session: Session) -> tuple[Finding, ...]:
        wanted = wanted_of(fleet, session.host)
        findings = findings_for(wanted.host, capture(session, wanted), wanted)
        emit(event_of(wanted.host, findings))
        return findings

    found: dict[str, tuple[Finding, ...]] = {}
    for name, answer in on_each(fleet, hosts, look).items():
        if isinstance(answer, OpsctlError):
            found[name] = (unreachable(answer, name),)
            emit(TaskResult(name, "preflight", "unreachable", answer.message))
        else:
            found[name] = answer
    return found


def capture(session: Session, wanted: Wanted) -> Captured:
    """What the probe says on one host, as root, and how long a command over SSH takes.

    Raises:
        OpsctlError: the host does not answer; ``check.no_python``, ``check.no_probe``: it does, and the probe does not.
    """
    samples = tuple(_seconds(session) for _ in range(SAMPLES + 1))[1:] if session.host.connection == "ssh" else ()
    return replace(ask_probe(session, wanted), command_s=samples)


def ask_probe(session: Session, wanted: Wanted, *, apt: bool = True, sudo: bool = True) -> Captured:
    """What the probe says, in one command. Without ``apt`` it does not wait for package sources that may be silent.

    Raises:
        OpsctlError: as ``capture``.
    """
    return Captured(ask(session, PROBE, {"gateway": wanted.gateway, "apt": apt}, "check", sudo=sudo), None)


def wanted_of(fleet: Fleet, host: Host) -> Wanted:
    """What inventory, services and bundle want of a host."""
    said = {key: ",".join(gpus.listed(host.variables.get(key))) for key in gpus.READ}
    own = fleet.package_source == "upstream" or gateway(fleet).name == host.name
    services = [service.name for service in fleet.services if service.group in host.groups]
    releases = [tuple(sizes(fleet.directory / "bundle" / "releases" / name)) for name in services]
    return Wanted(
        host.name, host.groups, fleet.package_source, "" if own else gateway_url(fleet), said[gpus.VERSION],
        said[gpus.FLAVOUR], said[gpus.MODEL], said[gpus.FABRIC_MANAGER] or "auto", host.gpus or (),
        sum(max(there, default=0) for there in releases), sum(min(there, default=0) for there in releases),
        gpus.source_of(host.variables))


def sizes(folder: Path) -> Iterator[int]:
    """Bytes of each release of a service in the bundle; one that cannot be read has none: verify tells."""
    for path in sorted(folder.glob(f"*/{manifests.MANIFEST}")):
        try:
            yield manifests.parse(path.read_bytes()).size
        except (RefusedError, OSError):
            continue


def event_of(host: str, findings: Sequence[Finding]) -> TaskResult:
    """What views hear of a host that has been judged."""
    total = counts(findings)
    words = ", ".join(f"{count} {verdict}" for verdict, count in total.items() if count)
    return TaskResult(host, "preflight", "failed" if total["fix"] else "ok", words)


def _seconds(session: Session, clock: Callable[[], float] = time.monotonic) -> float:
    began = clock()
    session.run(["true"], sudo=False, timeout_s=20.0)
    return clock() - began
