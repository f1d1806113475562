"""What an operator's drain names, does to a service, and when it is refused; waiting, with a load balancer played."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from machines import Machine, Sessions
from release_kit import make_host, make_keys
from rich.console import Console

from opsctl import traffic
from opsctl.cli.drain import _plan
from opsctl.engines.events import Event, Progress, discard
from opsctl.errors import MixedError, OpsctlError, PausedError, RefusedError, UsageError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.traffic import Effect, check, check_heard, choose, effect, operator_owner

CHAT = Service("chat", "gpu", 8100, 8000, instances_per_host=2, drain_timeout_s=60)
EMBED = Service("embed", "small", 8200, 8001)
FLEET = Fleet(Path("/fleet"), Path("/fleet/inventory.ini"), (
    Host("ops-1", "10.0.0.1", ("gateway", "lb", "small")), Host("gpu-1", "10.0.0.11", ("gpu",)),
    Host("gpu-2", "10.0.0.12", ("gpu",))), (CHAT, EMBED))


@pytest.mark.parametrize(("targets", "expected"), [
    (["gpu-1"], "gpu-1.chat.0 gpu-1.chat.1"),
    (["gpu-1:chat.0"], "gpu-1.chat.0"),
    (["gpu-*:chat.1"], "gpu-1.chat.1 gpu-2.chat.1"),
    (["gpu-1:chat"], "gpu-1.chat.0 gpu-1.chat.1"),
    (["chat"], "gpu-1.chat.0 gpu-1.chat.1 gpu-2.chat.0 gpu-2.chat.1"),
    (["chat.0"], "gpu-1.chat.0 gpu-2.chat.0"),
    (["gpu[0:1]"], "gpu-1.chat.0 gpu-1.chat.1 gpu-2.chat.0 gpu-2.chat.1"),
    (["gpu-2", "embed"], "gpu-2.chat.0 gpu-2.chat.1 ops-1.embed.0"),
    (["gpu-1", "gpu-1:chat.0"], "gpu-1.chat.0 gpu-1.chat.1"),
    (["ops-1:*"], "ops-1.embed.0"),
])
def test_words_name_instances(targets: list[str], expected: str) -> None:
    assert " ".join(traffic.server_name(placement) for placement in choose(FLEET, targets)) == expected


@pytest.mark.parametrize(("targets", "code"), [
    (["gpu-9"], "limit.no_match"), (["gpu-1:embed.0"], "drain.no_instance"), (["talk"], "limit.no_match"),
    (["gpu-1:chat.7"], "drain.no_instance"),
])
def test_words_that_name_none(targets: list[str], code: str) -> None:
    with pytest.raises(UsageError) as refused:
        choose(FLEET, targets)
    assert refused.value.code == code
    assert refused.value.hint


def test_a_host_that_is_called_as_a_service() -> None:
    fleet = replace(FLEET, hosts=(*FLEET.hosts, Host("chat", "10.0.0.13", ("gpu",))))
    with pytest.raises(UsageError) as refused:
        choose(fleet, ["chat"])
    assert refused.value.code == "drain.ambiguous"
    assert len(choose(fleet, ["chat:*"])) == 2
    assert len(choose(fleet, ["*:chat*"])) == 6


def state(**weights: int | str) -> dict[str, Any]:
    """A host with chat.0 and chat.1: ``state(chat_0=0)`` drains one, ``state(chat_0="down")`` breaks it."""
    found = []
    for name in ("chat_0", "chat_1"):
        weight = weights.get(name, 100)
        found.append({"instance": name.replace("_", "."), "service": "chat", "unit": "active", "voice": "up 100%",
                      "health": "unhealthy" if weight == "down" else "healthy",
                      "weight": 100 if isinstance(weight, str) else weight})
    return {"instances": found}


WHOLE = {"gpu-1": state(), "gpu-2": state()}


@pytest.mark.parametrize(("states", "target", "weight", "result"), [
    (WHOLE, "gpu-1:chat.0", 0, (4, 3)),
    (WHOLE, "gpu-1", 0, (4, 2)),
    (WHOLE, "chat", 30, (4, 4)),
    ({"gpu-1": state(chat_0=0, chat_1="down"), "gpu-2": state()}, "gpu-1", 0, (2, 2)),
    ({"gpu-1": state(), "gpu-2": OpsctlError("host.unreachable", "x")}, "gpu-1:chat.0", 0, (2, 1)),
])
def test_what_goes_on_serving(states: dict[str, Any], target: str, weight: int, result: tuple[int, int]) -> None:
    (found,) = effect(FLEET, states, choose(FLEET, [target]), weight)
    assert (found.serving, found.remaining) == result
    assert found.silent == tuple(name for name, one in states.items() if isinstance(one, OpsctlError))


@pytest.mark.parametrize(("drains", "weight", "then"), [
    ({}, 50, 50),
    ({"operator:ann": 0}, 50, 50),  # her own word of before is gone: this raises it
    ({"operator:ann": 70}, 50, 50),
    ({"operator:bob": 0}, 50, 0),
    ({"operator:ann": 0, "guard": 30}, 50, 30),
])
def test_what_a_drain_says_beforehand_is_what_comes_of_it(
        machines: dict[str, Machine], drains: dict[str, int], weight: int, then: int) -> None:
    chosen = choose(ONE, ["gpu-1"])
    for owner, before in drains.items():
        traffic.drain(ONE, chosen, owner, before, "", discard)
    told = [{"instance": "chat.0", "owner": owner, "weight": before} for owner, before in drains.items()]
    row = {"instance": "chat.0", "service": "chat", "index": 0, "port": 8100, "unit": "active", "sub": "running",
           "release": "v1", "digest": "0" * 64, "health": "healthy", "running": 0, "waiting": 0, "since": 0}
    console = Console(width=120, color_system=None)
    with console.capture() as shown:
        console.print(_plan(ONE, chosen, {"gpu-1": {"instances": [row], "drains": told}}, (), "operator:ann", weight))
    (line,) = [line for line in shown.get().splitlines() if line.startswith("gpu-1")]
    assert line.rstrip().endswith(f" {then} %")
    (after,) = traffic.drain(ONE, chosen, "operator:ann", weight, "", discard)
    assert after["weight"] == then


@pytest.mark.parametrize(("serving", "remaining", "min_serving", "allow", "refused"), [
    (4, 3, 3, False, False), (4, 2, 3, False, True), (4, 2, 3, True, False),
    (2, 2, 3, False, False),  # below it already, and this takes nobody away
    (1, 0, 0, False, False), (2, 0, 1, False, True),
])
def test_a_service_keeps_what_it_needs(serving: int, remaining: int, min_serving: int, allow: bool, refused: bool
                                       ) -> None:
    effects = [Effect(replace(CHAT, min_serving=min_serving), serving, remaining, ("gpu-2",))]
    if not refused:
        check(effects, allow_outage=allow)
        return
    with pytest.raises(RefusedError) as error:
        check(effects, allow_outage=allow)
    assert error.value.code == "drain.outage"
    assert f"{serving} serving" in error.value.message and f"{remaining} would go on" in error.value.message
    assert f"min_serving is {min_serving}" in error.value.message
    assert "gpu-2 did not answer" in error.value.message


def test_an_agent_that_nobody_hears() -> None:
    mute = state()
    mute["instances"][0]["voice"] = ""
    check_heard({"gpu-1": mute}, choose(FLEET, ["gpu-1:chat.1"]))
    with pytest.raises(RefusedError) as refused:
        check_heard({"gpu-1": mute}, choose(FLEET, ["gpu-1:chat.0"]))
    assert refused.value.code == "agent.silent"
    with pytest.raises(OpsctlError, match="gone"):
        check_heard({"gpu-1": OpsctlError("host.unreachable", "gone")}, choose(FLEET, ["gpu-1:chat.0"]))


@pytest.mark.parametrize(("user", "owner"), [("ann", "operator:ann"), ("CORP\\ann b", "operator:CORP-ann-b"),
                                             ("-x", "operator:x"), ("é", "operator:unknown")])
def test_whose_drain_it_is(monkeypatch: pytest.MonkeyPatch, user: str, owner: str) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: user)
    assert operator_owner() == owner


# With real opsctl-host verbs, in this process.


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Machine]:
    keys = make_keys(tmp_path / "keys")
    found = {name: Machine(make_host(tmp_path / name, keys), name) for name in ("gpu-1", "gpu-2")}
    sessions = Sessions(found)
    monkeypatch.setattr(traffic, "Session", sessions)
    monkeypatch.setattr(traffic, "on_each", sessions.on_each)
    return found


ONE = replace(FLEET, services=(replace(CHAT, instances_per_host=1),))


def test_each_owner_takes_away_its_own(machines: dict[str, Machine]) -> None:
    chosen = choose(ONE, ["chat"])
    ann = traffic.drain(ONE, chosen, "operator:ann", 0, "new kernel", discard)
    assert [(row["host"], row["changed"], row["weight"]) for row in ann] == [("gpu-1", True, 0), ("gpu-2", True, 0)]
    traffic.drain(ONE, chosen[:1], "operator:bob", 30, "", discard)
    again = traffic.drain(ONE, chosen, "operator:ann", 0, "new kernel", discard)
    assert [row["changed"] for row in again] == [False, False]
    back = traffic.undrain(ONE, chosen, "operator:ann", discard)
    assert [(row["weight"], [one["owner"] for one in row["drains"]]) for row in back] == [
        (30, ["operator:bob"]), (100, [])]
    assert [row["changed"] for row in traffic.undrain(ONE, chosen, "operator:ann", discard)] == [False, False]


def test_a_host_that_is_gone(machines: dict[str, Machine]) -> None:
    chosen = choose(ONE, ["chat"])
    machines["gpu-2"].silent = "host.unreachable"
    with pytest.raises(MixedError) as mixed:
        traffic.drain(ONE, chosen, "operator:ann", 0, "", discard)
    assert mixed.value.code == "host.unreachable"
    with pytest.raises(RefusedError):
        traffic.drain(ONE, chosen[1:], "operator:ann", 0, "", discard)


class Balancer:
    """Says what it is told, one answer a question; the last one for ever."""

    def __init__(self, answers: Sequence[tuple[int, tuple[str, ...]]]) -> None:
        self.answers = list(answers)
        self.told: list[tuple[str, str]] = []

    def open_sessions(self, server: str, wait_s: float) -> tuple[int, tuple[str, ...]]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def drain(self, server: str) -> None:
        self.told.append(("drain", server))

    def undrain(self, server: str) -> None:
        self.told.append(("undrain", server))

    def close(self) -> None:
        pass


class Clock:
    """Ten seconds later at each look."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 10
        return self.now


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``opsctl-host idle`` says."""
    said: dict[str, Any] = {"running": 0, "waiting": 0, "idle": True}
    monkeypatch.setattr(traffic, "ask", lambda *_, **__: said)
    return said


def test_waiting_ends_when_load_balancer_and_engine_have_nothing(
        machines: dict[str, Machine], engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "balancers", lambda _: Balancer([(3, ()), (1, ()), (0, ())]))
    seen: list[Event] = []
    done = traffic.wait_until_empty(ONE, choose(ONE, ["gpu-1"]), seen.append, clock=Clock())
    assert [one.server for one in done] == ["gpu-1.chat.0"]
    assert [event.done for event in seen if isinstance(event, Progress)] == [3, 1]


@pytest.mark.parametrize(("balancer", "said", "code", "words"), [
    ([(0, ())], {"running": 2, "waiting": 1, "idle": False}, "drain.deadline", "still has 3 requests in flight"),
    ([(0, ())], {"running": None, "waiting": None, "idle": False}, "drain.deadline", "does not say what it has"),
    ([(2, ())], {"running": 0, "waiting": 0, "idle": True}, "drain.deadline", "still has 2 requests"),
    ([(2, ("ops-1",))], {"running": 0, "waiting": 0, "idle": True}, "drain.not_heard", "ops-1 still sends requests"),
])
def test_waiting_gives_up_and_the_drain_stays(
        machines: dict[str, Machine], engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, balancer: list[Any],
        said: dict[str, Any], code: str, words: str) -> None:
    monkeypatch.setattr(traffic, "balancers", lambda _: Balancer(balancer))
    engine.update(said)
    with pytest.raises(PausedError) as paused:
        traffic.wait_until_empty(ONE, choose(ONE, ["gpu-1"]), discard, clock=Clock())
    assert paused.value.code == code
    assert words in paused.value.message and "stays drained" in paused.value.message


def test_a_hook_hears_of_whole_drains_and_of_who_is_free_again(machines: dict[str, Machine],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    hook = Balancer([(0, ())])
    monkeypatch.setattr(traffic, "balancers", lambda _: hook)
    fleet = replace(ONE, load_balancer="hook")
    chosen = choose(fleet, ["gpu-1"])
    traffic.drain(fleet, chosen, "operator:bob", 30, "", discard)
    assert hook.told == []
    traffic.drain(fleet, chosen, "operator:ann", 0, "", discard)
    traffic.drain(fleet, chosen, "operator:bob", 0, "", discard)
    traffic.undrain(fleet, chosen, "operator:ann", discard)  # bob's stays
    traffic.undrain(fleet, chosen, "operator:bob", discard)
    assert hook.told == [("drain", "gpu-1.chat.0")] * 2 + [("undrain", "gpu-1.chat.0")]
