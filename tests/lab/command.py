"""Runs opsctl as an operator would: a process of its own, its exit code and what it said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Said:
    returncode: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)


def opsctl(*arguments: str | Path, inventory: Path | None = None, timeout_s: float = 600, **environment: str) -> Said:
    """Runs one verb off a terminal; the inventory goes through the environment."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("OPSCTL_", "ANSIBLE_"))}
    if inventory is not None:
        variables["OPSCTL_INVENTORY"] = str(inventory)
    done = subprocess.run([sys.executable, "-m", "opsctl", *map(str, arguments)], env=variables | environment,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False)
    ours = [line for line in done.stderr.splitlines() if not line.lstrip().startswith("|")]  # the rest are hosts' logs
    assert not any("Traceback" in line for line in ours), done.stderr
    return Said(done.returncode, done.stdout, done.stderr)


def succeeds(*arguments: str | Path, inventory: Path | None = None, **environment: str) -> Said:
    said = opsctl(*arguments, inventory=inventory, **environment)
    assert said.returncode == 0, f"{arguments}: exit {said.returncode}\n{said.stdout}\n{said.stderr}"
    return said


def refused(said: Said, exit_code: int, code: str) -> str:
    """Asserts one refusal with its stable code, one sentence and a hint; gives the whole of what was said."""
    assert said.returncode == exit_code, f"exit {said.returncode}, wanted {exit_code}\n{said.stdout}\n{said.stderr}"
    error = said.document["error"]
    assert error["code"] == code, error
    assert error["message"].count("\n") == 0, error
    assert error["hint"], error
    return f"{error['message']}\n{error['hint']}"
