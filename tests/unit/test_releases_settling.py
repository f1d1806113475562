"""What becomes of the drains that a dead run left, once its locks are ours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opsctl.engines.events import Note
from opsctl.errors import PausedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.releases import settling

CHAT = Service("chat", "gpu", 8100, 8000)


def drain(owner: str, instance: str = "chat.0") -> dict[str, Any]:
    return {"instance": instance, "owner": owner, "weight": 0}


def state(*drains: dict[str, Any], health: str = "healthy") -> dict[str, Any]:
    return {"drains": list(drains), "instances": [{"instance": "chat.0", "health": health, "unfinished": False}]}


def test_only_what_runs_left_on_this_service() -> None:
    states = {"gpu-1": state(drain("run:R0"), drain("operator:ann"), drain("guard"), drain("run:R1", "embed.0")),
              "gpu-2": PausedError("a.b", "silent.", hint=""), "gpu-3": state()}
    assert settling.left_behind(states, "chat") == [("gpu-1", "chat.0", "run:R0")]


def settled(states: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: str = ""
            ) -> tuple[list[Any], list[str], list[str]]:
    """Orders, servers that were waited for, and what was said."""
    orders: list[Any] = []
    waited: list[str] = []
    said: list[str] = []

    def ask(session: Any, verb: list[str], *, host: str) -> dict[str, Any]:
        if verb[0] == "state":
            return dict(states[host])
        if host == silent:
            raise PausedError("host.silent", f"{host} does not answer.", hint="")
        orders.append((host, *verb))
        return {"weight": 100}

    def on_each(fleet: Fleet, hosts: list[Host], function: Any) -> dict[str, Any]:
        answers = {}
        for host in hosts:
            try:
                answers[host.name] = function(SimpleNamespace(host=host))
            except PausedError as error:
                answers[host.name] = error
        return answers

    lb = SimpleNamespace(lacking=lambda server, wait_s: waited.append(server) or (), close=lambda: None)
    monkeypatch.setattr(settling, "ask", ask)
    monkeypatch.setattr(settling, "on_each", on_each)
    monkeypatch.setattr(settling, "balancers", lambda fleet: lb)
    hosts = (Host("ops-1", "10.0.0.1", ("lb", "gateway")),
             *(Host(name, "10.0.0.9", ("gpu",)) for name in states))
    fleet = Fleet(tmp_path, tmp_path / "inventory.ini", hosts, (CHAT,))
    settling.settle(fleet, CHAT, hosts, lambda event: said.append(event.message) if isinstance(event, Note) else None)
    return orders, waited, said


def test_they_are_taken_back_and_requests_awaited_where_they_can_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                      ) -> None:
    states = {"gpu-1": state(drain("run:R0"), drain("operator:ann")),
              "gpu-2": state(drain("run:R0"), health="unhealthy"),
              "gpu-3": state()}
    orders, waited, said = settled(states, tmp_path, monkeypatch)
    assert orders == [(name, "undrain", "chat.0", "--owner", "run:R0") for name in ("gpu-1", "gpu-2")]
    assert waited == ["gpu-1.chat.0"]
    assert said == ["chat.0: took back the drain of R0, which is not at work any more"] * 2


def test_a_host_that_does_not_answer_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders, waited, said = settled({"gpu-1": state(drain("run:R0"))}, tmp_path, monkeypatch, silent="gpu-1")
    assert (orders, waited) == ([], [])
    assert said == ["the drain of an earlier run stays until it ends by itself: gpu-1 does not answer."]


def test_nothing_is_asked_where_nothing_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled({"gpu-1": state(drain("operator:ann"))}, tmp_path, monkeypatch) == ([], [], [])
