"""What is true of a fleet that is well: whom to ask what, and what the answers have to be. Pure.

The tests themselves stand in ``tests/acceptance``; ``accepting.py`` runs them. Each test says one sentence of one
``Target``, and a test that fails raises ``Wrong``: what was expected, what is there, what to type.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import jinja2

from opsctl.agent.ledger import Line, tip
from opsctl.fleet.model import AGENT_CHECK_PORT, BUNDLE_PORT, Fleet, Host, Placement
from opsctl.fleet.placements import backends, gateway, gateway_url, place
from opsctl.planning import roles_for
from opsctl.resources import resource
from opsctl.role_tasks import defaults_of, holds_of, packages_of

Kind = Literal["host", "unit", "package", "hold", "instance", "balancer", "server", "endpoint", "monitor"]
Verdict = Literal["good", "wrong", "warning", "skipped"]
UNITS = {"agent": ("opsctl-recover.service", "opsctl-setter.service", "opsctl-agent.service"),
         "gateway": ("nginx.service",),
         "load_balancer": ("haproxy.service",), "node_exporter": ("prometheus-node-exporter.service",),
         "monitoring": ("prometheus.service", "prometheus-alertmanager.service")}
TIME_SERVICES = ("systemd-timesyncd", "chrony", "chronyd", "ntpsec", "ntp", "ntpd", "openntpd")
PROVISION = "opsctl provision"


class Wrong(AssertionError):  # noqa: N818 - reads as a word: raise Wrong
    """Something is not as it should be."""

    def __init__(self, expected: str, found: str, hint: str = PROVISION) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected, self.found, self.hint = expected, found, hint


class Doubtful(Exception):  # noqa: N818 - a warning, and no error
    """Nothing is wrong, and yet an operator would want to know."""


@dataclass(frozen=True)
class Target:
    """What one test is about. ``what`` is a unit, a package, an instance, a server or a service."""

    host: str
    what: str = ""
    service: str = ""
    port: int = 0
    placement: Placement | None = None


@dataclass(frozen=True)
class Check:
    """The end of one test; ``check`` is its sentence, without the host."""

    host: str
    check: str
    verdict: Verdict
    expected: str = ""
    found: str = ""
    hint: str = ""


def targets(fleet: Fleet, hosts: Sequence[Host], kind: Kind) -> list[Target]:
    """Whom the tests of one kind ask, in the inventory's order."""
    found: dict[Kind, Callable[[Host], list[Target]]] = {
        "host": lambda host: [Target(host.name)],
        "unit": lambda host: [Target(host.name, unit) for role in roles_for(fleet, host)
                              for unit in UNITS.get(role, ())],
        "package": lambda host: [Target(host.name, name) for role in roles_for(fleet, host)
                                 for name in packages_of(role)],
        "hold": lambda host: [Target(host.name, name) for role in roles_for(fleet, host) for name in holds_of(role)],
        "instance": lambda host: [Target(host.name, one.instance, one.service, one.port, one) for one in place(fleet)
                                  if one.host == host.name],
        "balancer": lambda host: [Target(host.name)] if balances(fleet, host) else [],
        "server": lambda host: [Target(host.name, f"{one.host}.{one.instance}", one.service, one.port, one)
                                for one in place(fleet)] if balances(fleet, host) else [],
        "endpoint": lambda host: [Target(host.name, service.name, service.name, service.listen)
                                  for service in fleet.services] if balances(fleet, host) else [],
        "monitor": lambda host: [Target(host.name)] if "monitoring" in roles_for(fleet, host) else [],
    }
    return [target for host in hosts for target in found[kind](host)]


def balances(fleet: Fleet, host: Host) -> bool:
    return "load_balancer" in roles_for(fleet, host)


def versions_in(index: str) -> dict[str, set[str]]:
    """By package, the versions in the text of a ``Packages`` file."""
    found: dict[str, set[str]] = {}
    name = ""
    for line in index.splitlines():
        key, _, value = line.partition(": ")
        if key == "Package":
            name = value.strip()
        elif key == "Version":
            found.setdefault(name, set()).add(value.strip())
    return found


def check_hold(package: str, selection: str, version: str, bundle: Mapping[str, set[str]] | None) -> None:
    """``selection`` and ``version`` are dpkg's (``hold``; empty: not installed). ``bundle``: None when it is not used.

    Raises:
        Wrong: it may be upgraded by somebody else, or was.
    """
    if selection != "hold":
        raise Wrong(f"{package} on hold, so that only opsctl upgrades it", selection or "not known to dpkg")
    if version and bundle is not None and version not in bundle.get(package, set()):
        has = ", ".join(sorted(bundle.get(package, ()))) or "none"
        raise Wrong(f"the bundle's version of {package}: {has}", version,
                    f"APT_CONFIG=/etc/opsctl/apt.conf apt-get install --allow-downgrades --allow-change-held-packages "
                    f"{package} on that host; or bring the bundle up to date")


def expected_placement(placement: Placement) -> dict[str, Any]:
    """What the placement's file on the host says."""
    table = dataclasses.asdict(placement)
    del table["host"]
    return {**table, "gpus": list(placement.gpus)}


def check_placements(wanted: Sequence[Placement], found: Mapping[str, Mapping[str, Any]], *, undealt: bool = False
                     ) -> None:
    """``found``: the table in each file, by instance; ``undealt``: nobody here knows the GPUs that they are to have.

    Raises:
        Wrong: one lacks, is left over, or says something else.
    """
    names = {placement.instance for placement in wanted}
    if names != set(found):
        raise Wrong(f"placements of {_names(names)}", f"placements of {_names(found)}")
    for placement in wanted:
        table = expected_placement(placement)
        if undealt:
            raise Wrong(f"GPUs of {placement.host} in gpus.yml", "none", "bring gpus.yml of the last provision here, "
                        "from git; or opsctl provision, which finds them")
        for key, value in table.items():
            there = found[placement.instance].get(key)
            if there != value:
                raise Wrong(f"{placement.instance}: {key} = {value!r}", f"{key} = {there!r}")


def check_release(instance: Mapping[str, Any], lines: Sequence[Line]) -> None:
    """``instance``: of ``opsctl-host state``. Raises Wrong when it serves another release than the ledger's."""
    last = tip(lines)
    if last is None or instance["digest"] == last.digest:
        return
    if not instance["release"]:
        raise Wrong(f"release {last.version}, as the ledger says", "no release")
    raise Wrong(f"release {last.version}, as the ledger says", f"release {instance['release']}",
                f"opsctl update-model --version {last.version}")


def check_voice(instance: Mapping[str, Any], drains: Sequence[Mapping[str, Any]]) -> None:
    """The agent says the least weight of all drains. Raises Wrong when it says something else, or nothing."""
    weight = min((int(drain["weight"]) for drain in drains if drain["instance"] == instance["instance"]), default=100)
    if instance["voice"] != f"up {weight}%":
        raise Wrong(f"the agent's word on port {AGENT_CHECK_PORT}: up {weight}%", instance["voice"] or "no word")


def check_server(server: str, rows: Sequence[Mapping[str, Any]], weight: int) -> None:
    """``rows``: of ``opsctl-host balancer``; ``weight``: what its drains leave it. Raises Wrong unless it is UP."""
    row = next((row for row in rows if row["server"] == server), None)
    if row is None:
        raise Wrong(f"{server} among HAProxy's servers", "no such server")
    drained = weight == 0 and row["status"].startswith(("UP", "DRAIN"))
    if not drained and not (row["status"].startswith("UP") and row["weight"] > 0):
        raise Wrong(f"{server} UP with a weight", f"{row['status']}, weight {row['weight']}, agent check "
                    f"{row['agent'] or 'not done yet'}", "opsctl status; HAProxy's statistics (port 8404) tell why")


def check_clock(said: Mapping[str, str], services: Iterable[str]) -> None:
    """``said``: ``timedatectl show``; ``services``: the time services that run.

    Raises:
        Wrong: a time service runs, and the clock is not synchronised.
        Doubtful: none runs.
    """
    running = tuple(services)
    if not running:
        raise Doubtful("no time service runs: the clock is whatever it is")
    if said.get("NTPSynchronized") != "yes":
        raise Wrong("a synchronised clock", f"{running[0]} runs, and the clock is not synchronised",
                    "timedatectl timesync-status, or chronyc sources, on that host")


def properties(text: str) -> dict[str, str]:
    """``KEY=value`` lines."""
    return {key: value for key, mark, value in (line.partition("=") for line in text.splitlines()) if mark}


def first_difference(wanted: str, found: str) -> tuple[str, str]:
    """The first line that differs, on both sides, with its number."""
    left, right = wanted.splitlines(), found.splitlines()
    for number in range(max(len(left), len(right))):
        one, other = (side[number] if number < len(side) else "the end" for side in (left, right))
        if one != other:
            return f"line {number + 1}: {one.strip()}", f"line {number + 1}: {other.strip()}"
    return "", ""


def haproxy_configuration(fleet: Fleet, host: Host) -> str:
    """The text that role load_balancer writes on this host. The inventory may set the role's own variables."""
    made = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
                              autoescape=False)  # noqa: S701 - a configuration file
    made.filters["urlsplit"] = lambda url, part: getattr(urlsplit(url), part)
    own = {key: value for key, value in host.variables.items() if key.startswith("load_balancer_")}
    text = (resource("templates") / "haproxy.cfg.j2").read_text(encoding="utf-8")
    return made.from_string(text).render(**{
        **defaults_of("load_balancer"), **own,
        "load_balancer_services": backends(fleet),
        "load_balancer_addresses": list(dict.fromkeys([host.service_address, "127.0.0.1"])),
        "load_balancer_management_addresses": list(dict.fromkeys([host.management_address, "127.0.0.1"])),
    })


def release_file(fleet: Fleet, codename: str, asker: Host) -> tuple[str, int, str]:
    """Address, port and path of the signed ``InRelease`` that a host takes packages by."""
    own = gateway(fleet).name == asker.name
    address = "127.0.0.1" if own else str(urlsplit(gateway_url(fleet)).hostname)
    return address, BUNDLE_PORT, f"/apt/dists/{codename}/InRelease"


def counted(checks: Sequence[Check]) -> dict[str, int]:
    return {verdict: sum(check.verdict == verdict for check in checks)
            for verdict in ("good", "wrong", "warning", "skipped")}


def as_document(checks: Sequence[Check]) -> dict[str, Any]:
    """For ``--json``: every check, and how many there are of each verdict."""
    return {"checks": [dataclasses.asdict(check) for check in checks], **counted(checks)}


def sentence(template: str, target: Target) -> str:
    """A test's sentence of one target; also the id by which pytest knows the test."""
    return template.format(what=target.what, port=target.port, service=target.service)


def chunks(hosts: Sequence[Host], most: int, size: int) -> Iterator[tuple[Host, ...]]:
    """Hosts for one process each: no more than ``most`` processes, and no more of them than are worth starting."""
    step = max(size, -(-len(hosts) // most))
    for start in range(0, len(hosts), step):
        yield tuple(hosts[start:start + step])


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nobody"


VERSION = re.compile(r'^VERSION_CODENAME="?([a-z]+)"?$', re.MULTILINE)


def codename_in(os_release: str) -> str:
    """``bookworm``, from the text of /etc/os-release; empty when it does not say."""
    found = VERSION.search(os_release)
    return found[1] if found else ""
