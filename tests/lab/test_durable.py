"""What opsctl said was done is still so when every machine of the fleet loses its power at once, that very moment."""

from __future__ import annotations

import json
from typing import Any

import fingerprint
import pytest
from command import opsctl, succeeds

from opsctl.engines.events import discard
from opsctl.lab import laboratory
from opsctl.lab.model import write_model
from opsctl.releases.remote import HOST_PROGRAM

pytestmark = [pytest.mark.lab, pytest.mark.slow]


def lose_power(lab: Any) -> None:
    """All of them, and back again until they serve."""
    laboratory.power_cut(lab.name, lab.hosts, discard)
    laboratory.power_on(lab.name, lab.hosts, discard)
    wait = f"until {HOST_PROGRAM} state --json | grep -q '\"health\": \"healthy\"'; do sleep 1; done"
    for host in lab.gpu_hosts:
        done = lab.run(host, ["sudo", "timeout", "90", "sh", "-c", wait], timeout_s=100)
        assert done.returncode == 0, done.stdout + done.stderr


def test_done_is_done(own_lab: Any) -> None:
    def state() -> Any:
        return json.loads(own_lab.run("gpu-1", ["sudo", HOST_PROGRAM, "state", "--json"]).stdout)

    def now(*words: str) -> Any:
        """One verb; no moment later nothing has power."""
        said = succeeds(*words, "--json", inventory=own_lab.inventory)
        lose_power(own_lab)
        return said.document

    succeeds("bundle", "build", inventory=own_lab.inventory)
    for version, seed in (("v1", 0), ("v2", 1)):
        write_model(own_lab.directory / f"{version}.gguf", "small", seed=seed)
        succeeds("model", "import", own_lab.directory / f"{version}.gguf", "--service", "chat", "--version", version,
                 inventory=own_lab.inventory)
    now("provision")
    planned = opsctl("plan", "--json", inventory=own_lab.inventory)
    assert planned.returncode == 0, planned.stdout
    verified = opsctl("verify", inventory=own_lab.inventory)
    assert verified.returncode == 0, verified.stdout + verified.stderr

    now("update-model", "--version", "v2", "--yes", "--min-speed", "0", "--allow-outage")
    assert state()["instances"][0]["release"] == "v2"
    lines = succeeds("history", "--json", inventory=own_lab.inventory).document["lines"]
    assert [(line["action"], line["version"]) for line in lines][-1] == ("serve", "v2")

    now("rollback", "--yes", "--allow-outage")
    assert state()["instances"][0]["release"] == "v1"

    now("drain", "gpu-1", "-m", "fan", "--allow-outage", "--yes")
    assert [drain["reason"] for drain in state()["drains"]] == ["fan"]

    now("hold", "gpu-1", "--for", "2d", "-m", "RMA")
    shown = succeeds("status", "--json", inventory=own_lab.inventory).stdout
    assert "RMA" in shown
    assert "RMA" in json.dumps(fingerprint.of_host(own_lab, "ops-1")["holds of hosts"])
