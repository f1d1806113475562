"""How a probe gets to a host and its answer back: one file, made of the probe and what probes have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from opsctl.engines.session import Session
from opsctl.errors import OpsctlError, RefusedError

COMMON = Path(__file__).with_name("probe_common.py")
TIMEOUT_S = 120.0  # a probe gives itself a minute
# Of a probe's own imports those that the common part stands for, and those that it has made already.
STOOD_FOR = re.compile(r"^from (?:opsctl\.checking\.probe_common|__future__) import .*\n", re.MULTILINE)


@cache
def program(probe: Path) -> bytes:
    """The probe as it runs on hosts: one file."""
    own = STOOD_FOR.sub("", probe.read_text(encoding="utf-8"))
    return f"{COMMON.read_text(encoding='utf-8')}\n\n{own}".encode()


def ask(session: Session, probe: Path, question: Mapping[str, Any], about: str, *, sudo: bool = True
        ) -> Mapping[str, Any]:
    """The document that a probe prints; ``about`` is what errors are called by.

    Raises:
        OpsctlError: the host does not answer; ``ABOUT.no_python``, ``ABOUT.no_probe``: it does, and the probe does not.
    """
    host = session.host.name
    done = session.run(["python3", "-", json.dumps(question)], stdin=program(probe), timeout_s=TIMEOUT_S, sudo=sudo)
    if done.returncode in (126, 127):
        raise RefusedError(f"{about}.no_python", f"{host}: there is no python3, which everything here needs.",
                           hint=f"ssh -F .opsctl/ssh_config {host} sudo apt-get install python3")
    try:
        document: Mapping[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise OpsctlError(f"{about}.no_probe", f"{host}: the probe ended with exit code {done.returncode} and no "
                          "answer.", hint=f"opsctl exec --limit {host} -- python3 --version   (3.8 or newer)",
                          log_tail=done.stderr.splitlines()[-5:]) from None
    return document
