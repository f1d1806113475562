"""The way of opsctl drift: hosts are asked, one is silent, and the verb answers with words and an exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from check_kit import overlaid
from drift_kit import FIXTURES, expected, host, load
from session_server import Server, make_key, serving
from typer.testing import CliRunner

from opsctl.checking.model import Captured
from opsctl.checking.sending import program
from opsctl.cli import main
from opsctl.cli.drift import document, render, verdict
from opsctl.drifting.differences import drift_of
from opsctl.drifting.hosts import PROBE, blacklist, bundle_versions, drift_of_hosts, expected_of
from opsctl.engines.events import Event, TaskResult
from opsctl.errors import ExitCode, OpsctlError
from opsctl.fleet.model import Fleet, Host
from opsctl.stack.lock import Entry, Lock

INVENTORY = ("[gpu]\ngpu-1 ansible_connection=local service_address=127.0.0.1 management_address=127.0.0.1 "
             "nvidia_driver_version=580.126.09\n[lb]\ngpu-1\n[gateway]\ngpu-1\n")


@pytest.fixture(scope="module")
def client_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("client") / "login")


@pytest.fixture
def server(tmp_path: Path, client_key: Path) -> Iterator[Server]:
    with serving(tmp_path / "server", client_key) as running:
        yield running


def fleet_of(folder: Path, server: Server, client_key: Path) -> Fleet:
    (folder / "known_hosts").write_text(server.pin, encoding="utf-8")
    one = Host("gpu-1", "127.0.0.1", ("gpu", "gateway"), user="ann", port=server.port, identity_file=str(client_key),
               service_address="127.0.0.1", variables={"nvidia_driver_version": "580.126.09"})
    silent = Host("gpu-2", "127.0.0.1", ("gpu",), user="ann", port=9, identity_file=str(client_key))
    return Fleet(folder, folder / "inventory.ini", (one, silent), ())


def python3(folder: Path, script: str) -> None:
    path = folder / "server" / "bin" / "python3"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_silent_host_is_named_and_the_others_are_compared(tmp_path: Path, server: Server, client_key: Path) -> None:
    (tmp_path / "said.json").write_text(json.dumps(host()))
    python3(tmp_path, f'cat > {tmp_path}/heard; echo "$2" > {tmp_path}/asked; cat {tmp_path}/said.json')
    fleet = fleet_of(tmp_path, server, client_key)
    heard: list[Event] = []
    found = drift_of_hosts(fleet, fleet.hosts, heard.append)
    assert (tmp_path / "heard").read_bytes() == program(PROBE)
    assert {"*nvidia*", "libcuda1", "ca-certificates", "nginx-light"} <= set(json.loads((
        tmp_path / "asked").read_text())["packages"])
    one, silent = found["gpu-1"], found["gpu-2"]
    assert not isinstance(one, OpsctlError)
    assert {each.layer for each in one.differences} == {"roles"}
    assert isinstance(silent, OpsctlError)
    assert {event.host: event.status for event in heard if isinstance(event, TaskResult)} == {
        "gpu-1": "failed", "gpu-2": "unreachable"}
    assert verdict(found) is ExitCode.REFUSED
    said = document(found)
    assert [each["host"] for each in said["unreachable"]] == ["gpu-2"]
    assert said["unreachable"][0]["error"]["hint"]


@pytest.mark.parametrize(("script", "code"), [
    ("exit 127", "drift.no_python"), ("echo no; exit 1", "drift.no_probe"),
    ("""echo '{"commands": {"dpkg-list": {"exit": null, "out": ""}}}'""", "drift.no_dpkg"),
    ("""echo '{"commands": {"dpkg-list": {"exit": 0, "out": ""}}, "late": ["files"]}'""", "drift.no_dpkg"),
])
def test_a_host_that_cannot_be_looked_at(tmp_path: Path, server: Server, client_key: Path, script: str, code: str
                                         ) -> None:
    python3(tmp_path, script)
    fleet = fleet_of(tmp_path, server, client_key)
    (answer,) = drift_of_hosts(fleet, fleet.hosts[:1]).values()
    assert isinstance(answer, OpsctlError)
    assert answer.code == code
    assert answer.hint


def test_what_is_wanted_of_a_host(tmp_path: Path) -> None:
    own = Host("gpu-1", "192.0.2.2", ("gpu", "gateway"), service_address="192.0.2.2", gpus=("GPU-1",),
               variables={"nvidia_driver_version": "580.126.09"}, locked={"nvidia_driver_version": "580.126.09"})
    fleet = Fleet(tmp_path, tmp_path / "inventory.ini", (own,), ())
    entry = Entry({"2335": 1}, "debian12", 580, "580.126.09", "open", fabric_manager=False, cuda="13.0")
    found = expected_of(fleet, own, Lock({"gpu-1": entry}))
    assert (found.source, found.entry, found.wanted.driver, found.wanted.gpu_uuids) == (
        "stack.lock", entry, "580.126.09", ("GPU-1",))
    assert "python3-apt" in found.packages
    assert "nginx-common" in found.holds
    written = Host(**{**vars(own), "locked": {}})
    assert expected_of(fleet, written, None).source == "the inventory"
    assert blacklist().startswith("// Written by opsctl")
    assert '  "libnvidia-";\n' in blacklist()


def test_versions_are_those_of_the_bundle_beside_the_inventory(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, tmp_path / "inventory.ini", (), ())
    assert bundle_versions(fleet, "bookworm") is None
    index = tmp_path / "bundle/apt/dists/bookworm/main/binary-amd64/Packages"
    index.parent.mkdir(parents=True)
    index.write_text("Package: haproxy\nVersion: 2.6\n")
    assert bundle_versions(fleet, "bookworm") == {"haproxy": {"2.6"}}
    assert bundle_versions(fleet, "") is None
    assert bundle_versions(Fleet(**{**vars(fleet), "package_source": "upstream"}), "bookworm") is None


def test_what_a_person_sees() -> None:
    document_ = load(FIXTURES / "cases/packages/other-version.yml").document
    document_["commands"]["dpkg-list"]["out"] = document_["commands"]["dpkg-list"]["out"].replace(
        "nvidia-modprobe\tamd64\t580.126.09-1\thold", "nvidia-modprobe\tamd64\t580.126.09-1\tinstall").replace(
        "nvidia-driver-cuda\tamd64\t580.126.09-1\thold", "nvidia-driver-cuda\tamd64\t580.126.09-1\tinstall")
    document_["logs"]["history"] = ""
    document_["logs"]["dpkg"] = document_["logs"]["dpkg"].replace("2026-11-21 14:20", "2026-11-19 14:20")
    found = {"gpu-1": drift_of(Captured(document_), expected()),
             "gpu-2": drift_of(Captured(host()), expected()),
             "gpu-3": drift_of(Captured(overlaid(host(), {"files": {"/etc/opsctl": None}})), expected()),
             "gpu-4": OpsctlError("host.silent", "gpu-4: does not answer.", hint="ssh gpu-4")}
    lines = [str(line) for line in render(found).renderables]
    assert lines[0] == ("gpu-1: 3 differences; driver 580.126.09; boots next into 6.1.0-28-amd64 (the link /vmlinuz) "
                        "with it")
    assert lines[1:6] == [
        "  differs  packages: libnvidia-ml1", "    wanted    580.126.09-1", "    there is  595.71.05-1",
        "    by        dpkg without apt, 2026-11-22 02:47:58, upgrade 580.126.09-1 -> 595.71.05-1",
        "    type      opsctl provision --limit gpu-1"]
    assert [line for line in lines if "holds" in line] == ["  differs  holds: nvidia-driver-cuda", "  differs  holds: "
                                                           "nvidia-modprobe"]
    assert "    by        no log that is kept tells who" in lines
    assert lines[-4].startswith("gpu-2: nothing differs; driver 580.126.09; boots next")
    assert lines[-3:] == ["gpu-3: never provisioned, so not compared", "gpu-4: does not answer.", "  $ ssh gpu-4"]


@pytest.mark.parametrize(("case", "exit_code"), [("record/the-same", 0), ("holds/taken-under-sudo", 10)])
def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, exit_code: int) -> None:
    (tmp_path / "inventory.ini").write_text(INVENTORY)
    (tmp_path / "services.yml").write_text("chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n")
    captured = Captured(load(FIXTURES / f"cases/{case}.yml").document)
    monkeypatch.setattr("opsctl.drifting.hosts.capture", lambda _session, _packages: captured)
    monkeypatch.setattr("opsctl.drifting.hosts.expected_of", lambda _fleet, _host, _lock: expected(bundle=None))
    said = CliRunner().invoke(main.app, ["drift", str(tmp_path / "inventory.ini"), "--json"])
    assert said.exit_code == exit_code, said.stderr
    found = json.loads(said.stdout)
    assert found["schema"] == "opsctl.drift/v1"
    assert set(found) == {"schema", "hosts", "unreachable", "differences"}
    (one,) = found["hosts"]
    assert set(one) == {"host", "differences", "driver", "skipped", "unknown", "next_boot", "kernels"}
    assert found["differences"] == len(one["differences"]) == (1 if exit_code else 0)
    assert one["next_boot"]["release"] == "6.1.0-28-amd64"
    if exit_code:
        (difference,) = one["differences"]
        assert difference["culprit"]["user"] == "ann"
        assert difference["fix"] == "opsctl provision --limit gpu-1"
    said = CliRunner().invoke(main.app, ["drift", str(tmp_path / "inventory.ini")])
    assert said.exit_code == exit_code
    assert said.stdout.startswith("gpu-1: 1 difference;" if exit_code else "gpu-1: nothing differs;")


def test_a_wrong_turn(tmp_path: Path) -> None:
    said = CliRunner().invoke(main.app, ["drift", str(tmp_path / "inventory.ini")])
    assert said.exit_code == 3
    assert "there is no inventory at" in said.stderr
    (tmp_path / "inventory.ini").write_text(INVENTORY)
    (tmp_path / "services.yml").write_text("chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n")
    (tmp_path / "stack.lock").write_text("schema: 1\n")
    said = CliRunner().invoke(main.app, ["drift", str(tmp_path / "inventory.ini"), "--json"])
    assert said.exit_code == 3
    assert json.loads(said.stdout)["error"]["code"].startswith("stack_lock.")
