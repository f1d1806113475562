"""Staging: a release and its engine to hosts, ahead of any change of what they serve. ``stage_release`` orders it.

The host decides what is to be done (``opsctl-host stage-plan``) and does it in a unit of its own; here hosts are asked,
what does not fit is refused before the first byte, orders go out through pyinfra, and the jobs are watched. Whoever is
killed meanwhile leaves the units running, and the same command again finds them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsctl.agent.manifest import directory_name, split_directory_name
from opsctl.agent.pace import LEAST_BYTES_PER_S
from opsctl.engines.events import Emit, Note, PhaseStarted, TaskResult, one_at_a_time
from opsctl.engines.pyinfra import HostFacts, Order, Worker, carry_out, gather
from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError, PausedError, RefusedError, UsageError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.fleet.placements import gateway as gateway_of
from opsctl.releases.publish import publish
from opsctl.releases.remote import ask, unreachable
from opsctl.releases.store import releases_of, reporting, verify_release
from opsctl.releases.watch import LOST, OUT_OF_REACH, watch

WATCHERS = 128  # hosts that are watched at once; more are staged all the same
BOOTS = 3  # of a host while it stages; it goes on after each but the last
RATE = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>[KMGT])(B(/s)?)?", re.IGNORECASE)
UNITS = {"K": 10 ** 3, "M": 10 ** 6, "G": 10 ** 9, "T": 10 ** 12}

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """A release of a service, wherever it lies. ``size``: bytes of its files."""

    service: str
    version: str
    digest: str
    on_gateway: bool
    size: int

    @property
    def release(self) -> str:
        """``v2-0123456789ab``."""
        return directory_name(self.version, self.digest)


def bytes_per_second(text: str) -> int:
    """``200M``, ``1.5G`` and ``800K`` as bytes per second; 0, no limit, for an empty text. Pure.

    Raises:
        UsageError: ``stage.bad_rate``.
    """
    if not text:
        return 0
    match = RATE.fullmatch(text.strip())
    rate = int(float(match["number"]) * UNITS[match["unit"].upper()]) if match else 0
    if rate < LEAST_BYTES_PER_S:
        raise UsageError("stage.bad_rate", f"--rate-limit {text} is no rate of bytes per second.",
                         hint="a number with K, M or G: 200M is 200 million bytes per second on each host")
    return rate


def find_release(fleet: Fleet, session: Session | None, service: Service, version: str, *, bundle: Path | None = None
                 ) -> Found:
    """The release of a version (``v3``, ``v3-0123456789ab``): on the gateway, which ``session`` asks, or in the bundle.

    Raises:
        UsageError: there is none of that name; the hint lists those there are.
        RefusedError: the bundle's is another than the gateway's.
    """
    here = [stored.as_document() for stored in releases_of(_bundle(fleet, bundle), service.name)]
    there: list[Document] = []
    if session is not None:
        listed = ask(session, ["releases", "--service", service.name], host=session.host.name)["releases"]
        there = [release for release in listed if release["complete"]]
    return choose(service.name, version, there, here)


def choose(service: str, version: str, there: Sequence[Document], here: Sequence[Document]) -> Found:
    """``find_release`` among the documents of gateway and bundle. Pure."""
    known = [*there, *here]
    fitting = {release["digest"]: release for release in known
               if version in (release["version"], directory_name(release["version"], release["digest"]))}
    if not fitting:
        versions = ", ".join(dict.fromkeys(str(release["version"]) for release in known))
        raise UsageError("release.no_such_version", f"there is no release {version} of {service}, neither on the "
                         "gateway nor in the bundle.", hint=f"versions: {versions or 'none; opsctl model import'}")
    if len(fitting) > 1:
        raise RefusedError("release.version_taken", f"{service} {version} on the gateway is another than in the "
                           "bundle.", hint="name one of them whole: " + ", ".join(
                               directory_name(release["version"], digest) for digest, release in fitting.items()))
    digest, release = next(iter(fitting.items()))
    return Found(service, release["version"], digest, any(one["digest"] == digest for one in there), release["bytes"])


def stage_release(fleet: Fleet, hosts: Sequence[Host], service: Service, release: str, emit: Emit, *,
                  rate_limit: int = 0, bundle: Path | None = None, skip_unreachable: int = 0) -> list[dict[str, Any]]:
    """Stages a release (``v2-0123456789ab``) on hosts, all at once, and waits for it. Nothing to do changes nothing.

    Publishes it from the bundle when hosts need it and the gateway lacks it. ``rate_limit``: bytes per second on each
    host. A row a host: ``host``, ``release``, ``changed``, ``fetched_bytes``, ``linked_files``, ``engine_built`` (now),
    and ``skipped``, why it was left out.

    Raises:
        RefusedError: hosts are silent, or it does not fit: no byte was brought to any host. Or all that failed were
            refused: a file was corrupted, say. What serves is untouched in every case.
        OpsctlError: hosts failed; the others have it staged.
    """
    emit = one_at_a_time(emit)
    version, _ = split_directory_name(release)
    what = f"stage {service.name} {version}"
    with Worker() as worker:
        plans, skipped = _reached(_plans(fleet, hosts, service, release, emit, bundle, worker), skip_unreachable, emit)
        check_space(plans, service.name, version)
        todo = [host for host in hosts if host.name in plans and not _is_done(plans[host.name])]
        answers = _carry_out(fleet, todo, service, release, rate_limit, what, emit, worker) if todo else {}
    results: dict[str, Document] = {}
    errors: dict[str, OpsctlError] = {}
    for name, answer in answers.items():
        if isinstance(answer, OpsctlError):
            errors[name] = answer
            emit(TaskResult(name, what, "failed", answer.message, answer.log_tail))
        else:
            results[name] = answer
            emit(TaskResult(name, what, "changed" if answer["changed"] else "ok"))
    if errors:
        raise _failure(list(errors.values()), [name for name in plans if name not in errors])
    return [_row(host.name, release, results.get(host.name, {}), skipped.get(host.name, "")) for host in hosts]


def check_space(plans: Mapping[str, Document], service: str, version: str) -> None:
    """Refuses a release that does not fit on some host, by their stage plans. Pure.

    Raises:
        RefusedError: ``host.disk_full``, naming each such host, what it would fetch and what it has.
    """
    lacking = {name: plan for name, plan in plans.items() if not plan["fits"]}
    if not lacking:
        return
    words = "; ".join(f"{name} would fetch {_megabytes(plan['fetch_bytes'])} and has {_megabytes(plan['free_bytes'])} "
                      "free" for name, plan in lacking.items())
    raise RefusedError("host.disk_full", f"{service} {version} does not fit: {words}; no byte was brought anywhere.",
                       hint=f"opsctl gc makes room; df -h /srv there; --limit '!{next(iter(lacking))}' goes on without")


def bring_to_gateway(fleet: Fleet, session: Session, gateway: Host, service: str, release: str, bundle: Path,
                     emit: Emit) -> bool:
    """Verifies a release of the bundle and publishes it; False when the gateway had it.

    Raises:
        RefusedError: it is not in the bundle either, or not to be trusted.
    """
    version, _ = split_directory_name(release)
    stored = next((one for one in releases_of(bundle, service) if one.name == release), None)
    if stored is None:
        raise RefusedError("release.missing", f"{service} {release} is neither on the gateway nor in {bundle}.",
                           hint=f"opsctl model import DIR|FILE|URL --service {service} --version {version}")
    emit(PhaseStarted(f"Publish {service} {version}", (gateway.name,)))
    verified(fleet, stored.directory, emit)
    sent = publish(session, stored, emit, host=gateway.name)
    emit(TaskResult(gateway.name, f"publish {service} {version}", "changed" if sent else "ok"))
    return sent


def verified(fleet: Fleet, directory: Path, emit: Emit) -> None:
    """Checks signature, manifest and every file of a release in the bundle.

    Raises:
        RefusedError: as ``store.verify_release``.
    """
    verify_release(directory, allowed_signers(fleet), reporting(emit, f"verifying {directory.name}"))


def allowed_signers(fleet: Fleet) -> Path:
    """The keys whose releases this fleet takes."""
    return fleet.directory / "trust" / "allowed_signers"


def _plans(fleet: Fleet, hosts: Sequence[Host], service: Service, release: str, emit: Emit, bundle: Path | None,
           worker: Worker) -> dict[str, Document | OpsctlError]:
    """Each host's stage plan; the release is published first if that is what a host says it lacks."""
    key = (service.name, release)

    def ask_all() -> dict[str, Document | OpsctlError]:
        worker.prepare()
        facts = gather(fleet, hosts, plans=[key], worker=worker)
        worker.prepare()  # the next one imports while this is thought over
        return {name: fact.stage_plans[key] if isinstance(fact, HostFacts) else fact for name, fact in facts.items()}

    version, _ = split_directory_name(release)
    emit(PhaseStarted(f"Look at {service.name} {version} on hosts", tuple(host.name for host in hosts)))
    found = ask_all()
    if any(isinstance(plan, OpsctlError) and plan.code == "release.not_on_gateway" for plan in found.values()):
        gateway = gateway_of(fleet)
        with Session(fleet, gateway) as session:
            bring_to_gateway(fleet, session, gateway, service.name, release, _bundle(fleet, bundle), emit)
        found = ask_all()
    return found


def _reached(found: Mapping[str, Document | OpsctlError], skip_unreachable: int, emit: Emit
             ) -> tuple[dict[str, Document], dict[str, str]]:
    """The plans of hosts that answered, and why others are left out.

    Raises:
        OpsctlError: more hosts are silent than were allowed to be, or one has another trouble: its own error.
    """
    silent: dict[str, OpsctlError] = {}
    for name, plan in found.items():
        if isinstance(plan, OpsctlError):
            if plan.code not in OUT_OF_REACH:
                raise plan
            silent[name] = plan
    if len(silent) > skip_unreachable:
        raise unreachable(silent)
    for name, error in silent.items():
        emit(Note(f"left out: {error.message}", "warning", name))
    plans = {name: plan for name, plan in found.items() if not isinstance(plan, OpsctlError)}
    return plans, {name: error.message for name, error in silent.items()}


def _carry_out(fleet: Fleet, hosts: Sequence[Host], service: Service, release: str, rate_limit: int, what: str,
               emit: Emit, worker: Worker) -> dict[str, Document | OpsctlError]:
    """Begins staging on hosts and watches it to its end: each host's result, or its error."""
    emit(PhaseStarted(what.capitalize(), tuple(host.name for host in hosts)))
    where = {"service": service.name, "release": release}
    orders = [Order(host.name, "stage", {**where, "rate_limit": rate_limit}) for host in hosts]
    begun = {key[0]: answer for key, answer in carry_out(fleet, orders, emit, worker=worker).items()}
    look = ["stage-status", "--service", service.name, "--release", release]

    def one(session: Session) -> Document:
        name = session.host.name
        first = begun[name]
        for left in reversed(range(BOOTS)):
            if isinstance(first, OpsctlError):
                raise first
            try:
                return watch(session, look, what, emit, first=first)
            except OpsctlError as error:
                if error.code != LOST or not left:
                    raise
            emit(Note(f"{what} was cut off, its host booted most likely: it goes on where it was", "warning", name))
            first = next(iter(carry_out(fleet, [order for order in orders if order.host == name], emit).values()))
        raise AssertionError  # not reached: the last one raises or returns

    return on_each(fleet, hosts, one, workers=WATCHERS)


def _failure(errors: Sequence[OpsctlError], well: Sequence[str]) -> OpsctlError:
    """One error for hosts that failed, of their kind when they are all of one kind. Serving is as it was."""
    first = errors[0]
    kind = type(first) if len({type(error) for error in errors}) == 1 else OpsctlError
    if all(error.code in (*OUT_OF_REACH, LOST) for error in errors):
        kind = PausedError  # they had begun, and what was brought stays
    others = f" ({len(errors)} hosts failed)" if len(errors) > 1 else ""
    rest = f"; staged on {', '.join(well)}" if well else ""
    return kind(first.code, f"{first.message.rstrip('.')}{others}{rest}; what serves is untouched.",
                hint=first.hint or "mend it and run the same command again", log_tail=first.log_tail)


def _is_done(plan: Document) -> bool:
    return bool(plan["staged"] and plan["engine_built"])


def _row(host: str, release: str, result: Document, skipped: str) -> dict[str, Any]:
    return {"host": host, "release": release, "changed": bool(result.get("changed")),
            "fetched_bytes": int(result.get("fetched_bytes", 0)), "linked_files": int(result.get("linked_files", 0)),
            "engine_built": bool(result.get("environment_built")), "skipped": skipped}


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _bundle(fleet: Fleet, bundle: Path | None) -> Path:
    return (bundle or fleet.directory / "bundle").absolute()
