"""Another driver on the machine that opsctl itself runs on, whose module is in use: it reboots, and a unit goes on."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import succeeds
from conftest import NAME, lab_of_a_module
from workstation import FLEET, Workstation

from opsctl.lab.model import write_model
from opsctl.releases.remote import HOST_PROGRAM

pytestmark = [pytest.mark.lab, pytest.mark.slow]

OLD, NEW = "580.126.09", "595.71.05"
KEEP = "/usr/local/lib/opsctl/driver-keep"
UNIT = "opsctl-driver-continue.service"
SERVER = "this.chat.0"
MODELS = "http://127.0.0.1:8000/v1/models"  # by the load balancer
INVENTORY = f"""\
[gpu]
this ansible_connection=local gpu_model="H200"

[lb]
this

[gateway]
this

[gpu:vars]
nvidia_driver_version="{OLD}"
nvidia_driver_bundle_versions=["{NEW}"]
nvidia_driver_own=[]
"""
SERVICES = ("chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n  first_release: v1\n  gpus_per_instance: 1\n"
            "  tensor_parallel: 1\n")
# As where a desktop has the GPU: the module stays, whoever asks, until the next boot.
IN_USE = """\
dpkg-divert --quiet --local --rename --divert /usr/bin/nvidia-modprobe.real --add /usr/bin/nvidia-modprobe
cat >/usr/bin/nvidia-modprobe <<'END'
#!/bin/sh
[ "$1" != -r ] || { echo "nvidia is in use" >&2; exit 1; }
exec /usr/bin/nvidia-modprobe.real "$@"
END
chmod 755 /usr/bin/nvidia-modprobe
"""
HOOK = "/etc/apt/apt.conf.d/99broken"


def broken(version: str) -> str:
    """The module of this driver is another than its packages, which is found when the layers are compared."""
    major = version.partition(".")[0]
    return (f'DPkg::Post-Invoke {{"if grep -qs ^{major} /lib/modules/lab/nvidia.version; then echo {major}.1.1 >'
            '/lib/modules/lab/nvidia.version; fi";};\n')


@pytest.fixture(scope="module")
def here(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workstation]:
    directory = tmp_path_factory.mktemp("here")
    fleet = directory / "workstation"
    with lab_of_a_module(f"{NAME}-here", 1, directory / "fleet", "gpu-1=1xH200") as lab:
        (fleet / "sources.d").mkdir(parents=True)
        for source in (lab.directory / "sources.d").iterdir():
            (fleet / "sources.d" / source.name).write_bytes(source.read_bytes())
        make(fleet)
        machine = Workstation(lab, "gpu-1", fleet)
        machine.succeeds("provision", timeout_s=900)
        machine.sh(IN_USE)
        yield machine


def make(fleet: Path) -> None:
    (fleet / "inventory.ini").write_text(INVENTORY)
    (fleet / "services.yml").write_text(SERVICES)
    succeeds("init", fleet)
    succeeds("bundle", "build", inventory=fleet / "inventory.ini")
    write_model(fleet.parent / "small.gguf", "small")
    succeeds("model", "import", fleet.parent / "small.gguf", "--service", "chat", "--version", "v1",
             "--set", "parallel=4", "--set", "drain_timeout_s=0", inventory=fleet / "inventory.ini")


def upgrade(here: Workstation, to: str, *more: str) -> list[str]:
    """The words of the verb, with an inventory that wants the same."""
    text = here.sh(f"cat {FLEET}/inventory.ini")
    here.write("inventory.ini", re.sub(r'nvidia_driver_version="[^"]*"', f'nvidia_driver_version="{to}"', text) + "\n")
    return ["upgrade-driver", "--to", to, "--yes", "--allow-outage", *more]


def reboots(done: subprocess.CompletedProcess[str], into: str) -> str:
    """The run that goes on after the boot."""
    assert done.returncode == 8, done.stdout + done.stderr
    assert f"reboots into {into}" in done.stderr, done.stderr
    found = re.search(r"hint: .*opsctl resume (\S+) goes on", done.stderr)
    assert found, done.stderr
    return found[1]


def look(here: Workstation) -> Any:
    return json.loads(here.sh(f"{KEEP} look"))


def balancer(here: Workstation) -> str:
    """What HAProxy says of the instance."""
    found = json.loads(here.sh(f"{HOST_PROGRAM} balancer"))["servers"]
    return next(str(row["status"]) for row in found if row["server"] == SERVER)


def wait_for(what: Callable[[], Any], within_s: float = 300.0) -> None:
    """A machine that boots answers nothing for a moment."""
    until = time.monotonic() + within_s
    while True:
        try:
            if what():
                return
        except (AssertionError, subprocess.TimeoutExpired, ValueError):
            pass
        assert time.monotonic() < until, f"not within {within_s:.0f} s"
        subprocess.run(["sleep", "1"], check=True)


def boots_to(here: Workstation, before: str, phase: str) -> Any:
    """Waits until it has booted since ``before`` and the unit is through; what ``look`` says then."""
    def through() -> bool:
        seen = look(here)
        state = here.sh(f"systemctl show {UNIT} --property=ActiveState --value")
        return bool(seen["boot"] != before and seen["change"]["phase"] == phase and state == "inactive")

    wait_for(through)
    return look(here)


def serves(here: Workstation, version: str) -> None:
    """On this driver, as nvidia-smi, dpkg and the kernel say, with requests, and nothing of a run is left."""
    seen = look(here)
    smi = here.sh("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    assert [smi] == seen["versions"] == [seen["loaded"]] == [version], seen
    assert (seen["change"], seen["rotation"]) == (None, {}), seen
    state = json.loads(here.sh(f"{HOST_PROGRAM} state --json"))
    (one,) = state["instances"]
    assert (one["health"], one["voice"], state["drains"]) == ("healthy", "up 100%", []), state
    assert balancer(here) == "UP"
    here.sh(f"python3 -c 'import urllib.request as web; web.urlopen(\"{MODELS}\", timeout=10)'")
    assert not here.sh(f"ls /etc/systemd/system/{UNIT} 2>/dev/null || true")


def test_a_unit_goes_on_after_the_boot_and_resume_ends_it(here: Workstation) -> None:
    before = here.sh("cat /proc/sys/kernel/random/boot_id")  # what looks at drivers is not there yet
    run = reboots(here.opsctl(*upgrade(here, NEW), timeout_s=900), f"driver {NEW}")
    seen = boots_to(here, before, "accepted")
    assert (seen["versions"], seen["loaded"]) == ([NEW], NEW)
    wait_for(lambda: balancer(here) == "UP", 60)  # nobody needs to resume it for that
    assert here.opsctl("provision").returncode == 4  # the run is not over
    assert here.succeeds("resume", run, "--yes")["changed"] == 1
    serves(here, NEW)
    here.succeeds("verify")


def test_one_that_fails_comes_back_by_another_boot(here: Workstation) -> None:
    """Drained in HAProxy itself, which only resume can end there."""
    here.write(HOOK, broken(OLD))
    before = look(here)["boot"]
    try:
        run = reboots(here.opsctl(*upgrade(here, OLD, "--via-lb"), timeout_s=900), f"driver {OLD}")
        seen = boots_to(here, before, "back")
        assert (seen["versions"], seen["loaded"]) == ([NEW], NEW)
        assert f"the module in the kernel is {OLD.partition('.')[0]}.1.1" in seen["change"]["why"]
        assert seen["rotation"] == {"chat.0": {"ours": ["this"], "by_hand": []}}
        wait_for(lambda: balancer(here).startswith("DRAIN"), 60)
        done = here.opsctl("resume", run, "--yes")
        assert done.returncode == 6, done.stdout + done.stderr
        assert "back on the old driver and serving: this" in done.stderr
    finally:
        here.sh(f"rm {HOOK}")
    serves(here, NEW)


def test_a_held_machine_is_not_rebooted_and_resume_does_it(here: Workstation) -> None:
    here.write(HOOK, broken(OLD))
    before = look(here)["boot"]
    words = upgrade(here, OLD)
    try:
        with here.start(*words) as controller:
            wait_for(lambda: look(here)["change"])
            here.succeeds("hold", "this", "-m", "a talk")  # whoever waits for it would be surprised
            assert controller.wait(900) == 8
        seen = boots_to(here, before, "restored")
        assert (seen["versions"], seen["loaded"]) == ([NEW], f"{OLD.partition('.')[0]}.1.1")
        second = seen["boot"]
        assert here.opsctl("resume", "--yes").returncode == 4
        here.succeeds("release", "this")
        assert look(here)["boot"] == second
        run = reboots(here.opsctl("resume", "--yes", timeout_s=900), "its old driver")
        boots_to(here, second, "back")
        done = here.opsctl("resume", run, "--yes")
        assert done.returncode == 6, done.stdout + done.stderr
    finally:
        here.sh(f"rm {HOOK}")
    serves(here, NEW)


def test_a_persons_drain_outlives_a_dead_controller(here: Workstation) -> None:
    """Whose own are taken back; the module can be reloaded here."""
    here.sh("rm /usr/bin/nvidia-modprobe && dpkg-divert --quiet --local --rename --remove /usr/bin/nvidia-modprobe")
    here.sh(f"{HOST_PROGRAM} balancer-drain {SERVER}")
    with here.start(*upgrade(here, OLD, "--via-lb")) as controller:
        wait_for(lambda: look(here)["change"])
        here.sh("pkill -KILL -f '^[^ ]*python[^ ]* [^ ]*/bin/opsctl upgrade-driver'")
        controller.wait(60)
    here.sh("sleep 65", 90)  # until its locks are nobody's
    assert look(here)["rotation"] == {"chat.0": {"ours": [], "by_hand": ["this"]}}
    done = here.opsctl("resume", "--yes", timeout_s=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stays out: somebody took it out by hand" in done.stderr, done.stderr
    wait_for(lambda: balancer(here).startswith("DRAIN"), 30)
    here.sh(f"{HOST_PROGRAM} balancer-ready {SERVER}")
    wait_for(lambda: balancer(here) == "UP", 30)
    serves(here, OLD)
