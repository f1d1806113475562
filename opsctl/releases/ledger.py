"""Which release a service should have, from ledger, services.yml, gateway and bundle. Pure.

The ledger itself (lines, tip, consistency) is the gateway's: ``opsctl.agent.ledger``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsctl.agent.ledger import Line, tip
from opsctl.agent.manifest import directory_name
from opsctl.errors import RefusedError
from opsctl.fleet.model import Service

__all__ = ["Line", "Wanted", "tip", "wanted"]


@dataclass(frozen=True)
class Wanted:
    """The release that a service should serve. ``lines`` of the ledger name it or, 0, none does yet."""

    service: str
    version: str
    digest: str
    on_gateway: bool
    lines: int

    @property
    def release(self) -> str:
        return directory_name(self.version, self.digest)


def wanted(service: Service, lines: Sequence[Line], gateway: Sequence[Mapping[str, Any]],
           bundle: Sequence[Mapping[str, Any]]) -> Wanted | None:
    """What the ledger's last word is; of an empty ledger, ``first_release``; None when neither says anything.

    ``gateway`` and ``bundle`` list releases: ``version``, ``digest``, ``complete``.

    Raises:
        RefusedError: it is wanted and nowhere, or the bundle's is another than the gateway's.
    """
    there = [release for release in gateway if release["complete"]]
    here = list(bundle)  # one that lost a file is refused with its name, later
    last = tip(lines)
    if last is not None:
        version, digest = last.version, last.digest
    elif service.first_release:
        version = service.first_release
        digests = {str(release["digest"]) for release in (*there, *here) if release["version"] == version}
        if len(digests) > 1:
            raise RefusedError("release.version_taken", f"{service.name} {version} on the gateway is another than in "
                               "the bundle.", hint="import yours under another version, and say so in first_release")
        digest = next(iter(digests), "")
    else:
        return None
    on_gateway = any(release["digest"] == digest for release in there)
    if not on_gateway and all(release["digest"] != digest for release in here):
        said = "the ledger" if last else "first_release in services.yml"
        raise RefusedError("release.missing", f"{said} wants {service.name} {version}, and it is neither in the bundle "
                           "nor on the gateway.",
                           hint=f"opsctl model import DIR|FILE|URL --service {service.name} --version {version}")
    return Wanted(service.name, version, digest, on_gateway, len(lines))
