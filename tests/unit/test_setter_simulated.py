"""The setter as a process of its own, on the lab's NVML: what it sets, what it refuses, and that nothing stays set."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opsctl.agent.paths import Paths

pytest.importorskip("opsctl.lab.gpu.library", reason="this opsctl has no simulated GPUs")
import lab_gpu_kit

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not on this machine"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root sets clocks"),
]

GRACE_S = 0.6
INSTANCE = "setter-test.0"  # a unit that no machine has: systemctl says so at once
NOBODY = pwd.getpwnam("nobody")
PROGRAM = "from opsctl.agent.setter.program import main; main()"
AS_ROOT = ""
# Everything is imported first: nobody may read a home folder with a Python in it.
AS_NOBODY = (f"import pynvml, os, opsctl.agent.setter.program; os.setgroups([]); os.setgid({NOBODY.pw_gid}); "
             f"os.setuid({NOBODY.pw_uid}); ")


class Client:
    """A connection that holds what it sets."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")

    def ask(self, verb: str, **more: Any) -> dict[str, Any]:
        self.send(verb, **more)
        return self.hear()

    def send(self, verb: str, **more: Any) -> None:
        self.socket.sendall(json.dumps({"verb": verb, **more}).encode() + b"\n")

    def raw(self, line: bytes) -> dict[str, Any]:
        self.socket.sendall(line)
        return self.hear()

    def hear(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.file.readline())
        return answer

    def close(self) -> None:
        self.file.close()
        self.socket.close()


class Setter:
    """GPUs, and the setter's process on them."""

    def __init__(self, root: Path, gpus: lab_gpu_kit.Simulated) -> None:
        self.paths = Paths(root)
        self.gpus = gpus
        self.first, self.second = gpus.uuids
        self.paths.setter_socket.parent.mkdir(parents=True)
        self.paths.placements.mkdir(parents=True)
        (self.paths.placements / f"{INSTANCE}.toml").touch()
        self.processes: list[subprocess.Popen[str]] = []
        self.clients: list[Client] = []

    def program(self, *words: str, how: str = AS_ROOT, **more: Any) -> subprocess.Popen[str]:
        argv = [sys.executable, "-I", "-c", how + PROGRAM, "--root", str(self.paths.root), *words]
        process = subprocess.Popen(argv, env=self.gpus.environment, text=True, stderr=subprocess.PIPE, **more)
        self.processes.append(process)
        return process

    def serve(self, how: str = AS_ROOT, grace_s: float = GRACE_S) -> subprocess.Popen[str]:
        self.paths.setter_socket.unlink(missing_ok=True)
        process = self.program("--grace-s", str(grace_s), how=how)
        until(lambda: self.paths.setter_socket.exists() or process.poll() is not None)
        return process

    def restore(self, within_s: float = 5) -> tuple[int, str]:
        process = self.program("restore", "--within-s", str(within_s))
        _, said = process.communicate(timeout=20)
        return process.returncode, said

    def connect(self) -> Client:
        client = Client(self.paths.setter_socket)
        self.clients.append(client)
        return client

    def locked(self, gpu: int = 0) -> int:
        """The highest clock that is asked of a GPU; 0: the driver's own."""
        return int(self.gpus.state.machine.gpus[gpu].settings.locked_max_mhz)

    def watts(self, gpu: int = 0) -> float:
        return float(self.gpus.state.machine.gpus[gpu].settings.power_limit_mw) / 1000

    def person_sets(self, watts: int, gpu: int = 0) -> None:
        self.gpus.state.machine.gpus[gpu].settings.power_limit_mw = watts * 1000

    def hang(self, seconds: float, gpu: int = 0) -> None:
        self.gpus.state.machine.gpus[gpu].hang_until_ns = time.monotonic_ns() + int(seconds * 1e9)

    def written(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.paths.setter_state.read_text())
        return document

    def clean(self) -> None:
        for client in self.clients:
            client.close()
        for gpu in self.gpus.state.machine.gpus:
            gpu.hang_until_ns = 0
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=20)


def until(what: Callable[[], Any], within_s: float = 10) -> None:
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end, "that did not come"
        subprocess.run(["sleep", "0.05"], check=True)


@pytest.fixture(scope="module")
def library() -> Iterator[Path]:
    with lab_gpu_kit.built_library() as folder:
        yield folder


@pytest.fixture
def setter(tmp_path: Path, library: Path) -> Iterator[Setter]:
    with lab_gpu_kit.simulated(library, "H200") as gpus:
        one = Setter(tmp_path, gpus)
        try:
            yield one
        finally:
            one.clean()


def test_clocks_are_set_and_given_back(setter: Setter) -> None:
    setter.serve()
    client = setter.connect()
    assert client.ask("clocks", gpu=setter.first, max_mhz=900) == {"ok": True, "max_mhz": 900}
    assert (setter.locked(0), setter.locked(1)) == (900, 0)
    assert setter.written()["gpus"][setter.first]["max_mhz"] == 900
    assert client.ask("clocks", gpu=setter.first, max_mhz=700)["max_mhz"] == 700
    state = client.ask("state")
    assert (state["held"], state["gpus"]) == (True, {setter.first: {"max_mhz": 700, "watts": None}})
    assert client.ask("release", gpu=setter.first)["ok"]
    assert setter.locked() == 0
    assert setter.written()["gpus"] == {}
    assert client.ask("state")["gpus"] == {}
    said, _ = setter.program("state", stdout=subprocess.PIPE).communicate(timeout=10)
    assert json.loads(said) == {"ok": True, "held": False, "hangs": [], "gpus": {}}, "it is there, and holds nothing"


def test_clocks_above_the_highest_are_the_highest(setter: Setter) -> None:
    setter.serve()
    assert setter.connect().ask("clocks", gpu=setter.first, max_mhz=9999) == {"ok": True, "max_mhz": 1980}


def test_clocks_below_the_lowest_of_a_gpu_that_does_not_list_them_are_refused_and_not_written_down(
        setter: Setter) -> None:
    setter.serve()
    client = setter.connect()
    client.ask("clocks", gpu=setter.first, max_mhz=900)
    assert client.ask("clocks", gpu=setter.first, max_mhz=100)["code"] == "invalid"
    assert setter.locked() == setter.written()["gpus"][setter.first]["max_mhz"] == 900
    assert client.ask("clocks", gpu=setter.second, max_mhz=100)["code"] == "invalid"
    assert list(client.ask("state")["gpus"]) == [setter.first]


@pytest.mark.parametrize(("asked", "got"), [(350, 350), (5, 200), (690, 650), (9000, 650)])
def test_a_power_limit_is_set_within_what_the_gpu_takes_never_raised_and_restored(
        setter: Setter, asked: int, got: int) -> None:
    setter.person_sets(650)
    setter.serve()
    client = setter.connect()
    assert client.ask("power", gpu=setter.first, watts=asked) == {"ok": True, "watts": got}
    assert setter.watts() == got
    assert client.ask("power", gpu=setter.first, watts=400) == {"ok": True, "watts": 400}
    assert client.ask("power", gpu=setter.first, watts=690) == {"ok": True, "watts": 650}, "from there, not from ours"
    assert client.ask("release-all") == {"ok": True}
    assert setter.watts() == 650, "the limit that was there before the first of ours"


def test_a_power_limit_that_somebody_changed_is_theirs(setter: Setter) -> None:
    setter.serve()
    client = setter.connect()
    client.ask("power", gpu=setter.first, watts=350)
    client.ask("clocks", gpu=setter.first, max_mhz=900)
    setter.person_sets(500)
    answer = client.ask("release", gpu=setter.first)
    assert answer["ok"]
    assert "500 W" in answer["words"]
    assert (setter.watts(), setter.locked()) == (500, 0)
    client.ask("power", gpu=setter.first, watts=350)
    setter.person_sets(450)
    client.ask("power", gpu=setter.first, watts=300)
    client.ask("release", gpu=setter.first)
    assert setter.watts() == 450, "what a person set last, not what was there in the beginning"


def test_what_a_driver_made_of_a_limit_is_ours_and_not_a_persons(setter: Setter) -> None:
    setter.serve("import pynvml; plain = pynvml.nvmlDeviceSetPowerManagementLimit; "
                 "pynvml.nvmlDeviceSetPowerManagementLimit = lambda gpu, mw: plain(gpu, mw - mw % 25_000); ")
    client = setter.connect()
    assert client.ask("power", gpu=setter.first, watts=360) == {"ok": True, "watts": 350}
    assert client.ask("power", gpu=setter.first, watts=345) == {"ok": True, "watts": 325}
    assert client.ask("release", gpu=setter.first) == {"ok": True}
    assert setter.watts() == 700
    client.ask("power", gpu=setter.first, watts=360)
    setter.person_sets(360)
    assert "360 W" in client.ask("release", gpu=setter.first)["words"]


def test_what_a_killed_setter_had_set_is_restored(setter: Setter) -> None:
    process = setter.serve()
    client = setter.connect()
    client.ask("clocks", gpu=setter.first, max_mhz=900)
    client.ask("clocks", gpu=setter.second, max_mhz=800)
    client.ask("power", gpu=setter.second, watts=300)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert (setter.locked(0), setter.locked(1), setter.watts(1)) == (900, 800, 300), "clocks outlive who set them"
    code, said = setter.restore()
    assert code == 0, said
    assert (setter.locked(0), setter.locked(1), setter.watts(1)) == (0, 0, 700)
    assert setter.written()["gpus"] == {}
    assert setter.restore() == (0, "")


def test_a_start_restores_what_nobody_restored(setter: Setter) -> None:
    process = setter.serve()
    setter.connect().ask("clocks", gpu=setter.first, max_mhz=900)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    setter.serve(grace_s=3600)
    until(lambda: setter.written()["gpus"] == {})
    assert setter.locked() == 0


def test_without_a_holder_everything_is_restored_and_a_new_one_in_time_keeps_it(setter: Setter) -> None:
    setter.serve()
    holder, other = setter.connect(), setter.connect()
    holder.ask("clocks", gpu=setter.first, max_mhz=900)
    assert other.ask("state")["held"]
    holder.close()
    until(lambda: not other.ask("state")["held"])
    assert setter.locked() == 900
    new = setter.connect()
    new.ask("clocks", gpu=setter.first, max_mhz=900)
    subprocess.run(["sleep", str(2 * GRACE_S)], check=True)
    assert setter.locked() == 900, "the one that came back holds it"
    new.close()
    gone = time.monotonic()
    until(lambda: setter.locked() == 0)
    assert time.monotonic() - gone >= GRACE_S / 2
    assert other.ask("state")["gpus"] == {}, "who only asks holds nothing"


def test_what_nobody_asserts_again_is_restored_while_another_connection_holds_the_rest(setter: Setter) -> None:
    setter.serve()
    first, second = setter.connect(), setter.connect()
    first.ask("clocks", gpu=setter.first, max_mhz=900)
    first.ask("clocks", gpu=setter.second, max_mhz=800)
    second.ask("clocks", gpu=setter.second, max_mhz=700)
    first.close()
    gone = time.monotonic()
    until(lambda: setter.locked(0) == 0)
    assert time.monotonic() - gone >= GRACE_S / 2
    assert (setter.locked(1), second.ask("state")["held"]) == (700, True)


def test_who_released_all_that_it_set_holds_nothing_of_others(setter: Setter) -> None:
    setter.serve()
    first, second = setter.connect(), setter.connect()
    second.ask("clocks", gpu=setter.first, max_mhz=900)
    assert second.ask("release", gpu=setter.first)["ok"]
    first.ask("clocks", gpu=setter.first, max_mhz=900)
    assert second.ask("clocks", gpu=setter.second, max_mhz=100)["code"] == "invalid", "and this sets nothing"
    assert second.ask("clocks", gpu=setter.first, max_mhz=100)["code"] == "invalid"
    first.close()
    until(lambda: not second.ask("state")["held"])
    until(lambda: setter.locked() == 0)


def test_a_disk_that_hangs_holds_up_no_unit_and_nobody_who_only_asks(setter: Setter) -> None:
    setter.serve("from opsctl.agent.setter import book; import time; "
                 "book.write_atomically = lambda *_, **__: time.sleep(8); ")
    client = setter.connect()
    client.send("clocks", gpu=setter.first, max_mhz=900)
    subprocess.run(["sleep", "0.3"], check=True)
    began = time.monotonic()
    other = setter.connect()
    assert "systemctl stop" in other.ask("stop", instance=INSTANCE, how="now")["words"]
    assert "systemctl" in other.ask("start", instance=INSTANCE)["words"]
    assert other.ask("state")["ok"]
    assert time.monotonic() - began < 4
    assert client.hear()["code"] == "hangs"


def test_a_state_file_of_another_boot_is_forgotten(setter: Setter) -> None:
    process = setter.serve()
    setter.connect().ask("clocks", gpu=setter.first, max_mhz=900)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    setter.paths.boot_id.unlink()  # /run is empty after a boot
    assert setter.restore() == (0, "")
    assert setter.locked() == 900, "nobody touched it: somebody else may have set it since"
    setter.serve()
    assert setter.connect().ask("state")["gpus"] == {}


def test_a_gpu_that_hangs_holds_up_itself_alone(setter: Setter) -> None:
    process = setter.serve()
    client = setter.connect()
    client.ask("clocks", gpu=setter.first, max_mhz=1000)
    client.ask("clocks", gpu=setter.second, max_mhz=800)
    setter.hang(60)
    began = time.monotonic()
    assert client.ask("clocks", gpu=setter.first, max_mhz=900)["code"] == "hangs"
    assert time.monotonic() - began < 4
    began = time.monotonic()
    for _ in range(5):
        assert client.ask("clocks", gpu=setter.first, max_mhz=900)["code"] == "hangs"
    assert client.ask("clocks", gpu=setter.second, max_mhz=700)["ok"]
    answer = setter.connect().ask("stop", instance=INSTANCE, how="now")
    assert "systemctl stop" in answer["words"]
    assert client.ask("state")["hangs"] == [setter.first]
    assert time.monotonic() - began < 5, "nobody else waits, nor the same GPU each time"
    process.terminate()
    until(lambda: not _connects(setter))
    assert process.poll() is None, "it is never ended inside the driver"
    code, said = setter.restore(within_s=1)
    assert (code, setter.locked(1)) == (1, 0)
    assert f"{setter.first} is not restored" in said
    setter.hang(0)
    assert process.wait(10) == 0
    assert setter.locked(0) == 0, "what it set when the hang was over is undone by itself"


def test_an_order_that_nobody_waits_for_any_more_does_not_come_true_later(setter: Setter) -> None:
    setter.serve()
    first, second = setter.connect(), setter.connect()
    first.ask("clocks", gpu=setter.first, max_mhz=1000)
    setter.hang(60)
    first.send("clocks", gpu=setter.first, max_mhz=900)  # this one is in the driver when it hangs
    subprocess.run(["sleep", "0.3"], check=True)
    second.send("clocks", gpu=setter.first, max_mhz=500)
    assert (first.hear()["code"], second.hear()["code"]) == ("hangs", "hangs")
    setter.hang(0)
    until(lambda: first.ask("power", gpu=setter.first, watts=300)["ok"])  # its turn comes after theirs
    assert setter.locked() == 1000, "neither the one that was in the driver nor the one that waited"
    assert first.ask("state")["gpus"][setter.first]["max_mhz"] == 1000
    assert first.ask("release", gpu=setter.first)["ok"]
    setter.hang(60)
    first.ask("clocks", gpu=setter.first, max_mhz=900)
    setter.hang(0)
    until(lambda: first.ask("power", gpu=setter.first, watts=300)["ok"])
    assert setter.locked() == 0
    assert first.ask("release-all")["ok"]
    assert setter.watts() == 700


def test_a_gpu_that_is_not_there_or_lost(setter: Setter) -> None:
    setter.serve()
    client = setter.connect()
    assert client.ask("clocks", gpu="GPU-11111111-2222-3333-4444-555555555555", max_mhz=900)["code"] == "unknown_gpu"
    assert setter.connect().ask("stop", instance="other.0", how="drain")["code"] == "unknown_instance"
    client.ask("clocks", gpu=setter.first, max_mhz=900)
    setter.gpus.state.machine.gpus[0].lost = 1
    assert client.ask("clocks", gpu=setter.first, max_mhz=800)["code"] == "lost"
    assert client.ask("clocks", gpu=setter.second, max_mhz=800)["ok"]
    setter.gpus.state.machine.gpus[0].lost = 0
    assert client.ask("release-all")["ok"]
    assert (setter.locked(0), setter.locked(1)) == (0, 0)


def test_a_driver_that_comes_and_goes(setter: Setter) -> None:
    setter.gpus.state.machine.module_version = b""
    setter.serve()
    client = setter.connect()
    answer = client.ask("clocks", gpu=setter.first, max_mhz=900)
    assert (answer["code"], "Driver Not Loaded" in answer["words"]) == ("failed", True)
    setter.gpus.state.machine.module_version = lab_gpu_kit.VERSION.encode()
    assert client.ask("clocks", gpu=setter.first, max_mhz=900)["ok"]


def test_a_setter_that_the_driver_refuses_says_so_and_writes_nothing_down(setter: Setter) -> None:
    for folder in (setter.paths.setter_socket.parent, setter.paths.setter_state.parent):
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, NOBODY.pw_uid, NOBODY.pw_gid)
    setter.paths.boot_id.write_text("this\n")
    for folder in [setter.paths.root, *setter.paths.root.parents][:4]:
        folder.chmod(0o755)
    setter.serve(AS_NOBODY)
    client = setter.connect()
    for verb, more in (("clocks", {"max_mhz": 900}), ("power", {"watts": 300})):
        assert client.ask(verb, gpu=setter.first, **more)["code"] == "no_permission"
    assert client.ask("state")["gpus"] == {}
    assert setter.written()["gpus"] == {}


def test_only_root_and_the_agent_are_heard(setter: Setter) -> None:
    setter.serve()
    assert setter.paths.setter_socket.stat().st_mode & 0o777 == 0o660
    setter.paths.setter_socket.chmod(0o666)
    for folder in [setter.paths.setter_socket.parent, *setter.paths.setter_socket.parents][:7]:
        folder.chmod(folder.stat().st_mode | 0o055)
    asking = (AS_NOBODY + "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
              "print(s.recv(999).decode())")
    done = subprocess.run([sys.executable, "-c", asking, setter.paths.setter_socket], capture_output=True, text=True,
                          check=False)
    assert json.loads(done.stdout)["code"] == "no_permission", done.stderr


def test_lines_that_are_none_and_connections_that_are_too_many(setter: Setter) -> None:
    setter.serve()
    client = setter.connect()
    assert client.raw(b"hello\n")["code"] == "invalid"
    assert client.raw(b'{"verb":"shell"}\n')["code"] == "invalid"
    assert client.raw(b'{"verb":"state"}\n{"verb":"st')["ok"], "two in one piece, and one in two"
    assert client.raw(b'ate"}\n')["ok"]
    assert client.raw(b"x" * 5000)["words"] == "this line is too long"
    assert client.file.readline() == b""
    many = [setter.connect() for _ in range(17)]
    assert "most" in many[-1].hear()["words"]
    many[0].close()
    until(lambda: _is_heard(setter))


def _is_heard(setter: Setter) -> bool:
    try:
        return bool(setter.connect().ask("state")["ok"])
    except (OSError, ValueError):  # refused, and the end came before the question or the answer
        return False


def _connects(setter: Setter) -> bool:
    try:
        setter.connect()
    except OSError:
        return False
    return True
