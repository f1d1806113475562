"""GPUs that heat up, and some that idle while requests wait: from the silicon to the person on call."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import fingerprint
import pytest
from command import opsctl, refused, succeeds
from conftest import NAME, LabFleet, lab_of_a_module

from opsctl.errors import ExitCode
from opsctl.fleet import gpu_lock
from opsctl.fleet.inventory import read_fleet
from opsctl.lab import inbox, layers, state
from opsctl.lab.load import Load, target
from opsctl.lab.model import write_model
from opsctl.releases.remote import HOST_PROGRAM

pytestmark = [pytest.mark.lab, pytest.mark.slow]

HOT, IDLE = "GpuThermalMarginLow", "GpuIdleWhileRequestsWait"
WITHIN_S = 120.0
ENGINE = "systemctl kill --signal={} inference@chat.0.service"


@pytest.fixture(scope="module")
def gpus(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFleet]:
    """gpu-1 has two H200 on a board with NVSwitches, gpu-2 two L40S; they serve, and ops-1 watches them."""
    name = f"{NAME}-gpu"
    directory = tmp_path_factory.mktemp("gpus") / "fleet"
    with lab_of_a_module(name, 2, directory, "gpu-1=2xH200,gpu-2=2xL40S") as fleet:
        succeeds("bundle", "build", inventory=fleet.inventory)
        write_model(directory / "v1.gguf", "mid")
        succeeds("model", "import", directory / "v1.gguf", "--service", "chat", "--version", "v1", "--set", "threads=1",
                 "--set", "parallel=4", "--set", "max_model_len=512", inventory=fleet.inventory)
        succeeds("provision", inventory=fleet.inventory)
        yield fleet


def root_of(fleet: LabFleet, host: str) -> Any:
    lab = state.find(fleet.name)
    return layers.root(lab.place(lab.machine(host)))


def sh(fleet: LabFleet, host: str, line: str, timeout_s: float = 60) -> str:
    done = fleet.run(host, ["sudo", "sh", "-c", line], timeout_s=timeout_s)
    assert done.returncode == 0, f"{host}: {line}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def gpu_state(fleet: LabFleet, host: str) -> Any:
    return json.loads(sh(fleet, host, f"{HOST_PROGRAM} state --json"))["gpus"]


def wait_for(what: Callable[[], Any], within_s: float = WITHIN_S) -> Any:
    """What it gives when that is true; seconds of patience."""
    until = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < until, f"not within {within_s:.0f} s"
        pause()
    return found


def pause() -> None:
    subprocess.run(["sleep", "0.5"], check=True)


def told(fleet: LabFleet, alert: str, status: str) -> list[dict[str, Any]]:
    """The last words of webhook and mail on an alert, when both say ``status``."""
    messages = inbox.read(root_of(fleet, "ops-1"))
    if inbox.last_statuses(messages, alert) != {"webhook": status, "mail": status}:
        return []
    return [next(one for one in reversed(messages) if one["by"] == by and inbox.last_statuses([one], alert))
            for by in ("webhook", "mail")]


def test_all_is_well_and_nvidia_smi_says_the_same(gpus: LabFleet) -> None:
    verified = opsctl("verify", inventory=gpus.inventory)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    for host, model in (("gpu-1", "H200"), ("gpu-2", "L40S")):
        rows = sh(gpus, host, "nvidia-smi --query-gpu=uuid,name,driver_version --format=csv,noheader").splitlines()
        seen = gpu_state(gpus, host)["devices"]
        assert [row.split(", ")[0] for row in rows] == [one["uuid"] for one in seen]
        assert all(model in row and row.endswith("580.126.09") for row in rows)
        assert {one["instance"] for one in seen} == {"chat.0"}


def test_gpus_are_written_down_once_and_then_missed_by_name(gpus: LabFleet) -> None:
    file = gpus.inventory.with_name(gpu_lock.NAME)
    text = file.read_text()
    seen = {host: [one["uuid"] for one in gpu_state(gpus, host)["devices"]] for host in ("gpu-1", "gpu-2")}
    assert {host: [gpu.uuid for gpu in found] for host, found in gpu_lock.read(text, file).items()} == seen
    for host, uuids in seen.items():
        assert ", ".join(f'"{uuid}"' for uuid in uuids) in sh(gpus, host, "cat /etc/opsctl/instances/chat.0.toml")
    file.unlink()
    succeeds("provision", inventory=gpus.inventory)
    assert file.read_text() == text
    file.write_text(text.replace(seen["gpu-1"][0], "GPU-of-another-card"))
    failed = opsctl("provision", inventory=gpus.inventory)
    assert failed.returncode == ExitCode.MIXED, failed.stdout + failed.stderr
    assert "1 of the 2 GPUs" in failed.stderr
    assert "GPU-of-another-card" in failed.stderr
    taken = succeeds("gpus", "accept", "gpu-1", "--yes", inventory=gpus.inventory)
    assert "- GPU-of-another-card" in taken.stderr
    assert file.read_text() == text


def test_a_hot_gpu_and_an_idle_one_reach_whoever_is_on_call(gpus: LabFleet) -> None:
    hot_uuid = gpu_state(gpus, "gpu-1")["devices"][1]["uuid"]
    with Load(target(read_fleet(gpus.inventory), "chat"), clients=24, tokens=40):
        # hot at any load there is, and no more than the driver holds: the guard moves requests away while others serve
        succeeds("lab", "fault", "gpu-1", "cooling", "--factor", "2", "--gpu", "1", "--name", gpus.name)
        try:
            wait_for(lambda: gpu_state(gpus, "gpu-1")["devices"][1]["margin_c"] <= 5)
            hot_since = time.monotonic()
            sh(gpus, "gpu-2", ENGINE.format("STOP"))  # it hangs: its GPUs do nothing, and all wait for gpu-1
            idle_since = time.monotonic()
            webhook, mail = wait_for(lambda: told(gpus, HOT, "firing"), WITHIN_S - (time.monotonic() - hot_since))
            (alert,) = [one for one in webhook["alerts"] if one["UUID"] == hot_uuid]
            assert (alert["host"], alert["gpu"], alert["service"], alert["inference_instance"]) == (
                "gpu-1", "1", "chat", "chat.0")
            for word in ("gpu-1", hot_uuid, "chat.0", "opsctl drain gpu-1:chat.0 --weight 50"):
                assert word in mail["text"], word
            shown = succeeds("status", "--gpus", inventory=gpus.inventory).stdout
            assert "thermal" in shown, shown
            idle_s = WITHIN_S + 30 - (time.monotonic() - idle_since)  # it is to be idle for 30 s first
            webhook, mail = wait_for(lambda: told(gpus, IDLE, "firing"), idle_s)
            assert {(one["host"], one["inference_instance"]) for one in webhook["alerts"]
                    if one["status"] == "firing"} == {("gpu-2", "chat.0")}
            assert "opsctl logs --limit gpu-2 --instance chat.0 --since 15m" in mail["text"]
        finally:
            sh(gpus, "gpu-2", ENGINE.format("CONT"))
            succeeds("lab", "fault", "gpu-1", "clear", "--name", gpus.name)
        wait_for(lambda: told(gpus, IDLE, "resolved"))
        wait_for(lambda: gpu_state(gpus, "gpu-1")["devices"][1]["margin_c"] > 5)
        wait_for(lambda: told(gpus, HOT, "resolved"))


def test_verify_says_what_is_wrong(gpus: LabFleet) -> None:
    """A stopped exporter, and an instance that was started on another GPU than it is placed on."""
    placement = "/etc/opsctl/instances/chat.0.toml"
    first, second = [one["uuid"] for one in gpu_state(gpus, "gpu-2")["devices"]]
    sh(gpus, "gpu-1", "systemctl stop opsctl-agent")
    try:
        sh(gpus, "gpu-2", f"cp -p {placement} /root/placement.toml && sed -i s/{second}/{first}/ {placement} && "
           f"systemctl restart inference@chat.0 && sleep 3; mv /root/placement.toml {placement}", 120)
        wait_for(lambda: [one["users"] for one in gpu_state(gpus, "gpu-2")["devices"]] == [["chat.0"], []])
        said = opsctl("verify", inventory=gpus.inventory)
    finally:
        sh(gpus, "gpu-1", "systemctl start opsctl-agent")
        sh(gpus, "gpu-2", "systemctl restart inference@chat.0", 120)
    assert said.returncode == 9, said.stdout + said.stderr
    text = said.stdout + said.stderr
    assert "wrong: gpu-1: opsctl-agent.service is active" in text, text
    assert "wrong: gpu-2: chat.0 has the GPUs that are placed to it" in text, text


def test_a_driver_goes_up_and_back_by_the_inventory(gpus: LabFleet) -> None:
    def provision(version: str) -> Any:
        text = gpus.inventory.read_text()
        gpus.inventory.write_text(re.sub(r'nvidia_driver_version="[^"]*"', f'nvidia_driver_version="{version}"', text))
        return opsctl("provision", "--json", inventory=gpus.inventory)

    def log(host: str) -> list[str]:
        return sh(gpus, host, "cat /var/log/dpkg.log").splitlines()

    before = fingerprint.of_fleet(gpus)
    refused(provision("595.71.05"), 5, "provision.preflight")  # engines hold the GPUs open
    assert fingerprint.of_fleet(gpus) == before
    for version, other in (("595.71.05", "580.126.09"), ("580.126.09", "595.71.05")):
        for host in gpus.gpu_hosts:
            sh(gpus, host, "systemctl stop inference@chat.0", 120)
        lines = {host: len(log(host)) for host in gpus.gpu_hosts}
        said = provision(version)
        assert said.returncode == 0, said.stdout + said.stderr
        for host in gpus.gpu_hosts:
            new = "\n".join(log(host)[lines[host]:])
            assert f"upgrade libnvidia-ml1:amd64 {other}-1+lab {version}-1+lab" in new, new
            moved = f"upgrade nvidia-fabricmanager:amd64 {other}-1+lab {version}-1+lab" in new
            assert moved is (host == "gpu-1"), new
            now = sh(gpus, host, "nvidia-smi --query-gpu=driver_version --format=csv,noheader")
            assert now.split() == [version] * 2
        verified = opsctl("verify", inventory=gpus.inventory)
        assert verified.returncode == 0, verified.stdout + verified.stderr


def test_verify_tells_of_another_driver(gpus: LabFleet) -> None:
    sh(gpus, "gpu-2", "systemctl stop inference@chat.0 opsctl-agent nvidia-persistenced && nvidia-modprobe -r && "
       "cp /lib/modules/lab/nvidia.version /root/ && echo 595.71.05 >/lib/modules/lab/nvidia.version && "
       "nvidia-modprobe")
    try:
        said = opsctl("verify", inventory=gpus.inventory)
        assert said.returncode == 9, said.stdout + said.stderr
        assert re.search(r"wrong: gpu-2: .*driver", said.stdout + said.stderr), said.stdout
    finally:
        sh(gpus, "gpu-2", "nvidia-modprobe -r; cp /root/nvidia.version /lib/modules/lab/ && nvidia-modprobe && "
           "systemctl start nvidia-persistenced opsctl-agent inference@chat.0")
