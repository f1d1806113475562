"""What HAProxy says of its servers, and who of them gets no requests."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from opsctl.agent.balancer import look, missing, servers
from opsctl.errors import RefusedError

HEAD = "# pxname,svname,qcur,qmax,scur,smax,status,weight\n"
STARTING = (HEAD + "chat,FRONTEND,,,1,1,OPEN,\nchat,gpu-1.chat.0,0,0,3,4,UP,100\n"
            "chat,gpu-2.chat.0,0,0,0,0,DOWN 1/2,100\nchat,gpu-3.chat.0,0,0,1,1,UP,0\nchat,BACKEND,0,0,4,4,UP,200\n")
SERVING = STARTING.replace("DOWN 1/2", "UP").replace("UP,0", "UP 1/3,1")


def test_servers_are_read_from_the_statistics() -> None:
    assert servers(STARTING) == [
        {"service": "chat", "server": "gpu-1.chat.0", "status": "UP", "weight": 100, "sessions": 3},
        {"service": "chat", "server": "gpu-2.chat.0", "status": "DOWN 1/2", "weight": 100, "sessions": 0},
        {"service": "chat", "server": "gpu-3.chat.0", "status": "UP", "weight": 0, "sessions": 1},
    ]


@pytest.mark.parametrize(("statistics", "lacking"), [
    (STARTING, ["gpu-2.chat.0", "gpu-3.chat.0", "gpu-9.chat.0"]),
    (SERVING, ["gpu-9.chat.0"]),
])
def test_down_without_weight_or_unknown_gets_no_requests(statistics: str, lacking: list[str]) -> None:
    wanted = ["gpu-1.chat.0", "gpu-2.chat.0", "gpu-3.chat.0", "gpu-9.chat.0"]
    assert missing(servers(statistics), wanted) == lacking


def test_it_waits_until_all_are_in_rotation(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            for statistics in (STARTING, STARTING, SERVING):
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(100) == b"show stat\n"
                    connection.sendall(statistics.encode())

        haproxy = threading.Thread(target=answer)
        haproxy.start()
        seen = look(path, ["gpu-2.chat.0", "gpu-3.chat.0"], 30)
        haproxy.join()
    assert seen["missing"] == []
    assert len(seen["servers"]) == 3


def test_a_silent_load_balancer_is_named(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"HAProxy does not answer on .*admin\.sock"):
        look(tmp_path / "admin.sock", [], 0)
