"""The command line as a whole: what every verb's help says is a snapshot that someone reads in review.

To take new ones after a change that is meant: OPSCTL_SNAPSHOT=1 .venv/bin/pytest tests/unit/test_cli.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SNAPSHOTS = Path(__file__).parent / "snapshots"
VERBS = """\

init
trust
plan
provision
status
top
check
verify
drift
stack
stack resolve
stage
update-model
rollback
upgrade-driver
drain
undrain
guard
guard status
guard explain
guard mode
guard unlatch
drill
drill thermal
history
gc
runs
resume
hold
release
lock
lock status
lock break
logs
exec
doctor
gpus
gpus accept
model
model import
model list
model verify
bundle
bundle build
bundle verify
lab
lab up
lab status
lab ssh
lab down
lab power-cut
lab power-on
lab snapshot
lab restore
lab model
lab load
lab fault
lab inbox
""".splitlines()
PLAIN = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb", "LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"],
         "HOME": "/nonexistent"}


def opsctl(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "opsctl", *arguments], env=PLAIN | environment, cwd=cwd,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str) -> None:
    said = opsctl(*verb.split(), "--help")
    assert said.returncode == 0, said.stderr
    text = "\n".join(line.rstrip() for line in said.stdout.splitlines()) + "\n"
    snapshot = SNAPSHOTS / f"help-{verb.replace(' ', '-') or 'opsctl'}.txt"
    if os.environ.get("OPSCTL_SNAPSHOT"):
        snapshot.parent.mkdir(exist_ok=True)
        snapshot.write_text(text)
    assert text == snapshot.read_text()


def test_help_imports_no_engine() -> None:
    """Help opens fast because what talks to machines is imported by the verbs that need it."""
    done = subprocess.run(
        [sys.executable, "-c", "import opsctl.cli.main, sys; print(*sorted(sys.modules))"], env=PLAIN,
        capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"ansible", "fabric", "invoke", "paramiko", "yaml", "jinja2", "numpy", "gguf", "pyinfra",
                         "gevent"}


@pytest.mark.parametrize(("arguments", "exit_code", "says"), [
    (["no-such-verb"], 2, "No such command"),
    (["provision", "--no-such-option"], 2, "No such option"),
    (["provision"], 3, "there is no inventory at"),
    (["status", "elsewhere.ini"], 3, "elsewhere.ini"),
    (["stage"], 2, "opsctl model list"),
    (["stage", "--version", "v2", "--rate-limit", "200"], 2, "200M is 200 million bytes per second"),
    (["stage", "--version", "v2"], 3, "there is no inventory at"),
])
def test_a_wrong_turn_is_told_in_words(tmp_path: Path, arguments: list[str], exit_code: int, says: str) -> None:
    said = opsctl(*arguments, cwd=tmp_path)
    assert said.returncode == exit_code
    assert says in said.stderr
    assert said.stdout == ""
    assert "Traceback" not in said.stderr


def test_the_version() -> None:
    assert opsctl("--version").stdout.startswith("opsctl 0.")
