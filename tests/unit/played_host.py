"""A host that is played: a server of ``session_server`` where ``opsctl-host`` is a script that says what it is told."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from session_server import Server

from opsctl.fleet.model import Fleet, Host
from opsctl.releases.remote import HOST_PROGRAM

SCRIPT = """#!{python}
import json, os, sys, time
folder = {folder!r}
verb = sys.argv[1] + (" --dry-run" if "--dry-run" in sys.argv else "")
with open(folder + "/asked", "a+") as asked:
    asked.seek(0)
    times = sum(json.loads(line)["argv"][0] == sys.argv[1] for line in asked)
    asked.write(json.dumps({{"argv": sys.argv[1:], "root": os.environ.get("AS_ROOT", "")}}) + "\\n")
answers = json.load(open(folder + "/answers.json"))[verb]
answer = answers[min(times, len(answers) - 1)]
time.sleep(answer.get("seconds", 0))
sys.stdout.write(answer["stdout"] if "stdout" in answer else json.dumps(answer["document"]) + "\\n")
sys.stderr.write(answer.get("stderr", ""))
sys.exit(answer.get("code", 0))
"""


@dataclass
class Played:
    """``tell`` sets what a verb answers; ``asked`` is what it was asked, in order."""

    server: Server
    folder: Path

    def tell(self, verb: str, document: Mapping[str, Any] | None = None, **more: Any) -> None:
        self.tell_in_turn(verb, {"document": document, **more})

    def tell_in_turn(self, verb: str, *answers: Mapping[str, Any]) -> None:
        """The first time it is asked the first answer, then the second; the last one from then on."""
        path = self.folder / "answers.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, verb: answers}))

    def fail(self, verb: str, code: str, exit_code: int) -> None:
        self.tell_in_turn(verb, failure(verb, code, exit_code))

    def asked(self) -> list[list[str]]:
        return [entry["argv"] for entry in self._entries()]

    def as_root(self) -> set[str]:
        return {entry["root"] for entry in self._entries()}

    def _entries(self) -> list[dict[str, Any]]:
        path = self.folder / "asked"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def failure(verb: str, code: str, exit_code: int) -> dict[str, Any]:
    """An answer with an error document."""
    error = {"code": code, "message": f"{verb} says no.", "hint": "look", "log_tail": ["last line"]}
    return {"document": {"error": error, "exit_code": exit_code}, "code": exit_code}


def play(server: Server, folder: Path) -> Played:
    """Makes a server answer for ``opsctl-host``."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "opsctl-host"
    program.write_text(SCRIPT.format(python=sys.executable, folder=str(folder)))
    program.chmod(0o755)
    server.programs[HOST_PROGRAM] = program
    played = Played(server, folder)
    played.tell("state", {"instances": [], "releases": []})
    return played


def when_asked(played: Played, verb: str) -> None:
    """Returns when a host was asked for a verb."""
    until = time.monotonic() + 30
    while verb not in [asked[0] for asked in played.asked()]:
        assert time.monotonic() < until, f"{verb} was never asked"
        threading.Event().wait(0.02)


def host_of(server: Server, client_key: Path, name: str, user: str = "ann", jump: str = "") -> Host:
    return Host(name=name, address="127.0.0.1", groups=("gpu",), user=user, port=server.port,
                identity_file=str(client_key), proxy_jump=jump, variables={"secret": "not to be carried"})


def fleet_of(directory: Path, hosts: Sequence[Host], *servers: Server) -> Fleet:
    """A fleet that trusts the servers."""
    (directory / "known_hosts").write_text("".join(server.pin for server in servers), encoding="utf-8")
    return Fleet(directory=directory, inventory=directory / "inventory.ini", hosts=tuple(hosts), services=())
