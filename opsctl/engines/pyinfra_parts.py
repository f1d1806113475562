"""What pyinfra knows of a host: facts that parse ``opsctl-host``'s documents, operations that yield its commands.

Facts serve to find that there is nothing to do. When a fact cannot be had, or says that something is wrong, the
command is yielded all the same: the host itself says then what is the matter, in words of its own. The argument
vectors are pure functions. Imported by the worker alone, and by tests.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from pyinfra import host
from pyinfra.api import FactBase, FactProcessError, QuoteString, StringCommand, operation

from opsctl.agent.manifest import directory_name
from opsctl.releases.remote import HOST_PROGRAM

Document = Mapping[str, Any]
Commands = Generator[StringCommand, None, None]


def state_arguments() -> list[str]:
    return ["state", "--json"]


def stage_plan_arguments(service: str, release: str) -> list[str]:
    return ["stage-plan", "--service", service, "--release", release]


def stage_arguments(service: str, release: str, rate_limit: int = 0) -> list[str]:
    """``rate_limit``: bytes per second, 0 for none."""
    limit = ["--rate-limit", str(rate_limit)] if rate_limit else []
    return ["stage", "--service", service, "--release", release, *limit, "--wait-s", "0"]


def cutover_arguments(instance: str, release: str, from_release: str, owner: str = "",
                      min_speed_percent: int | None = None) -> list[str]:
    """``from_release``: the release it must be on now; empty for none, which is a first start."""
    drained_by = ["--owner", owner] if owner else []
    speed = ["--min-speed-percent", str(min_speed_percent)] if min_speed_percent is not None else []
    return ["cutover", instance, "--release", release, "--from", from_release or "none", *drained_by, *speed,
            "--wait-s", "0"]


def gc_arguments(service: str, keep: Sequence[str], *, dry_run: bool = False) -> list[str]:
    kept = [word for release in keep for word in ("--keep", release)]
    return ["gc", "--service", service, *kept, *["--dry-run"] * dry_run]


def command(arguments: Sequence[str]) -> StringCommand:
    """``opsctl-host`` with these arguments, each quoted by pyinfra."""
    return StringCommand(*(QuoteString(word) for word in (HOST_PROGRAM, *arguments)))


class HostDocument(FactBase[Document]):
    """A fact that is one JSON document."""

    abstract = True

    def process(self, output: list[str]) -> Document:
        try:
            document = json.loads("\n".join(output))
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise FactProcessError(f"not one JSON document: {output[:1]}")
        return document


class HostState(HostDocument):
    """``opsctl-host state``: instances, releases, drains."""

    def command(self) -> StringCommand:
        return command(state_arguments())


class StagePlan(HostDocument):
    """``opsctl-host stage-plan``: what staging would do. The gateway is asked only for what is not staged."""

    def command(self, service: str, release: str) -> StringCommand:
        return command(stage_plan_arguments(service, release))


class GarbagePlan(HostDocument):
    """``opsctl-host gc --dry-run``: what would be removed."""

    def command(self, service: str, keep: list[str]) -> StringCommand:
        return command(gc_arguments(service, keep, dry_run=True))


def is_staged(plan: Document | None) -> bool:
    """Whether a stage plan says that release and engine are there. Pure."""
    return bool(plan and plan.get("staged") and plan.get("engine_built"))


def serves_already(state: Document | None, instance: str, release: str) -> bool:
    """Whether a host's state says that an instance is on a release and nothing works on it. Pure."""
    return any(found["instance"] == instance and not found.get("unfinished") and found["digest"]
               and directory_name(found["release"], found["digest"]) == release
               for found in (state or {}).get("instances", ()))


def nothing_to_remove(plan: Document | None) -> bool:
    """Whether a garbage plan says that all of it stays. Pure. ``changed`` of a plan is never true."""
    return plan is not None and "removed" in plan and not any(plan.get(key) for key in ("removed", "engines", "bytes"))


@operation()
def stage(service: str, release: str, rate_limit: int = 0) -> Commands:
    """Begins to bring a release and its engine to a host, or finds that going on.

    ``rate_limit``: bytes per second, 0 for none.
    """
    if is_staged(_known(StagePlan, service=service, release=release)):
        host.noop(f"{release} of {service} is staged, its engine is built")
        return
    yield command(stage_arguments(service, release, rate_limit))


@operation()
def cutover(instance: str, release: str, from_release: str, owner: str = "", min_speed_percent: int | None = None
            ) -> Commands:
    """Begins to move an instance from a release to another, or finds that going on."""
    if serves_already(_known(HostState), instance, release):
        host.noop(f"{instance} is on {release}")
        return
    yield command(cutover_arguments(instance, release, from_release, owner, min_speed_percent))


@operation()
def gc(service: str, keep: Sequence[str] = ()) -> Commands:
    """Removes the releases of a service that no instance points at, all but those to keep."""
    if nothing_to_remove(_known(GarbagePlan, service=service, keep=list(keep))):
        host.noop(f"nothing of {service} is to be removed")
        return
    yield command(gc_arguments(service, keep))


def _known(fact: type[HostDocument], **arguments: Any) -> Document | None:
    """What a fact says, None when it cannot be had: a fact that fails would take its host out of the run."""
    return host.get_fact(fact, **arguments, _ignore_errors=True)
