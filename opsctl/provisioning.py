"""What ``opsctl provision`` does, in order: look, refuse or go; Ansible; then the first start of what never served.

``judge`` decides the outcome of a playbook (pure); the rest is I/O in the order a person would do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opsctl.bundle.verify import verify_bundle
from opsctl.checking import preflight
from opsctl.checking.model import Finding
from opsctl.engines.ansible import Failure, PlaybookOutcome, run_playbook
from opsctl.engines.events import Emit, Note, PhaseStarted
from opsctl.engines.session import Session, on_each
from opsctl.errors import MixedError, OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.monitoring import remarks
from opsctl.fleet.placements import clashes
from opsctl.fleet.ssh_config import write_ssh_config
from opsctl.releases.first_start import bring_up, check_releases
from opsctl.releases.remote import unreachable
from opsctl.resolving import check_lock, warn_of_ended
from opsctl.resources import resource
from opsctl.runs.journal import Run
from opsctl.watching import Watch

PREFLIGHT_PLAY = "Preflight"
REACH_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Request:
    """What the operator asked for. ``hosts`` are those the limit left; ``skip_unreachable`` counts hosts."""

    fleet: Fleet
    hosts: tuple[Host, ...]
    bundle: Path
    skip_unreachable: int = 0
    become_password: str | None = field(default=None, repr=False)
    allow_findings: frozenset[str] = frozenset()  # ids of opsctl check that are no reason to refuse


def provision(request: Request, run: Run, emit: Emit) -> dict[str, Any]:
    """Brings the fleet to what inventory and services.yml say. Zero changes when it is there already.

    Returns a document: ``run``, ``changed`` (a count), ``changes`` (host and task of each), ``hosts`` (Ansible's
    counts), ``skipped`` (names), ``instances`` (host, instance, release, state).

    Raises:
        RefusedError: a check said no; nothing was changed.
        MixedError: some hosts were changed and some failed.
    """
    fleet = request.fleet
    emit(PhaseStarted("Check the fleet and the bundle"))
    clashes(fleet)
    ssh_config = write_ssh_config(fleet)
    # with package_source=upstream too: the agent's wheel comes from the bundle, and root installs it
    verify_bundle(request.bundle, fleet.directory / "trust" / "bundle.asc")
    reached, skipped, findings = _reach(request, emit)
    check_lock(fleet, reached, emit, datetime.now(UTC).date())
    warn_of_ended(reached, emit, datetime.now(UTC).date())
    preflight.tell(findings, request.allow_findings, emit)
    check_releases(fleet, emit, bundle=request.bundle)
    # only root may ask who holds a lock
    by_root = request.become_password is None
    watch: AbstractContextManager[Emit] = Watch(fleet, reached, emit) if by_root else nullcontext(emit)
    with watch as hear:
        outcome = run_playbook(
            resource("playbooks") / "site.yml", fleet_directory=fleet.directory, inventory=fleet.inventory,
            ssh_config=ssh_config, log=run.directory / "ansible.log", emit=hear, limit=limit_of(fleet, reached),
            become_password=request.become_password,
            variables={"opsctl_bundle": str(request.bundle), "opsctl_bundle_verified": "true"},
        )
    judge(outcome, run.directory / "ansible.log")
    for sentence in remarks(fleet):
        emit(Note(sentence, "warning"))
    run.about_to()
    try:
        served = bring_up(fleet, emit, hosts=reached, bundle=request.bundle, run=run.name)
    except RefusedError as error:
        raise error if not outcome.changed else after_changes(error) from None
    return {
        "run": run.name,
        "changed": len(outcome.changed) + served["changed"],
        "changes": [{"host": host, "task": task} for host, task in outcome.changed],
        "hosts": outcome.stats,
        "skipped": [host.name for host in skipped],
        "instances": served["instances"],
    }


def limit_of(fleet: Fleet, hosts: Sequence[Host]) -> tuple[str, ...]:
    """Ansible's ``--limit`` for these hosts: empty when they are all of the fleet."""
    return () if len(hosts) == len(fleet.hosts) else tuple(host.name for host in hosts)


def judge(outcome: PlaybookOutcome, log: Path) -> None:
    """Says nothing when every host is well.

    Raises:
        RefusedError: the preflight failed, so nothing was changed.
        MixedError: a task failed after the preflight.
    """
    if not outcome.failures:
        if outcome.exit_code:
            raise MixedError("ansible.ended", f"ansible-playbook ended with exit code {outcome.exit_code} in "
                             f"{outcome.phase}, and no task had failed.",
                             hint=f"all it said is in {log}; then run the same command again")
        return
    # a role whose unit does not start fails twice: systemd's word first, then the unit's own lines, which tell more
    first = [failure for failure in outcome.failures if failure.host == outcome.failures[0].host][-1]
    others = sorted({failure.host for failure in outcome.failures} - {first.host})
    also = f" (also on {', '.join(others)})" if others else ""
    sentence = f"{first.host}: {first.task.rstrip('.')}: {_reason(first)}{also}"
    if first.phase == PREFLIGHT_PLAY and not outcome.changed:
        raise RefusedError("provision.preflight", sentence, hint="nothing was changed; mend it and run the same again",
                           log_tail=first.detail)
    raise MixedError("provision.failed", sentence,
                     hint="what was done stays done: mend the cause and run the same command again",
                     log_tail=first.detail)


def after_changes(error: OpsctlError) -> MixedError:
    """A refusal that came when hosts had been changed already is none: exit 5 promises that nothing was."""
    return MixedError(error.code, error.message, hint=error.hint, log_tail=error.log_tail)


def _reason(failure: Failure) -> str:
    if failure.unreachable:
        return f"the host stopped answering ({failure.message})" if failure.message else "the host stopped answering"
    return failure.message or "failed"


def _reach(request: Request, emit: Emit
           ) -> tuple[tuple[Host, ...], tuple[Host, ...], dict[str, tuple[Finding, ...]]]:
    """Hosts that answer over SSH, hosts left out, and what is to be said of those that answer, over one connection.

    Refuses when more are silent than were allowed to be.

    Raises:
        RefusedError: unreachable hosts, a foreign host key, no way to become root: the first host's own error.
    """

    def knock(session: Session) -> tuple[Finding, ...]:
        session.run(["true"], sudo=request.become_password is None, timeout_s=REACH_TIMEOUT_S)
        return preflight.look(session, request.fleet, sudo=request.become_password is None)

    emit(PhaseStarted("Look at the hosts", tuple(host.name for host in request.hosts)))
    answers = on_each(request.fleet, request.hosts, knock)
    silent = {name: answer for name, answer in answers.items() if isinstance(answer, OpsctlError)}
    for error in silent.values():
        if error.code != "host.unreachable":
            raise error
    if len(silent) > request.skip_unreachable:
        raise unreachable(silent)
    for name, error in silent.items():
        emit(Note(f"left out: {error.message}", "warning", name))
    return (tuple(host for host in request.hosts if host.name not in silent),
            tuple(host for host in request.hosts if host.name in silent),
            {name: answer for name, answer in answers.items() if not isinstance(answer, OpsctlError)})
