"""Hosts whose real opsctl-host verbs run in this process, and what stands in for the sessions with them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import pytest

from opsctl.agent import host as host_program
from opsctl.agent.paths import Paths
from opsctl.engines.session import Completed
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host


@dataclass
class Machine:
    """A host whose opsctl-host runs here.

    ``cut`` breaks the next transfer after so many bytes; ``silent`` is the code of the error that every word to it is.
    """

    paths: Paths
    name: str
    verbs: list[str] = field(default_factory=list)
    cut: int = 0
    silent: str = ""

    def run(self, argv: Sequence[str], *, sudo: bool = True, timeout_s: float = 30.0, stdin: bytes = b"") -> Completed:
        return self.send(argv, [stdin])

    def send(self, argv: Sequence[str], chunks: Iterable[bytes], *, sudo: bool = True, timeout_s: float = 30.0
             ) -> Completed:
        if self.silent:
            kind = OpsctlError if self.silent == "host.connection_lost" else RefusedError
            raise kind(self.silent, f"{self.name} does not answer.")
        if argv[0] == "test":
            return Completed(0, "", "")
        self.verbs.append(argv[1])
        body = b"".join(chunks)
        if self.cut and argv[1] == "receive":
            body, self.cut = body[:self.cut], 0
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
            patch.setattr(host_program, "Paths", lambda: self.paths)
            patch.setattr("os.geteuid", lambda: 0)
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(body)))
            code = host_program.main(list(argv[1:]))
        return Completed(code, out.getvalue(), "")


class Sessions:
    """Stands in for ``Session``: machines by name."""

    def __init__(self, machines: dict[str, Machine]) -> None:
        self.machines = machines

    def __call__(self, fleet: Fleet, host: Host | str) -> Any:
        machine = self.machines[host if isinstance(host, str) else host.name]

        class Open:
            host = fleet.host(machine.name)
            run, send = machine.run, machine.send

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                pass
        return Open()

    def on_each(self, fleet: Fleet, hosts: Sequence[Host], function: Any) -> dict[str, Any]:
        answers: dict[str, Any] = {}
        for host in hosts:
            try:
                answers[host.name] = function(self(fleet, host))
            except OpsctlError as error:
                answers[host.name] = error
        return answers
