"""What holds for the GPUs of a host: the exporter answers and can be believed, and each instance has its own GPUs."""

from __future__ import annotations

import pytest

from opsctl.fleet.model import EXPORTER_PORT
from opsctl.lab.answer import Response
from opsctl.status_gpus import gpus_of, seen_wrong
from opsctl.verifying import Target, Wrong

AGENT = "journalctl -u opsctl-agent on that host; opsctl provision"


def get(asked, path: str) -> tuple[int, str]:
    """Status and text of a page of the exporter."""
    address = asked.host.management_address
    request = f"GET {path} HTTP/1.1\r\nHost: {address}:{EXPORTER_PORT}\r\nConnection: close\r\n\r\n"
    answer = Response()
    answer.feed(asked.exchange(address, EXPORTER_PORT, request.encode()))
    return answer.status, bytes(answer.text).decode()


@pytest.mark.of("host", "its GPUs are seen")
def test_health(provisioned) -> None:
    status, text = get(provisioned, "/health")
    if status != 200:
        raise Wrong("GPUs that the agent can see", text.strip() or f"HTTP {status}", AGENT)


@pytest.mark.of("host", "its metrics can be scraped")
def test_metrics(provisioned) -> None:
    status, text = get(provisioned, "/metrics")
    mark = f'hostname="{provisioned.host.name}"'
    if status != 200 or "opsctl_agent_info{" not in text or mark not in text:
        raise Wrong(f"metrics of {provisioned.host.name} on port {EXPORTER_PORT}",
                    text.strip()[:200] or f"HTTP {status}", AGENT)


@pytest.mark.of("host", "has all the GPUs that it should have")
def test_all_there(provisioned) -> None:
    told = provisioned.state.get("gpus")
    if not told:
        pytest.skip("it has no GPUs, and no instance wants one")
    lost = [one["uuid"] for one in told["devices"] if one["state"] == "lost"]
    if told["missing"] or lost:
        raise Wrong(f"{told['expected']} GPUs", f"without {', '.join([*told['missing'], *lost])}",
                    "opsctl status --gpus")


@pytest.mark.of("instance", "{what} has the GPUs that are placed to it, and no others")
def test_placed(asked, target: Target) -> None:
    asked.instance(target.what)
    if not target.placement.gpus:
        pytest.skip("it wants no GPU")
    told = gpus_of({target.host: asked.state}).get(target.host)
    found = seen_wrong(told, target.what, target.placement.gpus) if told else "no GPUs at all"
    if found:
        raise Wrong(f"{', '.join(target.placement.gpus)} for {target.what}", found, "opsctl status --gpus")
