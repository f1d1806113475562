"""opsctl guard, top and drill thermal as they are typed, over SSH; the host's opsctl-host is the real one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import guard_kit
import pytest
from session_server import Server, make_key, serving
from typer.testing import CliRunner

from opsctl.cli import main
from opsctl.guarding.looking import QUICK
from opsctl.lab import laboratory
from opsctl.lab import state as lab_state
from opsctl.lab.gpu import faults, trees
from opsctl.lab.gpu.profiles import Gpus
from opsctl.releases.remote import HOST_PROGRAM

PROGRAM = """#!{python}
import os, sys
from pathlib import Path
from opsctl.agent import audit, guard_view, host, paths
with open({asked!r}, "a") as asked:
    asked.write(" ".join(sys.argv[1:]) + "\\n")
here = lambda: paths.Paths(Path({root!r}))
host.Paths = guard_view.Paths = here
os.geteuid = lambda: 0
audit.record = lambda *_: None
sys.exit(guard_view.main() if sys.argv[1] == "-I" else host.main())
"""
SERVICES = "chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n  gpus_per_instance: 2\n"
PLACEMENT = ('instance = "chat.0"\nservice = "chat"\nindex = 0\naddress = "127.0.0.1"\nport = 8100\ngpus = []\n'
             'tensor_parallel = 1\n')


@dataclass
class Place:
    """A fleet of one host that answers, and, when it is asked for, one that does not."""

    directory: Path
    root: Path
    login: str
    server: Server

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"OPSCTL_INVENTORY": str(self.directory / "inventory.ini"), "NO_COLOR": "1",
                             "COLUMNS": "160", "TZ": "UTC"}

    def opsctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "opsctl", *words], stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, check=False, env=self.environment, timeout=120)

    def document(self, *words: str, code: int = 0) -> Any:
        said = self.opsctl(*words, "--json")
        assert said.returncode == code, said.stderr
        return json.loads(said.stdout)

    def says(self, **changes: Any) -> None:
        """The guard of the host speaks, now."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        path = self.root / "run/opsctl/agent/guard.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(json.dumps(guard_kit.document(at_boot_s=now + 600, **changes)))
        path.with_suffix(".new").rename(path)

    def orders(self) -> dict[str, Any]:
        path = self.root / "var/lib/opsctl/guard-orders.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def asked(self) -> list[str]:
        path = self.root.parent / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def add_a_silent_host(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        text = self.inventory(f"two {self.login.format(port=port)} service_address=192.0.2.12 "
                              "management_address=192.0.2.12\n", "two\n")
        (self.directory / "inventory.ini").write_text(text)
        (self.directory / "known_hosts").write_text((self.directory / "known_hosts").read_text().replace(
            f"]:{self.port}", f"]:{port}") + (self.directory / "known_hosts").read_text())

    @property
    def port(self) -> int:
        return int((self.directory / "port").read_text())

    def inventory(self, host: str = "", member: str = "") -> str:
        apart = " service_address=192.0.2.11 management_address=192.0.2.11" if host else ""
        return (f"one {self.login.format(port=self.port)}{apart}\n{host}[gpu]\none\n{member}"
                + "".join(f"[{group}]\none\n" for group in ("lb", "monitor", "gateway")))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    key = make_key(tmp_path / "login")
    with serving(tmp_path / "server", key) as server:
        root = tmp_path / "root"
        program = tmp_path / "opsctl-host"
        program.write_text(PROGRAM.format(python=sys.executable, root=str(root), asked=str(tmp_path / "asked")))
        program.chmod(0o755)
        server.programs |= {HOST_PROGRAM: program, QUICK[0]: program}
        directory = tmp_path / "fleet"
        directory.mkdir()
        (directory / "known_hosts").write_text(server.pin)
        (directory / "services.yml").write_text(SERVICES)
        (directory / "port").write_text(str(server.port))
        login = (f"ansible_host=127.0.0.1 ansible_port={{port}} ansible_user=ann "
                 f"ansible_ssh_private_key_file={key}")
        found = Place(directory, root, login, server)
        (directory / "inventory.ini").write_text(found.inventory())
        (root / "etc/opsctl/instances").mkdir(parents=True)
        (root / "etc/opsctl/instances/chat.0.toml").write_text(PLACEMENT)
        found.says()
        yield found


def test_status_shows_each_instance_and_who_does_not_answer(place: Place) -> None:
    place.add_a_silent_host()
    place.says(gpus=[guard_kit.hot()], instances=[guard_kit.slowed()])
    found = place.document("guard", "status")
    one, two = found["instances"]
    assert (one["host"], one["word"], one["weight"], one["margin_c"], one["time_to_slowdown_s"]) == (
        "one", "slowed", 30, -1.0, 2.5)
    assert (two["host"], two["word"], two["level"]) == ("two", "unreachable", "bad")
    assert [entry["host"] for entry in found["silent"]] == ["two"]
    text = place.opsctl("guard", "status", "--limit", "one").stdout
    assert text.splitlines()[1].split()[:5] == ["one", "chat.0", "slowed", "30", "%"]


def test_explain_says_why_and_by_which_numbers(place: Place) -> None:
    place.says(gpus=[guard_kit.hot()], instances=[guard_kit.slowed()])
    (place.root / "etc/opsctl/guard.toml").write_text('less_margin_c = "4.5"\n')
    said = place.opsctl("guard", "explain", "one")
    assert said.returncode == 0, said.stderr
    for words in ("chat.0: rung 2, slowed for 12 s", "margin -1 °C, at most -1 °C: slowed", "less at 4.5",
                  "21:59:48  less -> slowed", "opsctl drain one:chat.0"):
        assert words in said.stdout
    assert place.document("guard", "explain", "one")["guard"]["policy"]["less_margin_c"] == 4.5
    assert place.document("guard", "explain", "three", code=2)["error"]["code"] == "fleet.no_such_host"


def test_mode_asks_changes_and_is_content(place: Place) -> None:
    place.says(mode="auto", enforcing=False, observed_s=3600.0, instances=[guard_kit.slowed(acts=False)])
    asked = place.opsctl("guard", "mode", "enforce")
    assert asked.returncode == 2
    assert "one   observes (auto, 23 h more)  enforces  chat.0: clocks at most 80 %" in asked.stderr
    assert place.orders() == {}
    assert place.document("guard", "mode", "enforce", "--yes")["hosts"] == ["one"]
    orders = place.orders()
    assert orders["mode"] == "enforce"
    assert "@" in orders["by"]
    place.says(mode="enforce")
    assert place.document("guard", "mode", "enforce")["changed"] == 0  # nothing to ask
    assert place.document("guard", "mode", "observe", "--yes")["hosts"] == ["one"]
    assert place.document("guard", "mode", "enforce", "--yes")["hosts"] == ["one"]  # before the guard read the first
    assert place.orders()["mode"] == "enforce"
    assert "invalid" in place.opsctl("guard", "mode", "full-speed").stderr.lower()


def test_mode_reaches_who_answers_and_says_who_did_not(place: Place) -> None:
    place.add_a_silent_host()
    found = place.document("guard", "mode", "observe", "--yes", code=8)
    assert (found["hosts"], list(found["failed"])) == (["one"], ["two"])
    assert place.orders()["mode"] == "observe"
    only = place.document("guard", "mode", "observe", "--yes", "--limit", "two", code=5)
    assert only["error"]["code"] == "host.unreachable"


def test_unlatch(place: Place) -> None:
    assert place.document("guard", "unlatch", "one")["instances"] == []
    assert place.orders() == {}
    place.says(instances=[guard_kit.slowed(latched=True)])
    assert place.document("guard", "unlatch", "one", "chat.9", code=3)["error"]["code"] == "guard.no_such_instance"
    assert place.document("guard", "unlatch", "one")["instances"] == ["chat.0"]
    assert abs(place.orders()["unlatch"]["chat.0"] - time.time()) < 60


def test_top_once_and_its_order(place: Place) -> None:
    place.says(gpus=[guard_kit.gpu(0), guard_kit.hot(1)], instances=[guard_kit.slowed()])
    plain = place.opsctl("top").stdout.splitlines()
    assert [line.split()[1] for line in plain[1:3]] == ["0", "1"]
    hottest = place.document("top", "--sort", "margin")["gpus"]
    assert [one["index"] for one in hottest] == [1, 0]
    assert set(place.asked()) == {"-I -m opsctl.agent.guard_view"}  # the cheap command, and nothing else


def test_a_host_whose_agent_knows_no_guard(place: Place) -> None:
    program = place.root.parent / "opsctl-host"
    program.write_text("#!/bin/sh\necho \"$0: No module named opsctl.agent.guard_view\" >&2\nexit 1\n")
    found = place.document("top")
    assert [(one["host"], one["code"]) for one in found["silent"]] == [("one", "guard.not_provisioned")]


class Terminal:
    """opsctl on a terminal of its own; what it drew is gathered."""

    def __init__(self, place: Place, *words: str) -> None:
        self.ours, its = pty.openpty()
        self.process = subprocess.Popen([sys.executable, "-m", "opsctl", *words], stdin=its, stdout=its, stderr=its,
                                        env=place.environment | {"TERM": "xterm-256color", "LINES": "30"},
                                        start_new_session=True)
        os.close(its)
        self.drawn = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while part := os.read(self.ours, 65536):
                self.drawn += part

    def until(self, words: str, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while words.encode() not in self.drawn:
            assert time.monotonic() < end, self.drawn.decode(errors="replace")[-3000:]
            assert self.process.poll() is None, self.drawn.decode(errors="replace")[-3000:]
            threading.Event().wait(0.05)

    def ended(self) -> int:
        code = self.process.wait(30)
        self._thread.join(10)
        os.close(self.ours)
        return code


def test_top_on_a_terminal_follows_and_ends_with_q(place: Place) -> None:
    terminal = Terminal(place, "top", "--every", "0.5")
    terminal.until("61 °C")
    place.says(gpus=[guard_kit.hot(0)], instances=[guard_kit.slowed()])
    terminal.until("slowed 30 %")
    assert b"hottest first" in terminal.drawn
    os.write(terminal.ours, b"m")
    terminal.until("inventory order")
    os.write(terminal.ours, b"q")
    assert terminal.ended() == 0
    assert b"\x1b[?1049l" in terminal.drawn  # the screen that was there before is back


def test_top_ends_with_ctrl_c(place: Place) -> None:
    terminal = Terminal(place, "top", "--every", "0.5")
    terminal.until("61 °C")
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.ended() == 130
    assert b"interrupted" in terminal.drawn


def test_top_draws_while_a_host_is_silent(place: Place) -> None:
    place.add_a_silent_host()
    terminal = Terminal(place, "top", "--every", "0.5")
    terminal.until("does not answer")
    terminal.until("61 °C")
    os.write(terminal.ours, b"q")
    assert terminal.ended() == 0


def test_a_drill_on_a_real_host_touches_nothing(place: Place) -> None:
    warm = guard_kit.gpu(temperature_c=77.0, margin_c=10.0, memory_margin_c=17.0)
    place.says(gpus=[warm])
    said = place.opsctl("drill", "thermal", "one", "--factor", "2", "--for", "60s")
    assert said.returncode == 0, said.stderr
    assert "nothing is touched" in said.stdout.splitlines()[0]
    assert "deepest rung: chat.0 least" in said.stdout
    assert place.asked() == ["guard --policy"]
    assert place.orders() == {}
    found = place.document("drill", "thermal", "one")
    assert (found["kind"], found["lab"], found["report"]["deepest"]) == ("replay", "", {"chat.0": "least"})
    assert found["steps"][0]["rung"] > 0


def test_a_drill_without_gpus_is_refused(place: Place) -> None:
    place.says(gpus=[])
    assert place.document("drill", "thermal", "one", code=5)["error"]["code"] == "drill.no_gpus"
    assert place.document("drill", "thermal", "one", "--for", "2d", code=2)["error"]["code"] == "drill.bad_time"


@pytest.fixture
def lab(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The host is a machine of a lab; its guard finds it hot while the cooling is broken. Yields the file of faults."""
    monkeypatch.setattr(lab_state, "STATE_ROOT", tmp_path / "labs")
    monkeypatch.setattr(laboratory.silicon, "start", lambda _: None)
    monkeypatch.setenv("OPSCTL_INVENTORY", str(place.directory / "inventory.ini"))
    mark = tmp_path / "mark"
    mark.touch()
    place.server.programs["/etc/opsctl-lab"] = mark
    machine = lab_state.Machine("one", "127.0.0.1", ("gpu",), gpus=Gpus("H200", 2))
    made = lab_state.save(lab_state.Lab("play", 1, "bookworm", IPv4Network("10.9.0.0/24"), place.directory,
                                        machines=(machine,)))
    path = trees.faults_path(made.place(machine))
    path.parent.mkdir(parents=True)
    ended = threading.Event()

    def nature() -> None:
        while not ended.wait(0.05):
            if faults.load(path).cooling:
                place.says(gpus=[guard_kit.hot()], instances=[guard_kit.slowed()])
            else:
                place.says()
    thread = threading.Thread(target=nature)
    thread.start()
    yield path
    ended.set()
    thread.join()


def test_an_exercise_in_a_lab_breaks_tells_and_mends(place: Place, lab: Path) -> None:
    said = CliRunner().invoke(main.app, ["drill", "thermal", "one", "--for", "3s", "--factor", "2.5", "-y", "--json"])
    assert said.exit_code == 0, said.stderr
    found = json.loads(said.stdout)
    assert (found["kind"], found["lab"], found["report"]["deepest"]) == ("exercise", "play", {"chat.0": "slowed"})
    assert 0 < found["report"]["first_s"] < 3
    assert [step["word"] for step in found["steps"]] == ["slowed", "normal"]
    assert "EXERCISE by" in said.stderr
    assert "cooling of all GPUs of one (lab play) 2.5 times worse for 3 s" in said.stderr
    assert faults.load(lab).cooling == {}


def test_an_exercise_asks_first_and_replay_breaks_nothing(place: Place, lab: Path) -> None:
    asks = CliRunner().invoke(main.app, ["drill", "thermal", "one"])
    assert asks.exit_code == 2
    assert not lab.exists()
    only = CliRunner().invoke(main.app, ["drill", "thermal", "one", "--replay", "--json"])
    assert (only.exit_code, json.loads(only.stdout)["kind"]) == (0, "replay")
    assert not lab.exists()
