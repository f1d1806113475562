"""What would be done, before it is done, and whether what was done is well: ``opsctl plan`` and ``opsctl verify``."""

from __future__ import annotations

from typing import Any

import fingerprint
import pytest
from command import opsctl, succeeds

from opsctl.releases.remote import HOST_PROGRAM

pytestmark = pytest.mark.lab


@pytest.mark.slow
def test_a_provisioned_fleet_has_nothing_to_do_and_is_well(provisioned: Any) -> None:
    before = fingerprint.of_fleet(provisioned)
    planned = opsctl("plan", "--json", inventory=provisioned.inventory)
    assert (planned.returncode, planned.document.get("changed")) == (0, 0), planned.stdout + planned.stderr
    verified = opsctl("verify", "--json", inventory=provisioned.inventory)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert fingerprint.of_fleet(provisioned) == before, "both only look"


# host, how it is broken by hand and mended, the task that a plan names, the word by which verify names it
DAMAGES = [
    ("gpu-1", "systemctl stop inference@chat.0", "systemctl start inference@chat.0", "Enable the instances",
     "inference@chat.0"),
    ("gpu-2", "systemctl stop opsctl-agent", "systemctl start opsctl-agent", "opsctl-agent.service", "opsctl-agent"),
    ("ops-1", "apt-mark unhold haproxy", "apt-mark hold haproxy", "Hold the load balancer's packages", "haproxy"),
]


def test_what_is_broken_is_planned_and_found(provisioned: Any) -> None:
    def everywhere(scripts: list[tuple[str, str]]) -> None:
        for host, script in scripts:
            assert provisioned.run(host, ["sudo", "sh", "-c", script], timeout_s=300).returncode == 0

    everywhere([(host, damage) for host, damage, *_ in DAMAGES])
    try:
        planned = opsctl("plan", "--json", inventory=provisioned.inventory)
        verified = opsctl("verify", inventory=provisioned.inventory)
    finally:
        everywhere([(host, mend) for host, _, mend, *_ in DAMAGES])
        wait = f"until {HOST_PROGRAM} state --json | grep -q '\"health\": \"healthy\"'; do sleep 1; done"
        for host in provisioned.gpu_hosts:
            assert provisioned.run(host, ["sudo", "timeout", "90", "sh", "-c", wait], timeout_s=100).returncode == 0
    assert planned.returncode == 10, planned.stdout + planned.stderr
    changes = {row["host"]: [change["task"] for change in row["changes"]] for row in planned.document["hosts"]}
    for host, _, _, task, _ in DAMAGES:
        assert any(task in one for one in changes[host]), (host, changes)
    assert verified.returncode == 9, verified.stdout + verified.stderr
    for _, _, _, _, word in DAMAGES:
        assert word in verified.stdout + verified.stderr, word


@pytest.mark.slow
def test_a_bare_fleet_is_planned_too(own_lab: Any) -> None:
    succeeds("bundle", "build", inventory=own_lab.inventory)
    succeeds("lab", "model", own_lab.directory / "tiny.gguf")
    succeeds("model", "import", own_lab.directory / "tiny.gguf", "--service", "chat", "--version", "v1",
             inventory=own_lab.inventory)
    planned = opsctl("plan", "--json", inventory=own_lab.inventory)
    assert planned.returncode == 10, planned.stdout + planned.stderr
    assert {row["host"]: row["state"] for row in planned.document["hosts"]} == {"ops-1": "fresh", "gpu-1": "fresh"}
    coming = [(row["act"], row["host"], row["instance"]) for row in planned.document["instances"]]
    assert coming == [("publish", "ops-1", ""), ("first start", "gpu-1", "chat.0")]
    succeeds("provision", inventory=own_lab.inventory)
    after = opsctl("plan", "--json", inventory=own_lab.inventory)
    assert (after.returncode, after.document["changed"]) == (0, 0), after.stdout + after.stderr
    succeeds("lab", "power-cut", "gpu-1", "--name", own_lab.name)
    silent = opsctl("plan", "--json", inventory=own_lab.inventory)
    assert silent.returncode == 5, silent.stdout + silent.stderr
    assert {row["host"]: row["state"] for row in silent.document["hosts"]}["gpu-1"] == "unreachable"
    assert opsctl("verify", inventory=own_lab.inventory).returncode == 9
