"""What base's preflight decides, and its programs that run on hosts."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from rendering import environment, render

from opsctl.resources import resource

FIXTURES = Path(__file__).parent / "fixtures" / "systems"
BASE = resource("roles") / "base"


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BASE / "files" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def systems(name: str) -> list[dict[str, str]]:
    return list(yaml.safe_load((FIXTURES / f"{name}.yml").read_text()))


class TestSystems:
    variables = yaml.safe_load((BASE / "vars" / "main.yml").read_text())

    def name_of(self, facts: dict[str, str]) -> str:
        return environment().from_string(self.variables["base_system"]).render(ansible_facts=facts)

    @pytest.mark.parametrize("facts", systems("known"), ids=lambda facts: facts["is"])
    def test_known(self, facts: dict[str, str]) -> None:
        assert self.name_of(facts) == facts["is"]
        assert facts["is"] in self.variables["base_supported_systems"]

    @pytest.mark.parametrize("facts", systems("refused"), ids=lambda facts: facts["is"])
    def test_refused(self, facts: dict[str, str]) -> None:
        assert self.name_of(facts) == facts["is"]
        assert facts["is"] not in self.variables["base_supported_systems"]


class TestListeners:
    listeners = program("listeners")

    def test_only_listening_sockets_on_our_ports_count(self) -> None:
        table = (
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
            "   0: 0100007F:2120 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0 100\n"
            "   1: 0100007F:2120 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 222 1 0 100\n"
            "   2: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 333 1 0 100\n")
        assert self.listeners.listening_sockets(table, {0x2120}) == {"socket:[111]": 0x2120}

    @pytest.mark.parametrize(("cgroup", "unit"), [
        ("0::/system.slice/nginx.service\n", "nginx.service"),
        ("1:name=systemd:/system.slice/system-inference.slice/inference@chat.0.service\n", "inference@chat.0.service"),
        ("0::/user.slice/user-0.slice/session-3.scope\n", "session-3.scope"),
        ("0::/\n", "no unit"),
    ])
    def test_the_unit_of_a_process(self, cgroup: str, unit: str) -> None:
        assert self.listeners.unit_of(cgroup) == unit

    def test_a_templates_instances_may_trade_ports(self) -> None:
        assert self.listeners.is_ours("inference@chat.1.service", "inference@chat.0.service")
        assert not self.listeners.is_ours("inference-old.service", "inference@chat.0.service")

    def test_a_foreign_listener_is_named(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            shown = subprocess.run([sys.executable, BASE / "files" / "listeners.py", f"{port}=nginx.service"],
                                   capture_output=True, text=True, check=True)
            found = json.loads(shown.stdout)
        assert [entry["port"] for entry in found] == [port]
        assert f"{port} is held by" in found[0]["sentence"]
        assert f"pid {os.getpid()}" in found[0]["sentence"]


class TestUnitIsStale:
    stale = program("unit_is_stale")
    moment = datetime(2026, 11, 22, 0, 47, 32, 250000, tzinfo=timezone.utc)
    shown = "Sun 2026-11-22 00:47:32.250000 UTC"

    @pytest.mark.parametrize(("older_s", "verdict"),
                             [(1.0, "fresh"), (0.001, "fresh"), (-0.001, "stale"), (-60, "stale")])
    def test_a_file_that_is_newer_makes_it_stale(self, older_s: float, verdict: str) -> None:
        assert self.stale.verdict(self.shown, [self.moment.timestamp() - older_s, 0.0]) == verdict

    def test_a_unit_that_never_ran_has_nothing_old_in_its_head(self) -> None:
        assert self.stale.verdict("", [9e9]) == "fresh"

    def test_a_unit_without_files_is_fresh(self) -> None:
        assert self.stale.verdict(self.shown, []) == "fresh"


def test_free_space_of_a_path_that_is_not_there_is_its_parents(tmp_path: Path) -> None:
    shown = subprocess.run([sys.executable, BASE / "files" / "free_space.py", tmp_path, tmp_path / "not" / "there"],
                           capture_output=True, text=True, check=True)
    here, not_there = json.loads(shown.stdout)
    assert here["free_mib"] == not_there["free_mib"] > 0


class TestApt:
    def test_the_source_is_signed_and_never_just_trusted(self) -> None:
        uri = "http://10.0.0.1:8480/apt"
        text = render("roles/base/templates/opsctl.sources.j2", base_apt_uri=uri, base_suite="bookworm")
        fields = dict(line.split(": ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert fields == {"Types": "deb", "URIs": uri, "Suites": "bookworm", "Components": "main",
                          "Signed-By": "/etc/opsctl/trust/bundle.asc"}

    def test_the_gateway_is_never_behind_a_proxy(self) -> None:
        text = render("roles/base/templates/apt.conf.j2", base_apt_uri="http://gw.local:8480/apt")
        assert 'Acquire::http::Proxy::gw.local "DIRECT";' in text
        assert "Proxy" not in render("roles/base/templates/apt.conf.j2", base_apt_uri="file:/srv/x").split("//")[-1]
