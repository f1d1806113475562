"""The small programs that the gateway, the agent's role and the load balancer bring along."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from rendering import render

from opsctl.resources import resource


def program(role: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, resource("roles") / role / "files" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestPack:
    def test_only_what_is_named_with_the_gateways_owner_and_modes(self, tmp_path: Path) -> None:
        bundle = tmp_path / "bundle"
        (bundle / "apt" / "pool").mkdir(parents=True, mode=0o700)
        (bundle / "apt" / "pool" / "a b.deb").write_text("a")
        (bundle / "apt" / "pool" / "a b.deb").chmod(0o600)
        (bundle / "apt" / "other.deb").write_text("b")
        program("gateway", "pack").pack(bundle, tmp_path / "out.tar", ["apt/pool/a b.deb"])
        with tarfile.open(tmp_path / "out.tar") as tar:
            members = [(member.name, member.mode, member.uid, member.uname) for member in tar.getmembers()]
        assert members == [("apt", 0o755, 0, "root"), ("apt/pool", 0o755, 0, "root"),
                           ("apt/pool/a b.deb", 0o644, 0, "root")]

    def test_a_file_that_the_bundle_lacks_is_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "wheels").mkdir()
        pack = resource("roles") / "gateway" / "files" / "pack.py"
        done = subprocess.run([sys.executable, pack, tmp_path, tmp_path / "out.tar"], input="wheels/gone.whl\n",
                              capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(f"{tmp_path}/wheels/gone.whl: No such file")
        assert "Traceback" not in done.stderr


@pytest.fixture
def environment(tmp_path: Path) -> tuple[Path, Path]:
    """An environment as venv and pip leave it, as far as the check looks, and the requirement it was made from."""
    root = tmp_path / "agent"
    packages = root / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    dist_info = packages / "opsctl_agent-1.0+abcd.dist-info"
    files = {root / "bin" / "python3": "", root / "bin" / "opsctl-host": "host", packages / "pip" / "__main__.py": "",
             packages / "opsctl" / "a.py": "a = 1", dist_info / "METADATA": "Version: 1.0+abcd"}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def row(name: str) -> str:
        digest = base64.urlsafe_b64encode(hashlib.sha256((packages / name).read_bytes()).digest()).decode().rstrip("=")
        return f"{name},sha256={digest},1\n"

    (dist_info / "RECORD").write_text(
        row("../../../bin/opsctl-host") + row("opsctl/a.py") + "opsctl/__pycache__/a.cpython-311.pyc,,\n"
        f"{dist_info.name}/RECORD,,\n")
    requirements = tmp_path / "opsctl-agent.txt"
    requirements.write_text("opsctl-agent==1.0+abcd \\\n    --hash=sha256:00\n")
    return root, requirements


class TestVerifyEnvironment:
    verify = program("agent", "verify_environment")

    def test_intact(self, environment: tuple[Path, Path]) -> None:
        assert self.verify.verdict(*environment) == "intact"

    @pytest.mark.parametrize("gone", ["bin/opsctl-host", "opsctl/a.py"])
    def test_a_file_that_is_gone(self, environment: tuple[Path, Path], gone: str) -> None:
        next(path for path in environment[0].rglob(Path(gone).name)).unlink()
        assert self.verify.verdict(*environment) == "package"

    def test_a_file_that_was_edited(self, environment: tuple[Path, Path]) -> None:
        (environment[0] / "bin" / "opsctl-host").write_text("another")
        assert self.verify.verdict(*environment) == "package"

    def test_another_version_is_wanted(self, environment: tuple[Path, Path]) -> None:
        environment[1].write_text("opsctl-agent==1.0+ffff --hash=sha256:00\n")
        assert self.verify.verdict(*environment) == "package"

    @pytest.mark.parametrize(("version", "verdict"), [("2.1", "intact"), ("2.2", "package")])
    def test_every_package_of_the_file_counts(self, environment: tuple[Path, Path], version: str, verdict: str) -> None:
        root, requirements = environment
        (packages,) = root.glob("lib/*/site-packages")
        (packages / f"other_one-{version}.dist-info").mkdir()
        (packages / f"other_one-{version}.dist-info" / "RECORD").write_text(f"other_one-{version}.dist-info/RECORD,,\n")
        with requirements.open("a") as file:
            file.write("other-one==2.1 \\\n    --hash=sha256:00\n")
        assert self.verify.verdict(*environment) == verdict

    @pytest.mark.parametrize("gone", ["bin/python3", "lib"])
    def test_no_environment_to_speak_of(self, environment: tuple[Path, Path], gone: str) -> None:
        path = environment[0] / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert self.verify.verdict(*environment) == "environment"

    def test_nothing_at_all(self, tmp_path: Path) -> None:
        assert self.verify.verdict(tmp_path / "none", tmp_path / "none.txt") == "environment"


ANSWER = "1\n# be_id be_name srv_id\n2 chat 1 gpu-1.chat.0\n\n"


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[Path]:
    """A socket that answers as HAProxy's does."""
    path = tmp_path / "admin.sock"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                assert connection.recv(100) == b"show servers state\n"
                connection.sendall(ANSWER.encode())

    thread = threading.Thread(target=serve)
    thread.start()
    yield path
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


class TestHaproxyState:
    state = program("load_balancer", "haproxy_state")

    def test_a_reload_reads_what_the_old_process_knew(self, tmp_path: Path, admin: Path) -> None:
        self.state.hand_over("save", tmp_path / "state", admin)
        assert (tmp_path / "state").read_text() == ANSWER

    def test_an_orderly_stop_is_believed_once(self, tmp_path: Path, admin: Path) -> None:
        self.state.hand_over("stop", tmp_path / "state", admin)
        self.state.hand_over("start", tmp_path / "state", admin)
        assert (tmp_path / "state").read_text() == ANSWER
        self.state.hand_over("start", tmp_path / "state", admin)  # it crashed after that start
        assert "gpu-1.chat.0" not in (tmp_path / "state").read_text()

    def test_that_it_was_believed_outlives_a_power_cut(self, tmp_path: Path, admin: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
        self.state.hand_over("stop", tmp_path / "state", admin)
        lasting: list[set[str]] = []
        monkeypatch.setattr(os, "fsync", lambda file: lasting.append(
            {path.name for path in Path(f"/proc/self/fd/{file}").iterdir()}))
        self.state.hand_over("start", tmp_path / "state", admin)
        assert lasting[-1:] == [{"admin.sock", "state"}]

    def test_a_state_from_before_a_crash_is_thrown_away(self, tmp_path: Path, admin: Path) -> None:
        self.state.hand_over("save", tmp_path / "state", admin)
        self.state.hand_over("start", tmp_path / "state", admin)
        assert "gpu-1.chat.0" not in (tmp_path / "state").read_text()

    def test_the_first_start_has_a_state_to_read(self, tmp_path: Path) -> None:
        self.state.hand_over("start", tmp_path / "state", tmp_path / "nobody")
        assert (tmp_path / "state").read_text() == "1\n"

    def test_a_silent_haproxy_fails_the_reload(self, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = ["save", "--state", str(tmp_path / "s"), "--socket", str(tmp_path / "none")]
        monkeypatch.setattr(sys, "argv", ["haproxy-state", *arguments])
        assert self.state.main() == 1
        assert "haproxy-state save:" in capsys.readouterr().err
        assert not (tmp_path / "s").exists()


@pytest.mark.skipif(not Path("/usr/sbin/nginx").exists() or os.geteuid() != 0,
                    reason="nginx is not on this machine, or may not open its own logs: it needs root")
class TestNginx:
    check = resource("roles") / "gateway" / "files" / "nginx_check.py"

    def accepted(self, piece: Path) -> bool:
        return subprocess.run([sys.executable, self.check, piece], capture_output=True, check=False).returncode == 0

    def test_what_the_gateway_serves_is_accepted(self, tmp_path: Path) -> None:
        piece = tmp_path / "opsctl.conf"
        piece.write_text(render("roles/gateway/templates/nginx.conf.j2", gateway_addresses=["127.0.0.1", "::1"],
                                gateway_port=18480))
        assert self.accepted(piece)

    def test_what_is_on_its_way_to_the_gateway_is_not_served(self) -> None:
        text = render("roles/gateway/templates/nginx.conf.j2", gateway_addresses=["127.0.0.1"], gateway_port=18480)
        assert "location ~ /\\. {\n        return 404;" in text  # a regular expression goes before every prefix

    def test_a_broken_piece_is_refused(self, tmp_path: Path) -> None:
        piece = tmp_path / "opsctl.conf"
        piece.write_text("server { listen nowhere:; }\n")
        assert not self.accepted(piece)
