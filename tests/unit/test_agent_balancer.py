"""What HAProxy says of its servers, and who of them gets no requests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from opsctl.agent import balancer
from opsctl.agent.balancer import busy, look, missing, old_workers, servers, set_state, with_sessions_of
from opsctl.errors import OpsctlError, RefusedError

HEAD = "# pxname,svname,qcur,qmax,scur,smax,status,weight,agent_status\n"
STARTING = (HEAD + "chat,FRONTEND,,,1,1,OPEN,,\nchat,gpu-1.chat.0,0,0,3,4,UP,100,* L7OK\n"
            "chat,gpu-2.chat.0,0,0,0,0,DOWN 1/2,100,L4CON\nchat,gpu-3.chat.0,0,0,1,1,UP,0,\n"
            "chat,BACKEND,0,0,4,4,UP,200,\n")
SERVING = STARTING.replace("DOWN 1/2", "UP").replace("UP,0", "UP 1/3,1")
NOBODY = Path("/dev/null")  # no socket
PROCESSES = """#<PID>          <type>          <reloads>       <uptime>        <version>
1162            master          5 [failed: 0]   0d00h02m07s     2.6.12
# workers
1271            worker          0               0d00h00m00s     2.6.12
# old workers
1233            worker          1               0d00h00m43s     2.6.12
1200            worker          2               0d00h01m43s     2.6.12
# programs
1300            program         0               0d00h00m43s     -

"""


def test_servers_are_read_from_the_statistics() -> None:
    assert servers(STARTING) == [
        {"service": "chat", "server": "gpu-1.chat.0", "status": "UP", "weight": 100, "sessions": 3, "agent": "L7OK"},
        {"service": "chat", "server": "gpu-2.chat.0", "status": "DOWN 1/2", "weight": 100, "sessions": 0,
         "agent": "L4CON"},
        {"service": "chat", "server": "gpu-3.chat.0", "status": "UP", "weight": 0, "sessions": 1, "agent": ""},
    ]


@pytest.mark.parametrize(("statistics", "lacking"), [
    (STARTING, ["gpu-2.chat.0", "gpu-3.chat.0", "gpu-9.chat.0"]),
    (SERVING, ["gpu-9.chat.0"]),
])
def test_down_without_weight_or_unknown_gets_no_requests(statistics: str, lacking: list[str]) -> None:
    wanted = ["gpu-1.chat.0", "gpu-2.chat.0", "gpu-3.chat.0", "gpu-9.chat.0"]
    assert missing(servers(statistics), wanted) == lacking


@pytest.mark.parametrize(("status", "weight", "sessions", "agent", "working"), [
    ("UP", 100, 0, "L7OK", True),
    ("UP", 0, 0, "L7OK", False),
    ("UP", 0, 2, "L7OK", True),
    ("UP 1/3", 50, 0, "L7OK", True),
    ("DRAIN (agent)", 100, 0, "L7OK", False),  # by the load balancer itself: --via-lb
    ("DRAIN", 100, 1, "", True),
    ("MAINT", 100, 0, "", False),
    ("DOWN (agent)", 100, 0, "L7STS", False),  # its agent says down: a stopped unit
    ("DOWN", 100, 0, "L7STS", False),
    ("DOWN", 100, 0, "L7OK", True),  # by its own check: it may be up in a moment
    ("DOWN", 100, 0, "L4CON", True),
    ("DOWN", 0, 0, "L4CON", False),
])
def test_who_has_requests_or_may_get_some(status: str, weight: int, sessions: int, agent: str, working: bool) -> None:
    found = servers(HEAD + f"chat,gpu-1.chat.0,0,0,{sessions},9,{status},{weight},{agent}\n")
    assert busy(found, ["gpu-1.chat.0", "gpu-9.chat.0"]) == (["gpu-1.chat.0"] if working else [])


@pytest.mark.parametrize(("text", "pids"), [
    (PROCESSES, ["1233", "1200"]), (PROCESSES.replace("# old workers\n", ""), []), ("", []),
    ("# workers\n1271 worker 0\n# old workers\n# programs\n", []),
])
def test_which_processes_a_reload_left_behind(text: str, pids: list[str]) -> None:
    assert old_workers(text) == pids


def test_the_streams_of_an_old_process_count() -> None:
    new = servers(SERVING)
    old = servers(HEAD + "chat,gpu-1.chat.0,0,0,5,9,UP,100,\nchat,gone.chat.0,0,0,2,9,UP,100,\n")
    assert [row["sessions"] for row in with_sessions_of(new, old)] == [8, 0, 1]


def test_it_waits_until_all_are_in_rotation(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with answering(path, [("show stat", one + "\n") for one in (STARTING, STARTING, SERVING)]):
        seen = look(path, NOBODY, ["gpu-2.chat.0", "gpu-3.chat.0"], [], 30)
    assert (seen["missing"], seen["busy"]) == ([], [])
    assert len(seen["servers"]) == 3


def test_it_waits_until_what_was_drained_has_nothing_left(tmp_path: Path) -> None:
    """Weight 0 at once; then the streams of the new process end, then those of the one before."""
    admin, master = tmp_path / "admin.sock", tmp_path / "master.sock"
    rows = [HEAD + f"chat,gpu-1.chat.0,0,0,{sessions},9,UP,{weight},L7OK\n"
            for sessions, weight in ((2, 100), (1, 0), (0, 0), (0, 0))]
    old = [("show proc", PROCESSES.replace("1200 ", "# 1200")), ("@!1233 show stat", rows[1] + "\n")]
    gone = [("show proc", PROCESSES.replace("1200 ", "# 1200")), ("@!1233 show stat", "Can't find the target PID\n")]
    with (answering(admin, [("show stat", one + "\n") for one in rows]), answering(master, [*old, *old, *old, *gone])):
        seen = look(admin, master, [], ["gpu-1.chat.0"], 30)
    assert seen["busy"] == []
    assert seen["servers"][0]["sessions"] == 0


def test_what_is_still_busy_is_said_at_the_end(tmp_path: Path) -> None:
    with answering(tmp_path / "admin.sock", [("show stat", STARTING + "\n")]):
        seen = look(tmp_path / "admin.sock", NOBODY, ["gpu-2.chat.0"], ["gpu-3.chat.0", "gpu-9.chat.0"], 0)
    assert (seen["missing"], seen["busy"]) == (["gpu-2.chat.0"], ["gpu-3.chat.0"])


@pytest.mark.parametrize("state", ["drain", "ready"])
def test_a_servers_state_is_set_in_its_backend(tmp_path: Path, state: str) -> None:
    with answering(tmp_path / "admin.sock", [
            ("show stat", STARTING + "\n"), (f"set server chat/gpu-3.chat.0 state {state}", "\n")]):
        assert set_state(tmp_path / "admin.sock", "gpu-3.chat.0", state) == {"changed": True}


def test_a_server_that_nobody_knows(tmp_path: Path) -> None:
    with (answering(tmp_path / "admin.sock", [("show stat", STARTING + "\n")]),
          pytest.raises(RefusedError, match="no server gpu-9")):
        set_state(tmp_path / "admin.sock", "gpu-9.chat.0", "drain")


def test_what_haproxy_refuses_is_told(tmp_path: Path) -> None:
    """It says so in words and ends as if all were well."""
    with (answering(tmp_path / "admin.sock", [
            ("show stat", STARTING + "\n"), ("set server chat/gpu-3.chat.0 state drain", "Permission denied.\n\n")]),
          pytest.raises(OpsctlError, match="Permission denied") as error):
        set_state(tmp_path / "admin.sock", "gpu-3.chat.0", "drain")
    assert error.value.code == "balancer.not_set"


@contextmanager
def answering(path: Path, answers: Sequence[tuple[str, str]]) -> Iterator[None]:
    """A socket like HAProxy's: one command a connection; expects just these."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        heard: list[str] = []

        def answer() -> None:
            for _, text in answers:
                connection, _ = listener.accept()
                with connection:
                    heard.append(connection.recv(100).decode())
                    connection.sendall(text.encode())

        listener.settimeout(10)
        haproxy = threading.Thread(target=answer, daemon=True)
        haproxy.start()
        yield
        haproxy.join(10)
        assert heard == [f"{command}\n" for command, _ in answers]


def test_a_reload_meanwhile_is_waited_for(tmp_path: Path) -> None:
    """An answer that is cut off would lack servers."""
    admin, master = tmp_path / "admin.sock", tmp_path / "master.sock"
    whole = STARTING + "\n"
    with (answering(admin, [("show stat", ""), ("show stat", whole[:150]), ("show stat", whole)]),
          answering(master, [("show proc", ""), ("show proc", "#<PID> ...\n\n")])):
        assert len(look(admin, master, [], [], 0)["servers"]) == 3


def test_a_load_balancer_that_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "RELOAD_S", 0.3)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "admin.sock"))
    with pytest.raises(RefusedError, match=r"admin\.sock: Connection refused"):
        look(tmp_path / "admin.sock", NOBODY, [], [], 0)


def test_what_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "RELOAD_S", 0)
    with (answering(tmp_path / "admin.sock", [("show stat", "Permission denied.\n\n")]),
          pytest.raises(RefusedError, match="Permission denied")):
        look(tmp_path / "admin.sock", NOBODY, [], [], 0)


def test_a_silent_load_balancer_is_named(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"HAProxy does not answer on .*admin\.sock"):
        look(tmp_path / "admin.sock", NOBODY, [], [], 0)
