"""Another driver on three hosts under load: up, down, one that fails and goes back by itself, and a dead controller."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import fingerprint
import pytest
from command import opsctl, refused, succeeds
from conftest import NAME, LabFleet, lab_of_a_module, unwatched
from under_load import be_nice, import_slow, load_on, lost, told

from opsctl.releases.remote import HOST_PROGRAM

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(2400)]

OLD, NEW = "580.126.09", "595.71.05"
KEEP = "/usr/local/lib/opsctl/driver-keep"
# The new driver's module is another than its packages: found when the layers are compared, after a reboot.
BROKEN = ('DPkg::Post-Invoke {"if grep -qs ^595 /lib/modules/lab/nvidia.version; then echo 595.1.1 >'
          '/lib/modules/lab/nvidia.version; fi";};\n')
HOOK = "/etc/apt/apt.conf.d/99broken"
WAVES = ("--waves", "1,2")
GPUS = "gpu-1=1xH200,gpu-2=1xL40S,gpu-3=1xL40S"


@pytest.fixture(scope="module")
def drivers(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFleet]:
    """gpu-1 has a board with NVSwitches; ops-1 watches nobody."""
    directory = tmp_path_factory.mktemp("drivers") / "fleet"
    with lab_of_a_module(f"{NAME}-driver", 3, directory, GPUS) as fleet:
        prepare(fleet)
        yield fleet


def prepare(fleet: LabFleet) -> None:
    unwatched(fleet.directory)
    succeeds("bundle", "build", inventory=fleet.inventory)
    import_slow(fleet, "v1", seed=0)
    be_nice(fleet)
    succeeds("provision", inventory=fleet.inventory)


def want(fleet: LabFleet, version: str) -> None:
    text = fleet.inventory.read_text()
    fleet.inventory.write_text(re.sub(r'nvidia_driver_version="[^"]*"', f'nvidia_driver_version="{version}"', text))


def upgrade(fleet: LabFleet, to: str, *more: str) -> Any:
    return opsctl("upgrade-driver", "--to", to, *WAVES, "--yes", *more, inventory=fleet.inventory, timeout_s=1800)


def sh(fleet: LabFleet, host: str, line: str, timeout_s: float = 120) -> str:
    done = fleet.run(host, ["sudo", "sh", "-c", line], timeout_s=timeout_s)
    assert done.returncode == 0, f"{host}: {line}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def look(fleet: LabFleet, host: str) -> Any:
    return json.loads(sh(fleet, host, f"{KEEP} look"))


def driver(fleet: LabFleet, host: str) -> str:
    """As nvidia-smi, dpkg and the kernel say, all the same."""
    seen = look(fleet, host)
    smi = sh(fleet, host, "nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    assert [smi] == seen["versions"] == [seen["loaded"]], seen
    assert seen["change"] is None, seen
    return smi


def instance(fleet: LabFleet, host: str) -> Any:
    found = json.loads(sh(fleet, host, f"{HOST_PROGRAM} state --json"))
    (one,) = found["instances"]
    return {**one, "drains": [drain["owner"] for drain in found["drains"]]}


def serve(fleet: LabFleet, **versions: str) -> None:
    """Every host has its driver, its engine and its requests, and nothing of a run is left."""
    for host, version in versions.items():
        assert driver(fleet, host.replace("_", "-")) == version, host
        one = instance(fleet, host.replace("_", "-"))
        assert (one["health"], one["voice"], one["drains"]) == ("healthy", "up 100%", []), one


def test_up_under_load_loses_no_request(drivers: LabFleet) -> None:
    before = fingerprint.of_fleet(drivers)
    said = opsctl("upgrade-driver", "--to", NEW, "--json", "--yes", inventory=drivers.inventory)
    assert f"inventory.ini:{line_of(drivers)}: nvidia_driver_version={OLD}" in refused(
        said, 5, "driver.inventory_differs")
    want(drivers, "595.999.1")
    said = opsctl("upgrade-driver", "--to", "595.999.1", "--json", "--yes", inventory=drivers.inventory)
    assert NEW in refused(said, 5, "driver.preflight")
    assert fingerprint.of_fleet(drivers) == before
    want(drivers, NEW)
    planned = opsctl("upgrade-driver", "--to", NEW, *WAVES, "--plan", "--json", inventory=drivers.inventory)
    assert planned.returncode == 10, planned.stderr
    assert [row["wave"] for row in planned.document["plan"]["hosts"]] == [1, 2, 2]
    with load_on(drivers) as load:
        load.wait_until_steady()
        done = upgrade(drivers, NEW, "--json")
        assert done.returncode == 0, f"{done.stderr}\n{told(load)}"
        load.wait_for_look(60)
    assert len(load.records) > 100
    assert not lost(load.records), told(load)
    assert done.document["changed"] == 3
    serve(drivers, gpu_1=NEW, gpu_2=NEW, gpu_3=NEW)
    assert look(drivers, "gpu-1")["kept"] == [OLD]
    succeeds("verify", inventory=drivers.inventory)
    again = upgrade(drivers, NEW, "--json")
    assert (again.returncode, again.document["changed"]) == (0, 0)


def test_down_and_an_operators_drain_stays(drivers: LabFleet) -> None:
    want(drivers, OLD)
    succeeds("drain", "gpu-3", "-m", "RMA", "--yes", inventory=drivers.inventory)
    try:
        done = upgrade(drivers, OLD)
        assert done.returncode == 0, done.stderr
        one = instance(drivers, "gpu-3")
        assert one["voice"] == "up 0%"
        assert [owner.partition(":")[0] for owner in one["drains"]] == ["operator"]
    finally:
        succeeds("undrain", "gpu-3", inventory=drivers.inventory)
    wait_until_up(drivers, "gpu-3")
    serve(drivers, gpu_1=OLD, gpu_2=OLD, gpu_3=OLD)


def test_one_that_fails_goes_back_by_itself(drivers: LabFleet) -> None:
    want(drivers, NEW)
    sh(drivers, "gpu-2", f"cat >{HOOK} <<'END'\n{BROKEN}END")
    boot = look(drivers, "gpu-2")["boot"]
    with load_on(drivers) as load:
        load.wait_until_steady()
        done = upgrade(drivers, NEW, "--json")
        load.wait_for_look(60)
    assert done.returncode == 6, f"{done.stdout}\n{done.stderr}"
    assert not lost(load.records), told(load)
    message = done.document["error"]["message"]
    assert "the module in the kernel is 595.1.1" in message, message
    assert "back on the old driver and serving: gpu-2" in message, message
    serve(drivers, gpu_1=NEW, gpu_2=OLD, gpu_3=NEW)
    assert look(drivers, "gpu-2")["boot"] != boot
    assert f'"version": "{OLD}"' in sh(drivers, "gpu-2", "cat /etc/opsctl/driver.json")
    sh(drivers, "gpu-2", f"rm {HOOK}")
    assert upgrade(drivers, NEW).returncode == 0
    serve(drivers, gpu_1=NEW, gpu_2=NEW, gpu_3=NEW)


def test_a_dead_controller_leaves_hosts_drained_and_resume_goes_on(drivers: LabFleet) -> None:
    want(drivers, OLD)
    environment = {**os.environ, "OPSCTL_INVENTORY": str(drivers.inventory)}
    with subprocess.Popen([sys.executable, "-m", "opsctl", "upgrade-driver", "--to", OLD, *WAVES, "--yes"],
                          env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as controller:
        try:
            until = time.monotonic() + 300
            while not look(drivers, "gpu-1")["change"]:
                assert time.monotonic() < until
                assert controller.poll() is None
        finally:
            controller.send_signal(signal.SIGKILL)
    # longer than a lease
    wait_until(drivers, 100)
    (owner,) = instance(drivers, "gpu-1")["drains"]
    assert owner.startswith("run:")
    assert opsctl("provision", inventory=drivers.inventory).returncode == 4  # the run is not over
    done = opsctl("resume", "--yes", inventory=drivers.inventory, timeout_s=1800)
    assert done.returncode == 0, done.stderr
    serve(drivers, gpu_1=OLD, gpu_2=OLD, gpu_3=OLD)


def line_of(fleet: LabFleet) -> int:
    lines = fleet.inventory.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.startswith("nvidia_driver_version="))


def wait_until_up(fleet: LabFleet, host: str) -> None:
    until = time.monotonic() + 60
    while instance(fleet, host)["voice"] != "up 100%":
        assert time.monotonic() < until


def wait_until(fleet: LabFleet, seconds: float) -> None:
    sh(fleet, "ops-1", f"sleep {seconds:g}", seconds + 30)
