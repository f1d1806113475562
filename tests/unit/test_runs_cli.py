"""opsctl as it is typed, over SSH, against a host whose opsctl-host is the real one with another root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from session_server import make_key, serving

from opsctl.releases.remote import HOST_PROGRAM

PROGRAM = """#!{python}
import os, sys
from pathlib import Path
from opsctl.agent import audit, host, paths
host.Paths = lambda: paths.Paths(Path({root!r}))
os.geteuid = lambda: 0
audit.record = lambda *_: None
sys.exit(host.main())
"""
SERVICES = """\
chat:
  group: gpu
  port: 8100
  listen: 8000
"""


@dataclass
class Place:
    directory: Path
    root: Path

    def opsctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "opsctl", *words], stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, check=False, env=os.environ | {
                                  "OPSCTL_INVENTORY": str(self.directory / "inventory.ini"), "NO_COLOR": "1"})

    def document(self, *words: str) -> Any:
        said = self.opsctl(*words, "--json")
        assert said.returncode == 0, said.stderr
        return json.loads(said.stdout)

    def write_run(self, name: str, *lines: dict[str, Any]) -> None:
        folder = self.root / "var/lib/opsctl/runs"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.ndjson").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    key = make_key(tmp_path / "login")
    with serving(tmp_path / "server", key) as server:
        program = tmp_path / "opsctl-host"
        program.write_text(PROGRAM.format(python=sys.executable, root=str(tmp_path / "root")))
        program.chmod(0o755)
        server.programs[HOST_PROGRAM] = program
        directory = tmp_path / "fleet"
        directory.mkdir()
        (directory / "known_hosts").write_text(server.pin)
        (directory / "services.yml").write_text(SERVICES)
        (directory / "inventory.ini").write_text(
            f"one ansible_host=127.0.0.1 ansible_port={server.port} ansible_user=ann "
            f"ansible_ssh_private_key_file={key}\n"
            + "".join(f"[{group}]\none\n" for group in ("gpu", "lb", "monitor", "gateway")))
        settings = tmp_path / "root/etc/opsctl/agent.toml"
        settings.parent.mkdir(parents=True)
        settings.write_text('host = "one"\nlisten = "127.0.0.1"\nagent_check_port = 9777\n'
                            'gateway_url = "http://127.0.0.1:8480"\n')
        yield Place(directory, tmp_path / "root")


def test_holds_runs_and_resume(place: Place) -> None:
    first = place.opsctl("resume")
    assert first.stdout == "nothing to resume\n", first.stderr
    assert place.opsctl("runs").stdout == "no run yet\n"
    assert place.opsctl("lock", "status").stdout == "nothing is locked\n"
    assert place.document("hold", "one", "--for", "2d", "-m", "RMA")["changed"] == 1
    refused = place.opsctl("gc", "--limit", "one", "--json")
    assert refused.returncode == 4, refused.stderr
    assert json.loads(refused.stdout)["error"]["code"] == "host.on_hold"
    assert place.document("release", "one")["changed"] == 1

    began = {"t": 1.0, "event": "RunBegan", "run": "R1", "verb": "gc", "intent": {"verb": "gc", "service": ""},
             "argv": ["gc", "--yes"], "hosts": ["one"], "service": "", "by": "bob@desk"}
    place.write_run("R1", began)
    (run,) = place.document("runs")["runs"]
    assert (run["run"], run["state"], run["by"]) == ("R1", "unfinished", "bob@desk")
    resumed = place.opsctl("resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "opsctl gc --yes   (run R1, begun by bob@desk)" in resumed.stderr
    (run,) = place.document("runs")["runs"]
    assert (run["run"], run["state"], run["exit_code"]) == ("R1", "done", 0)
    assert place.document("lock", "status")["locks"] == []
    events = [json.loads(line)["event"] for line in
              (place.root / "var/lib/opsctl/runs/R1.ndjson").read_text().splitlines()]
    assert (events[:2], events[-1]) == (["RunBegan", "RunContinued"], "RunEnded")

    place.write_run("R2", began | {"run": "R2"})
    said = place.opsctl("lock", "break", "R2", "--json")
    assert said.returncode == 2, "it asks"
    assert place.document("lock", "break", "R2", "--yes")["closed"] is True
    assert place.document("runs")["runs"][0]["state"] == "closed"
    gone = place.opsctl("resume", "R2", "--json")
    assert (gone.returncode, json.loads(gone.stdout)["error"]["code"]) == (2, "resume.is_over")
