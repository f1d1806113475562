"""One workstation that is the whole fleet, without SSH: one instance is an outage and refused, two are lossless."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import succeeds
from workstation import Workstation

from opsctl.lab.model import write_model

pytestmark = [pytest.mark.lab, pytest.mark.slow]

INVENTORY = "".join(f"[{group}]\nthis ansible_connection=local\n" for group in ("gpu", "lb", "gateway"))
SERVICES = "chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n  first_release: v1\n  instances_per_host: {count}\n"


@pytest.fixture
def workstation(own_lab: Any, tmp_path: Path) -> Iterator[Workstation]:
    fleet = tmp_path / "workstation"
    fleet.mkdir()
    (fleet / "inventory.ini").write_text(INVENTORY)
    (fleet / "services.yml").write_text(SERVICES.format(count=1))
    succeeds("init", fleet)
    succeeds("bundle", "build", inventory=fleet / "inventory.ini")
    write_model(tmp_path / "small.gguf", "small")
    for version, slots in (("v1", 4), ("v2", 5)):
        succeeds("model", "import", tmp_path / "small.gguf", "--service", "chat", "--version", version,
                 "--set", f"parallel={slots}", "--set", "drain_timeout_s=0", inventory=fleet / "inventory.ini")
    yield Workstation(own_lab, "ops-1", fleet)


def test_one_instance_is_refused_and_two_lose_nothing(workstation: Workstation) -> None:
    workstation.succeeds("provision")
    refused = workstation.opsctl("update-model", "--version", "v2", "--yes", "--json")
    assert refused.returncode == 5, refused.stderr
    error = json.loads(refused.stdout)["error"]
    assert error["code"] == "update.outage"
    assert " s by the last change" in error["message"]  # its first start was measured
    assert "--allow-outage" in error["hint"]

    forced = workstation.succeeds("update-model", "--version", "v2", "--yes", "--allow-outage")
    assert forced["instances"][0]["out_of_rotation_s"] > 0
    assert workstation.succeeds("rollback", "--yes", "--allow-outage")["to"] == "v1"

    workstation.write("services.yml", SERVICES.format(count=2))
    workstation.succeeds("provision")
    ended: list[subprocess.CompletedProcess[str]] = []
    load = threading.Thread(target=lambda: ended.append(workstation.opsctl(
        "lab", "load", "--clients", "8", "--seconds", "45", "--tokens", "400", "--json")))
    load.start()
    try:
        done = workstation.succeeds("update-model", "--version", "v2", "--yes", "--allow-bad")
        assert [row["state"] for row in done["instances"]] == ["moved", "moved"]
    finally:
        load.join()
    assert ended[0].returncode == 0, ended[0].stdout + ended[0].stderr
    seen = json.loads(ended[0].stdout)
    assert seen["lost"] == 0
    assert seen["whole"] > 50
