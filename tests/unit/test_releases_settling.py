"""What becomes of the drains that a dead run left, once its locks are ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opsctl.engines.events import Note
from opsctl.errors import LockedError, PausedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.releases import settling
from opsctl.runs.journal import nothing

CHAT = Service("chat", "gpu", 8100, 8000)


def drain(owner: str, instance: str = "chat.0", weight: int = 0) -> dict[str, Any]:
    return {"instance": instance, "owner": owner, "weight": weight}


def state(*drains: dict[str, Any], health: str = "healthy") -> dict[str, Any]:
    return {"drains": list(drains), "instances": [{"instance": "chat.0", "health": health, "unfinished": False}]}


def test_only_what_runs_left_on_this_service() -> None:
    states = {"gpu-1": state(drain("run:R0"), drain("operator:ann"), drain("guard"), drain("run:R1", "embed.0")),
              "gpu-2": PausedError("a.b", "silent.", hint=""), "gpu-3": state()}
    assert settling.left_behind(states, "chat") == [("gpu-1", "chat.0", "run:R0")]


class Settled:
    """What came of settling: orders, servers that were waited for, and what was said."""

    def __init__(self) -> None:
        self.orders: list[Any] = []
        self.waited: list[str] = []
        self.said: list[str] = []


def settle(states: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: str = "",
           check: Callable[[], None] = nothing, into: Settled | None = None) -> Settled:
    """``check``: are the locks ours still; ``into``: so that what came until an error is seen."""
    found = into or Settled()

    def ask(session: Any, verb: list[str], *, host: str) -> dict[str, Any]:
        if verb[0] == "state":
            return dict(states[host])
        if host == silent:
            raise PausedError("host.silent", f"{host} does not answer.", hint="")
        found.orders.append((host, *verb))
        others = [one["weight"] for one in states[host]["drains"]
                  if one["instance"] == verb[1] and not one["owner"].startswith("run:")]
        return {"weight": min(others, default=100)}

    def on_each(fleet: Fleet, hosts: list[Host], function: Any) -> dict[str, Any]:
        answers = {}
        for host in hosts:
            try:
                answers[host.name] = function(SimpleNamespace(host=host))
            except (PausedError, LockedError) as error:
                answers[host.name] = error
        return answers

    lb = SimpleNamespace(lacking=lambda server, wait_s: found.waited.append(server) or (), close=lambda: None)
    monkeypatch.setattr(settling, "ask", ask)
    monkeypatch.setattr(settling, "on_each", on_each)
    monkeypatch.setattr(settling, "balancers", lambda fleet: lb)
    hosts = (Host("ops-1", "10.0.0.1", ("lb", "gateway")),
             *(Host(name, "10.0.0.9", ("gpu",)) for name in states))
    fleet = Fleet(tmp_path, tmp_path / "inventory.ini", hosts, (CHAT,))
    settling.settle(fleet, CHAT, hosts, check,
                    lambda event: found.said.append(event.message) if isinstance(event, Note) else None)
    return found


def test_they_are_taken_back_and_requests_awaited_where_they_can_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                      ) -> None:
    states = {"gpu-1": state(drain("run:R0"), drain("operator:ann", weight=50)),
              "gpu-2": state(drain("run:R0"), health="unhealthy"),
              "gpu-3": state()}
    found = settle(states, tmp_path, monkeypatch)
    assert found.orders == [(name, "undrain", "chat.0", "--owner", "run:R0") for name in ("gpu-1", "gpu-2")]
    assert found.waited == ["gpu-1.chat.0"]
    assert found.said == ["chat.0: took back the drain of R0, which is not at work any more"] * 2


def test_what_somebody_else_keeps_drained_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"gpu-1": state(drain("run:R0"), drain("operator:ann")), "gpu-2": state(drain("run:R0"))}
    found = settle(states, tmp_path, monkeypatch)
    assert [order[0] for order in found.orders] == ["gpu-1", "gpu-2"]
    assert found.waited == ["gpu-2.chat.0"]


def test_nothing_is_taken_back_under_a_lock_that_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An undrain is not fenced by its host: whoever has the lock now may have drained under the same name."""
    looks = iter([True, False, False])

    def check() -> None:
        if not next(looks):
            raise LockedError("lock.lost", "the lock is bob's now.")

    found = Settled()
    with pytest.raises(LockedError, match="bob's now"):
        settle({name: state(drain("run:R0")) for name in ("gpu-1", "gpu-2", "gpu-3")}, tmp_path, monkeypatch,
               check=check, into=found)
    assert found.orders == [("gpu-1", "undrain", "chat.0", "--owner", "run:R0")]
    assert found.waited == []
    assert found.said == ["chat.0: took back the drain of R0, which is not at work any more"]


def test_a_host_that_does_not_answer_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = settle({"gpu-1": state(drain("run:R0"))}, tmp_path, monkeypatch, silent="gpu-1")
    assert (found.orders, found.waited) == ([], [])
    assert found.said == ["the drain of an earlier run stays until it ends by itself: gpu-1 does not answer."]


def test_nothing_is_asked_where_nothing_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = settle({"gpu-1": state(drain("operator:ann"))}, tmp_path, monkeypatch)
    assert (found.orders, found.waited, found.said) == ([], [], [])
