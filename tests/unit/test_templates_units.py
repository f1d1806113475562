"""The units that opsctl installs: what systemd makes of them, and what they promise."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomllib
from rendering import render

from opsctl.agent.flat_toml import read_flat
from opsctl.agent.guard.model import Policy
from opsctl.agent.guard.policy import read_policy
from opsctl.agent.paths import Paths
from opsctl.agent.setter.program import RESTORE_S
from opsctl.agent.settings import Settings, read_placement, read_settings

ENGINE = "templates/inference@.service.j2"
AGENT = "templates/opsctl-agent.service.j2"
RECOVER = "templates/opsctl-recover.service.j2"
SETTER = "templates/opsctl-setter.service.j2"
UNITS = [(ENGINE, "inference@chat.0.service"), (AGENT, "opsctl-agent.service"), (RECOVER, "opsctl-recover.service"),
         (SETTER, "opsctl-setter.service")]
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")


def settings(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@needs_systemd
@pytest.mark.parametrize(("template", "name"), UNITS)
def test_systemd_knows_every_line(template: str, name: str, tmp_path: Path) -> None:
    unit = tmp_path / name
    # verify wants programs to be there
    unit.write_text(re.sub(r"^(Exec\w+)=.*$", r"\1=/bin/true", render(template), flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit], capture_output=True,
                          text=True, check=False)
    assert name not in done.stderr, done.stderr
    assert str(unit) not in done.stderr, done.stderr


@needs_systemd
@pytest.mark.parametrize(("template", "name"), UNITS)
def test_a_unit_exposes_little(template: str, name: str, tmp_path: Path) -> None:
    """3.0 of 10 or less, as systemd counts what a service could do that it need not."""
    unit = tmp_path / name
    unit.write_text(render(template))
    done = subprocess.run(["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=30", unit],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout


class TestEngine:
    unit = settings(render(ENGINE))

    def test_it_is_nobody_special(self) -> None:
        assert self.unit["User"] == ["inference"]
        assert self.unit["CapabilityBoundingSet"] == [""]
        assert self.unit["NoNewPrivileges"] == ["yes"]

    def test_it_writes_to_its_caches_and_its_runtime_directory_only(self) -> None:
        assert self.unit["ProtectSystem"] == ["strict"]
        assert "ReadWritePaths" not in self.unit
        assert self.unit["CacheDirectory"] == self.unit["RuntimeDirectory"][0].replace("/instances", "").splitlines()
        assert "HOME=%C/opsctl/%i" in self.unit["Environment"][0].split()

    def test_the_agent_can_see_its_runtime_directory(self) -> None:
        assert self.unit["RuntimeDirectory"] == ["opsctl/instances/%i"]
        assert self.unit["RuntimeDirectoryMode"] == ["0755"]
        assert self.unit["RuntimeDirectoryPreserve"] == ["no"]

    def test_a_failing_agent_does_not_stop_it(self) -> None:
        assert "opsctl-agent.service" in self.unit["Wants"][0].split()
        assert not {"Requires", "BindsTo", "PartOf"} & self.unit.keys()

    def test_what_a_power_cut_left_is_undone_before_it_starts(self) -> None:
        assert "opsctl-recover.service" in self.unit["Wants"][0].split()
        assert "opsctl-recover.service" in self.unit["After"][0].split()
        recovery = settings(render(RECOVER))
        assert recovery["Type"] == ["oneshot"]  # who comes after it waits for its end
        assert recovery["RemainAfterExit"] == ["yes"]
        assert recovery["WantedBy"] == ["multi-user.target"]
        assert recovery["ExecStart"] == ["/opt/opsctl/agent/bin/opsctl-host recover"]

    def test_it_waits_for_the_disk_with_the_weights(self) -> None:
        assert "/srv/opsctl" in self.unit["RequiresMountsFor"][0].split()

    def test_what_trying_again_cannot_mend_is_not_tried_again(self) -> None:
        from opsctl.agent.launch import EXIT_REFUSED, EXIT_WRONG
        from opsctl.errors import ExitCode

        assert self.unit["RestartPreventExitStatus"] == [f"{EXIT_WRONG} {EXIT_REFUSED}"]
        for code in (EXIT_WRONG, EXIT_REFUSED):  # an engine that ends with it must be started again
            assert code not in set(ExitCode) and 78 < code < 124

    def test_nothing_brings_a_device_policy_along(self) -> None:
        # Each of these implies DeviceAllow=, and with it DevicePolicy=closed: no /dev/nvidia*.
        assert not {"ProtectClock", "DeviceAllow", "PrivateDevices", "DevicePolicy"} & self.unit.keys()


def test_the_agent_never_gives_up() -> None:
    unit = settings(render(AGENT))
    assert unit["Type"] == ["notify"]
    assert unit["Restart"] == ["always"]
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert int(unit["WatchdogSec"][0]) > 0
    assert unit["User"] == ["opsctl-agent"]


def test_the_agent_can_read_gpus_and_never_kills_who_reads_them() -> None:
    unit = settings(render(AGENT))
    assert not {"ProtectClock", "DeviceAllow", "PrivateDevices", "DevicePolicy"} & unit.keys()  # no /dev/nvidia* then
    assert (unit["SendSIGKILL"], unit["TimeoutStopFailureMode"], unit["OOMPolicy"]) == (["no"], ["abort"], ["continue"])
    assert unit["RuntimeDirectory"] == ["opsctl/agent"]
    assert Paths().gpus.parent == Path("/run") / unit["RuntimeDirectory"][0] == Paths().gpu_reader_lock.parent
    assert unit["RuntimeDirectoryPreserve"] == ["yes"]  # the lock of a reader that was left behind
    assert "systemd-journal" in unit["SupplementaryGroups"][0].split()


class TestSetter:
    unit = settings(render(SETTER))

    def test_it_restores_however_it_ends_and_is_never_killed_inside_the_driver(self) -> None:
        assert self.unit["ExecStart"] == ["/opt/opsctl/agent/bin/opsctl-setter"]
        assert self.unit["ExecStopPost"] == ["/opt/opsctl/agent/bin/opsctl-setter restore"]
        assert (self.unit["SendSIGKILL"], self.unit["Restart"], self.unit["StartLimitIntervalSec"]) == (
            ["no"], ["always"], ["0"])
        assert int(self.unit["TimeoutStopSec"][0]) > RESTORE_S

    def test_it_has_of_root_what_the_driver_asks_for(self) -> None:
        assert self.unit["User"] == ["root"]
        assert self.unit["CapabilityBoundingSet"] == ["CAP_SYS_ADMIN"]
        # no /dev/nvidia* with the first four, no ctypes with the last
        assert not {"ProtectClock", "DeviceAllow", "PrivateDevices", "DevicePolicy",
                    "MemoryDenyWriteExecute"} & self.unit.keys()

    def test_its_socket_is_for_the_agents_group(self) -> None:
        assert self.unit["Group"] == settings(render(AGENT))["Group"]
        assert (self.unit["RuntimeDirectory"], self.unit["RuntimeDirectoryMode"]) == (["opsctl/setter"], ["0750"])
        assert Paths().setter_socket.parent == Path("/run") / self.unit["RuntimeDirectory"][0]
        assert Paths().setter_state.parent == Path("/var/lib") / self.unit["StateDirectory"][0]
        assert str(Paths().boot_id.parent) in self.unit["ReadWritePaths"][0].split()

    def test_the_agent_ends_before_it_and_runs_without_it(self) -> None:
        agent = settings(render(AGENT))
        assert "opsctl-setter.service" in agent["After"][0].split()
        assert "opsctl-setter.service" in agent["Wants"][0].split()
        assert not {"Requires", "BindsTo", "PartOf"} & agent.keys()
        assert Paths().guard_state.parent == Path("/var/lib") / agent["StateDirectory"][0]
        assert not {"After", "Requires"} & self.unit.keys()  # the agent, and with it the voice, would wait for it


@pytest.mark.parametrize("given", [{}, {"less_margin_c": 4, "slowed_margin_c": "-1.5", "flap_descents": 6}])
def test_the_guard_reads_the_numbers_that_the_role_writes(tmp_path: Path, given: dict[str, Any]) -> None:
    text = render("roles/agent/templates/guard.toml.j2", agent_guard_policy=given)
    file = tmp_path / "guard.toml"
    file.write_text(text)
    assert read_policy(file) == replace(Policy(), **{key: float(value) for key, value in given.items()})
    assert read_flat(text) == tomllib.loads(text)


def test_the_agent_reads_what_the_role_writes(tmp_path: Path) -> None:
    text = render("roles/agent/templates/agent.toml.j2", agent_host='gpu"1', agent_listen="10.0.0.2",
                  agent_check_port=9777, agent_gateway_url="http://10.0.0.1:8480", agent_exporter_port=9400,
                  agent_gpus=["GPU-a", "GPU-b"])
    assert tomllib.loads(text) == {"host": 'gpu"1', "listen": "10.0.0.2", "agent_check_port": 9777,
                                   "exporter_port": 9400, "gpus": ["GPU-a", "GPU-b"],
                                   "gateway_url": "http://10.0.0.1:8480"}
    assert read_flat(text) == tomllib.loads(text)
    settings_file = tmp_path / "etc/opsctl/agent.toml"
    settings_file.parent.mkdir(parents=True)
    settings_file.write_text(text)
    assert read_settings(Paths(tmp_path)) == Settings('gpu"1', "10.0.0.2", 9777, "http://10.0.0.1:8480", 9400,
                                                      ("GPU-a", "GPU-b"))


PLACEMENT = {"instance": "chat.1", "service": "chat", "index": 1, "host": "gpu-1", "address": "10.0.0.2", "port": 8101,
             "gpus": ("GPU-a", "GPU-b"), "tensor_parallel": 2, "min_serving": 3,
             "statistics": ["http://10.0.0.1:8404/;csv", "http://[fd00::1]:8404/;csv"]}


@pytest.mark.parametrize("gpus", [(), ("GPU-a", "GPU-b")])
def test_a_placement_is_read_back_as_it_was_dealt(tmp_path: Path, gpus: tuple[str, ...]) -> None:
    text = render("roles/inference/templates/placement.toml.j2", item=PLACEMENT | {"gpus": gpus})
    wanted = {key: value for key, value in PLACEMENT.items() if key != "host"}
    assert tomllib.loads(text) == wanted | {"gpus": list(gpus)}
    (tmp_path / "etc/opsctl/instances").mkdir(parents=True)
    (tmp_path / "etc/opsctl/instances/chat.1.toml").write_text(text)
    placement = read_placement(Paths(tmp_path), "chat.1")
    assert (placement.gpus, placement.min_serving, list(placement.statistics)) == (gpus, 3, PLACEMENT["statistics"])


def test_the_reader_of_hosts_without_tomllib_reads_it_too() -> None:
    text = render("roles/inference/templates/placement.toml.j2", item=PLACEMENT)
    assert read_flat(text) == tomllib.loads(text)


def test_an_instance_waits_for_its_own_release() -> None:
    dropin = settings(render("roles/inference/templates/placement.conf.j2", item=PLACEMENT))
    assert dropin["ConditionPathExists"] == ["/srv/opsctl/chat/current.1"]


def test_haproxy_saves_before_it_reloads_and_before_it_stops() -> None:
    unit = settings(render("templates/haproxy.service.conf.j2"))
    assert unit["ExecReload"][0] == "", "the package's own lines stay in front otherwise"
    programs = [line.split()[0].rsplit("/", 1)[-1] for line in unit["ExecReload"][1:]]
    assert programs == ["haproxy", "haproxy-state", "kill"]
    assert unit["ExecStop"] == ["/usr/local/lib/opsctl/haproxy-state stop"]
