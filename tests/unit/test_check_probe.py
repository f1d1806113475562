"""The probe of opsctl check, run for real on this machine, and the way from a host to its findings."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from check_kit import host, overlaid, read
from session_server import Server, make_key, serving
from typer.testing import CliRunner

from opsctl.agent.manifest import MANIFEST, Engine, Release, ReleaseFile
from opsctl.checking import probe
from opsctl.checking.hosts import PROBE, check_hosts, sizes, wanted_of
from opsctl.checking.model import Captured, Wanted
from opsctl.checking.sending import program
from opsctl.checking.table import findings_for
from opsctl.cli import main
from opsctl.engines.events import Event, TaskResult
from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.resources import resource

INVENTORY = ("[gpu]\ngpu-1 ansible_connection=local service_address=127.0.0.1 management_address=127.0.0.1 "
             "nvidia_driver_version=580.105.08 gpu_model=H100\n[lb]\ngpu-1\n[gateway]\ngpu-1\n[monitor]\ngpu-1\n")


def probed(folder: Path, argument: str = "{}", **environment: str) -> dict[str, object]:
    """What the probe prints here, with its scratch folder below ``folder`` and apt's sources from there."""
    (folder / "apt.conf").write_text(f'Dir::Etc::sourcelist "{folder}/x.list";\nDir::Etc::sourceparts "/dev/null";\n')
    (folder / "x.list").touch()
    (folder / "tmp").mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-", argument], input=program(PROBE), capture_output=True, check=True,
                          env={**os.environ, "TMPDIR": str(folder / "tmp"), "APT_CONFIG": str(folder / "apt.conf"),
                               **environment})
    assert done.stderr == b""
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_probe_runs_here_and_its_words_are_judged(tmp_path: Path) -> None:
    lists = Path("/var/lib/apt/lists")
    before = lists.stat().st_mtime_ns
    document = probed(tmp_path, '{"gateway": "http://127.0.0.1:9"}')
    assert list((tmp_path / "tmp").iterdir()) == [], "the scratch folder is gone"
    assert lists.stat().st_mtime_ns == before, "apt's own lists were left alone"
    captured = Captured(document, (0.01,))
    assert captured.exit("dpkg-audit") in (0, 1)
    assert captured.exit("apt-update") == 0, captured.out("apt-update")
    assert captured.file("/proc/meminfo")
    assert {one["path"] for one in captured.rows("disks")} == {"/", "/boot", "/var", "/opt", "/srv"}
    assert document["bundle"] == {"url": document["bundle"]["url"], "status": 0,  # type: ignore[index]
                                  "error": "[Errno 111] Connection refused"}
    said = {one.id: one for one in findings_for("here", captured, Wanted("here", package_source="upstream"))}
    assert said["memory"].verdict == "pass"
    assert said["apt-sources"].verdict == "fix", "it was given no sources"


def test_real_apt_says_that_a_source_is_silent_and_that_one_is_not_signed(tmp_path: Path) -> None:
    bare = tmp_path / "repository" / "dists" / "stable"
    bare.mkdir(parents=True)
    (bare / "Release").write_text("Origin: x\nSuite: stable\nDate: Sun, 22 Nov 2026 10:00:00 UTC\n")
    (tmp_path / "x.list").write_text("deb http://127.0.0.1:9/deb stable main\n"
                                     f"deb file:{tmp_path}/repository stable main\n")
    captured = Captured(probed(tmp_path))
    said = {one.id: one for one in findings_for("here", captured, Wanted("here", package_source="upstream"))}
    assert said["apt-sources"].verdict == "fix", captured.out("apt-update")
    assert "http://127.0.0.1:9/deb: Could not connect" in said["apt-sources"].what
    assert said["apt-keys"].verdict == "fix"
    assert f"file:{tmp_path}/repository" in said["apt-keys"].what


def test_the_probe_is_python_3_8() -> None:
    tree = ast.parse(program(PROBE).decode(), feature_version=(3, 8))
    newer = {"removeprefix", "removesuffix", "readlink", "batched", "pairwise"}  # methods of 3.9 and later
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert used & newer <= {"readlink"}, "os.readlink is old"
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)
    for node in ast.walk(tree):  # annotations are not evaluated; what runs must not subscript builtins
        assert not isinstance(node, ast.Match | ast.TryStar)


@pytest.mark.parametrize("script", ["trap '' TERM; sleep 60", "echo begun; setsid sleep 3 & sleep 60"])
def test_a_program_that_hangs_is_left_behind(script: str) -> None:
    began = time.monotonic()
    said = probe.run(["sh", "-c", script], 0.3)
    assert said["exit"] is None
    assert time.monotonic() - began < 2.5


def test_programs_that_are_missing_and_that_fail() -> None:
    assert probe.run(["no-such-program"], 5.0) == {"exit": 127, "out": ""}
    assert probe.run(["sh", "-c", "echo a; echo b >&2; exit 3"], 5.0) == {"exit": 3, "out": "a\nb\n"}


def test_nvidia_smi_is_not_asked_where_no_driver_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    monkeypatch.setattr(os.path, "exists", lambda path: path in there)
    assert not [name for name in probe.programs("/tmp/x", "") if name.startswith(("nvidia", "nvlink"))]
    there.add("/proc/driver/nvidia/version")
    assert {"nvidia-smi", "nvidia-smi-csv", "nvlink"} <= set(probe.programs("/tmp/x", ""))


def test_who_holds_a_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock-frontend"
    lock.touch()
    monkeypatch.setattr(probe, "LOCKS", (str(lock), str(tmp_path / "missing")))
    assert probe.locks() == []
    text = (f"import fcntl; file = open({str(lock)!r}, 'w'); fcntl.lockf(file, {fcntl.LOCK_EX}); print(flush=True); "
            "input()")
    with subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        (found,) = probe.locks()
        holder.communicate(b"\n")
    assert found["pid"] == holder.pid
    assert found["name"].startswith("python")
    assert found["lock"] == str(lock)


def test_the_xml_loses_its_clocks_alone() -> None:
    said = "<gpu><supported_clocks>\n<value>1</value></supported_clocks><processes/></gpu>"
    assert probe.shortened(said) == "<gpu><processes/></gpu>"


# From here on hosts are asked.

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
               service_address="127.0.0.1")
    silent = Host("gpu-2", "127.0.0.1", ("gpu",), user="ann", port=9, identity_file=str(client_key))
    return Fleet(folder, folder / "inventory.ini", (one, silent), ())


def test_a_silent_host_is_a_finding_and_the_others_are_told(tmp_path: Path, server: Server, client_key: Path) -> None:
    path = tmp_path / "server" / "bin" / "python3"
    path.write_text(f"#!/bin/sh\ncat > {tmp_path}/heard\necho '{json.dumps({'root': True, 'locks': []})}'\n")
    path.chmod(0o755)
    fleet = fleet_of(tmp_path, server, client_key)
    heard: list[Event] = []
    found = check_hosts(fleet, fleet.hosts, heard.append)
    assert (tmp_path / "heard").read_bytes() == program(PROBE)
    assert list(found) == ["gpu-1", "gpu-2"]
    said = {one.id: one for one in found["gpu-1"]}
    assert (said["dpkg-lock"].verdict, said["ssh-latency"].verdict) == ("pass", "pass")
    (silent,) = found["gpu-2"]
    assert (silent.id, silent.verdict, silent.stops_provision) == ("reachable", "fix", True)
    assert "does not answer" in silent.what
    assert "ssh -F" in silent.fix
    assert {event.host: event.status for event in heard if isinstance(event, TaskResult)} == {
        "gpu-1": "ok", "gpu-2": "unreachable"}


@pytest.mark.parametrize(("script", "code"), [("exit 127", "there is no python3"), ("echo no; exit 1", "exit code 1")])
def test_a_host_that_cannot_run_the_probe(tmp_path: Path, server: Server, client_key: Path, script: str, code: str
                                          ) -> None:
    path = tmp_path / "server" / "bin" / "python3"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    fleet = fleet_of(tmp_path, server, client_key)
    ((one,),) = check_hosts(fleet, fleet.hosts[:1]).values()
    assert one.id == "reachable"
    assert code in one.what


def test_what_is_wanted_of_a_host(tmp_path: Path) -> None:
    gateway = Host("gw", "192.0.2.1", ("gateway",), service_address="192.0.2.1")
    one = Host("gpu-1", "192.0.2.2", ("gpu",), gpus=("GPU-1",), variables={
        "nvidia_driver_version": "580.105.08", "gpu_model": "H100"})
    fleet = Fleet(tmp_path, tmp_path / "inventory.ini", (gateway, one), (Service("chat", "gpu", 8100, 8000),))
    assert wanted_of(fleet, one) == Wanted("gpu-1", ("gpu",), "gateway", "http://192.0.2.1:8480", "580.105.08", "",
                                           "H100", "auto", ("GPU-1",), 0, 0)
    assert wanted_of(fleet, gateway).gateway == ""
    broken = tmp_path / "bundle" / "releases" / "chat" / "v1-0"
    broken.mkdir(parents=True)
    (broken / MANIFEST).write_text("no manifest")
    assert list(sizes(broken.parent)) == []
    for version, size in (("v1", 700), ("v2", 900)):
        folder = broken.parent / f"{version}-1"
        folder.mkdir()
        (folder / MANIFEST).write_bytes(Release(
            "chat", version, "2026-11-22T10:00:00Z", Engine("llamacpp", "1.0", ">=3.10", "x==1 --hash=sha256:0\n"), {},
            (ReleaseFile("model.gguf", size, "0" * 64),)).to_bytes())
    wanted = wanted_of(fleet, one)
    assert (wanted.release_bytes, wanted.least_release_bytes) == (900, 700)


@pytest.mark.parametrize(("change", "exit_code"), [({}, 0), ({"files": {"/proc/sys/vm/overcommit_memory": "2"}}, 0), (
    {"commands": {"modprobe-config": {"out": ""}}, "files": {"/proc/modules": "nouveau 1 0 - Live 0x0\n"}}, 9)])
def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], exit_code: int) -> None:
    (tmp_path / "inventory.ini").write_text(INVENTORY)
    (tmp_path / "services.yml").write_text("chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n")
    captured, _ = read(overlaid(host("gpu-host"), change))
    monkeypatch.setattr("opsctl.checking.hosts.capture", lambda _session, _wanted: captured)
    said = CliRunner().invoke(main.app, ["check", str(tmp_path / "inventory.ini"), "--json"])
    assert said.exit_code == exit_code, said.stderr
    document = json.loads(said.stdout)
    assert document["schema"] == "opsctl.check/v1"
    assert set(document) == {"schema", "hosts", "counts"}
    assert set(document["hosts"][0]["findings"][0]) == {"id", "title", "verdict", "what", "fix", "stops_provision"}
    said = CliRunner().invoke(main.app, ["check", str(tmp_path / "inventory.ini")])
    assert said.exit_code == exit_code
    first, *rest = said.stdout.splitlines()
    assert first.startswith("gpu-1: ")
    assert "passed" in first
    assert all(line.startswith(("  FIX ", "  WARN", "        ")) for line in rest), "what passed is folded into a count"
    assert ("  FIX   nouveau-loaded" in said.stdout) is (exit_code == 9)
    if exit_code == 9:
        assert rest[0].startswith("  FIX "), "the worst comes first"
        assert "$ opsctl exec --limit gpu-1 -- sh -c" in rest[1]
    every = CliRunner().invoke(main.app, ["check", str(tmp_path / "inventory.ini"), "--all"])
    assert "  PASS  gpu-count" in every.stdout


def test_the_worst_host_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inventory.ini").write_text(INVENTORY.replace("127.0.0.1", "192.0.2.8").replace(
        "[lb]", "gpu-2 ansible_host=192.0.2.9\n[lb]"))
    (tmp_path / "services.yml").write_text("chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n")
    captured, _ = read(host("gpu-host"))

    def answer(session: object, wanted: Wanted) -> Captured:
        if wanted.host == "gpu-2":
            raise OpsctlError("host.unreachable", "gpu-2: nothing within 10 s.", hint="ssh -F .opsctl/ssh_config gpu-2")
        return captured

    monkeypatch.setattr("opsctl.checking.hosts.capture", answer)
    said = CliRunner().invoke(main.app, ["check", str(tmp_path / "inventory.ini")])
    assert said.exit_code == 9, said.stderr
    assert said.stdout.index("gpu-2: 1 FIX") < said.stdout.index("gpu-1: 0 FIX")
    assert re.search(r"^  FIX   reachable +nothing within 10 s\.$", said.stdout, re.MULTILINE)


def test_whatever_moves_with_a_driver_is_asked_for() -> None:
    """What is not in the list counts as a package of the site's own, which stops a change of the driver."""
    keep = resource("roles/nvidia_driver/files") / "driver_keep.py"
    patterns = re.search(r"^PATTERNS = (\(.*?\))$", keep.read_text(), re.MULTILINE | re.DOTALL)
    assert patterns is not None
    assert set(ast.literal_eval(patterns[1])) <= set(probe.PACKAGES)
