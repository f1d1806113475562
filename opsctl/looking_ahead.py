"""``opsctl plan``: asks what a provision would do, and changes nothing. ``planning.py`` decides.

The checks are those of a provision, in its order: ports and placements, the bundle, who answers, what opsctl check
finds there, the releases, every role's preflight. Then Ansible's check mode on the roles that hosts have, and the tasks
themselves for the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opsctl.agent.ledger import line_of, tip
from opsctl.agent.trust import read_signed
from opsctl.bundle.verify import verify_bundle
from opsctl.checking import preflight
from opsctl.checking.model import Finding
from opsctl.engines.ansible import PlaybookOutcome, run_playbook
from opsctl.engines.events import Emit, Event, Note, PhaseStarted, TaskResult
from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.fleet.placements import clashes, place
from opsctl.fleet.placements import gateway as gateway_of
from opsctl.fleet.ssh_config import private_directory, write_ssh_config
from opsctl.planning import HostPlan, Plan, Step, checked_changes, first_changes, first_roles, marks, steps_of
from opsctl.provisioning import judge, limit_of
from opsctl.releases.ledger import Wanted, wanted
from opsctl.releases.remote import ask, has_agent
from opsctl.releases.staging import allowed_signers
from opsctl.releases.store import folders_of, releases_of
from opsctl.resolving import check_lock, warn_of_ended
from opsctl.resources import resource

REACH_TIMEOUT_S = 20.0
# One round trip: who am I, and which of these paths are not there?
LOOK = ["sh", "-c", 'id -un; for path in "$@"; do [ -e "$path" ] || echo "$path"; done', "look"]


@dataclass(frozen=True)
class Question:
    """What the operator asked. ``hosts`` are those that the limit left."""

    fleet: Fleet
    hosts: tuple[Host, ...]
    bundle: Path
    become_password: str | None = field(default=None, repr=False)
    allow_findings: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Found:
    """A host that answers: its login, the roles it never had, whether it has opsctl's programs."""

    login: str
    first: tuple[str, ...]
    agent: bool
    findings: tuple[Finding, ...]


def plan(question: Question, emit: Emit) -> Plan:
    """What a provision would do now.

    Raises:
        RefusedError: a check says no, as it would to a provision.
        ConfigurationError: inventory or services.yml are wrong.
    """
    fleet = question.fleet
    emit(PhaseStarted("Check the fleet and the bundle"))
    clashes(fleet)
    ssh_config = write_ssh_config(fleet)
    verify_bundle(question.bundle, fleet.directory / "trust" / "bundle.asc")
    emit(PhaseStarted("Look at the hosts", tuple(host.name for host in question.hosts)))
    answers = _reach(question)
    found = {name: answer for name, answer in answers.items() if isinstance(answer, Found)}
    reached = tuple(host for host in question.hosts if host.name in found)
    check_lock(fleet, reached, emit, datetime.now(UTC).date())
    warn_of_ended(reached, emit, datetime.now(UTC).date())
    preflight.tell({name: host.findings for name, host in found.items()}, question.allow_findings, emit)
    steps = _steps(question, found, emit)
    results: list[TaskResult] = []
    modules: dict[str, str] = {}
    if reached:
        runner = _Runner(question, ssh_config, emit)
        settled = tuple(host for host in reached if not {"base", "agent"} & set(found[host.name].first))
        bare = tuple(host for host in reached if host not in settled)
        if bare:
            runner.run("preflight.yml", bare)
        if settled:  # the preflight is its first play
            outcome = runner.run("site.yml", settled, {host.name: list(found[host.name].first) for host in settled})
            results, modules = runner.results, outcome.modules
    checked = checked_changes(results, modules)
    hosts = []
    for host in question.hosts:
        answer = answers[host.name]
        if isinstance(answer, OpsctlError):
            hosts.append(HostPlan(host.name, "unreachable", why=answer.message))
            continue
        fresh = "base" in answer.first
        changes = checked.get(host.name, ()) + first_changes(fleet, host, answer.first, answer.login)
        hosts.append(HostPlan(host.name, "fresh" if fresh else "provisioned", answer.first, changes))
    return Plan(tuple(hosts), steps)


class _Runner:
    """Playbooks in check mode. A listener hears phases and failures; what would change is kept for the plan."""

    def __init__(self, question: Question, ssh_config: Path, emit: Emit) -> None:
        self._question = question
        self._ssh_config = ssh_config
        self._emit = emit
        self.results: list[TaskResult] = []
        directory = question.fleet.directory / ".opsctl" / "plan"
        private_directory(directory)
        self._log = directory / "ansible.log"
        self._log.unlink(missing_ok=True)

    def run(self, playbook: str, hosts: Sequence[Host], to_come: Mapping[str, list[str]] | None = None
            ) -> PlaybookOutcome:
        fleet = self._question.fleet
        outcome = run_playbook(
            resource("playbooks") / playbook, fleet_directory=fleet.directory, inventory=fleet.inventory,
            ssh_config=self._ssh_config, log=self._log, emit=self._hear, limit=limit_of(fleet, hosts),
            become_password=self._question.become_password, check=True,
            variables={"opsctl_bundle": str(self._question.bundle), "opsctl_bundle_verified": "true",
                       "opsctl_roles_to_come": dict(to_come or {})})
        try:
            judge(outcome, self._log)
        except OpsctlError as error:  # nothing was changed, wherever it failed
            raise RefusedError("plan.refused", error.message, hint=f"mend it, then the same again; {self._log} has "
                               "all that Ansible said", log_tail=error.log_tail) from None
        return outcome

    def _hear(self, event: Event) -> None:
        if isinstance(event, TaskResult) and event.status == "changed":
            self.results.append(event)
        else:
            self._emit(event)


def _reach(question: Question) -> dict[str, Found | OpsctlError]:
    """What each host is, or why it does not answer.

    Raises:
        RefusedError: a foreign host key, a login that is refused, no way to become root: the first host's own error.
    """
    fleet = question.fleet

    def look(session: Session) -> Found:
        session.run(["true"], sudo=question.become_password is None, timeout_s=REACH_TIMEOUT_S)
        wanted_paths = [path for paths in marks(fleet, session.host).values() for path in paths]
        said = session.run([*LOOK, *wanted_paths], sudo=False, timeout_s=REACH_TIMEOUT_S)
        login, *lacking = said.stdout.splitlines() or [""]
        return Found(login, first_roles(fleet, session.host, lacking), has_agent(session),
                     preflight.look(session, fleet, sudo=question.become_password is None))

    answers = on_each(fleet, question.hosts, look)
    for answer in answers.values():
        if isinstance(answer, OpsctlError) and answer.code != "host.unreachable":
            raise answer
    return answers


def _steps(question: Question, found: Mapping[str, Found], emit: Emit) -> tuple[Step, ...]:
    """Publishing, staging and first starts, service by service."""
    fleet, gateway = question.fleet, gateway_of(question.fleet)
    steps: list[Step] = []
    told = {name for name, host in found.items() if host.agent or "inference" in host.first}
    for name in found.keys() - told:
        if any(one.host == name for one in place(fleet)):
            emit(Note("opsctl-host is gone: nobody can say what its instances serve", "warning", name))
    with Session(fleet, gateway) as session:
        try:
            known = has_agent(session)
        except RefusedError as error:
            if error.code != "host.unreachable":
                raise
            emit(Note("the gateway does not answer: nothing is known of releases", "warning", gateway.name))
            return ()
        for service in fleet.services:
            want, size = _wanted(question, session if known else None, service)
            if want is None:
                emit(Note(f"{service.name} has no release yet: opsctl model import, and first_release in services.yml"))
                continue
            if not want.on_gateway:
                steps.append(Step("publish", gateway.name, service.name, want.version, "", size))
            placements = [one for one in place(fleet) if one.service == service.name and one.host in told]
            asked = [fleet.host(name) for name in dict.fromkeys(one.host for one in placements) if found[name].agent]
            states, fetches = _ask_hosts(fleet, asked, want)
            steps += steps_of(placements, want, states, fetches, size)
    return tuple(steps)


def _ask_hosts(fleet: Fleet, hosts: Sequence[Host], want: Wanted
               ) -> tuple[dict[str, Mapping[str, Any]], dict[str, int]]:
    """Of hosts with an agent: their states, and the bytes that each would fetch of a release that is published."""

    def look(session: Session) -> tuple[Mapping[str, Any], int | None]:
        name = session.host.name
        state = ask(session, ["state", "--json"], host=name)
        if not want.on_gateway:
            return state, None
        verb = ["stage-plan", "--service", want.service, "--release", want.release]
        return state, int(ask(session, verb, host=name)["fetch_bytes"])

    states: dict[str, Mapping[str, Any]] = {}
    fetches: dict[str, int] = {}
    for name, answer in on_each(fleet, hosts, look).items():
        if isinstance(answer, OpsctlError):
            raise answer
        states[name], bytes_ = answer
        fetches |= {name: bytes_} if bytes_ is not None else {}
    return states, fetches


def _wanted(question: Question, session: Session | None, service: Service) -> tuple[Wanted | None, int | None]:
    """The release a service should have, and its size in bytes. Its signature is checked where it lies here.

    Raises:
        RefusedError: wanted and nowhere, unsigned, foreign, tampered.
    """
    gateway = gateway_of(question.fleet).name
    there: list[dict[str, Any]] = []
    lines = []
    if session is not None:
        there = ask(session, ["releases", "--service", service.name], host=gateway)["releases"]
        shown = ask(session, ["ledger-show", "--service", service.name], host=gateway)["lines"]
        lines = [line_of(line) for line in shown]
    here = [stored.as_document() for stored in releases_of(question.bundle, service.name)]
    try:
        want = wanted(service, lines, there, here)
    except RefusedError:
        last = tip(lines)
        for directory in folders_of(question.bundle, service.name, last.version if last else service.first_release):
            read_signed(directory, allowed_signers(question.fleet))  # it is there, and says what is wrong with it
        raise
    if want is None:
        return None, None
    for directory in folders_of(question.bundle, service.name, want.version):
        read_signed(directory, allowed_signers(question.fleet))
    sizes = [int(str(release["bytes"])) for release in (*there, *here) if release["digest"] == want.digest]
    return want, next(iter(sizes), None)
