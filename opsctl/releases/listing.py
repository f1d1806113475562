"""What ``opsctl model list`` and ``verify`` show: releases here and on the gateway, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsctl.agent import ledger
from opsctl.agent.ledger import Line
from opsctl.agent.progress import Report
from opsctl.agent.trust import Signed
from opsctl.engines.session import Session
from opsctl.errors import OpsctlError, UsageError
from opsctl.fleet.model import Fleet
from opsctl.releases.remote import ask, has_agent
from opsctl.releases.store import folders_of, releases_of, verify_release


@dataclass(frozen=True)
class Listed:
    """``releases`` are rows; ``silence`` says why the gateway was not asked, empty when it was."""

    releases: list[dict[str, Any]]
    silence: str


def list_releases(fleet: Fleet, services: Sequence[str], bundle: Path) -> Listed:
    """Asks bundle and gateway. A gateway that does not answer is no error here."""
    here = {name: [stored.as_document() for stored in releases_of(bundle, name)] for name in services}
    there: dict[str, list[dict[str, Any]]] = {name: [] for name in services}
    lines: dict[str, tuple[Line, ...]] = {}
    silence = ""
    gateways = fleet.group("gateway")
    try:
        if not gateways:
            silence = "no host is in the group gateway"
        else:
            with Session(fleet, gateways[0]) as session:
                if not has_agent(session):
                    silence = "it is not provisioned yet"
                for name in services if not silence else ():
                    there[name] = ask(session, ["releases", "--service", name], host=gateways[0].name)["releases"]
                    shown = ask(session, ["ledger-show", "--service", name], host=gateways[0].name)["lines"]
                    lines[name] = tuple(map(ledger.line_of, shown))
    except OpsctlError as error:
        silence = error.message
    return Listed([row for name in services for row in rows(here[name], there[name], lines.get(name, ()))], silence)


def rows(here: Sequence[Mapping[str, Any]], there: Sequence[Mapping[str, Any]], lines: Sequence[Line]
         ) -> list[dict[str, Any]]:
    """One row a release of a service, oldest first. ``where`` is bundle, gateway or both. Pure.

    ``now`` is the one that ``lines`` of the ledger say should be served, ``bad`` those that they mark.
    """
    tip, bad = ledger.tip(lines), ledger.bad_digests(lines)
    found: dict[str, dict[str, Any]] = {}
    for where, releases in (("bundle", here), ("gateway", there)):
        for release in releases:
            digest = release["digest"]
            marks = {"now": tip is not None and digest == tip.digest, "bad": digest in bad}
            row = found.setdefault(digest, {**release, "where": [], **marks})
            row["where"] = [*row["where"], where]
    return sorted(found.values(), key=lambda row: (row["created"], row["version"]))


def verify_version(bundle: Path, service: str, version: str, allowed_signers: Path,
                   report: Callable[[str], Report]) -> tuple[Signed, ...]:
    """Verifies one version of the bundle.

    Raises:
        UsageError: there is no such version.
        RefusedError: unsigned, foreign signature, tampered, a file missing or too many.
    """
    folders = folders_of(bundle, service, version)
    if not folders:
        known = [stored.release.version for stored in releases_of(bundle, service)]
        raise UsageError("model.no_such_version", f"the bundle has no release {version} of {service}.",
                         hint="versions: " + (", ".join(known) or "none; opsctl model import makes one"))
    return tuple(verify_release(folder, allowed_signers, report(f"{service}/{folder.name}")) for folder in folders)
