"""What was decided is brought about, and asserted anew when the setter is another one than before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from opsctl.agent.guard import hands as hands_module
from opsctl.agent.guard.hands import Hands, Limit, Refusal

GPU = "GPU-0"
LIMIT = Limit(1584, 560)


class PlayedSetter:
    """Answers as told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.generation = 0
        self.asked: list[dict[str, Any]] = []
        self.refuses: dict[str, str] = {}  # code by verb

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(dict(request))
        code = self.refuses.get(request["verb"])
        if code:
            return {"ok": False, "code": code, "words": f"{request['verb']}: {code}"}
        return {"ok": True, **{key: request[key] for key in ("max_mhz", "watts") if key in request}}


def run(act: Callable[[Hands, PlayedSetter], Any], setter: PlayedSetter | None = None) -> tuple[Hands, PlayedSetter]:
    """Acts while the hands work; the setter's clock stands still."""
    played = setter or PlayedSetter()
    said: list[str] = []
    hands = Hands(played, said.append, clock=lambda: 100.0)

    async def main() -> None:
        task = asyncio.create_task(hands.work())
        await act(hands, played)
        await asyncio.sleep(0.02)
        task.cancel()

    asyncio.run(main())
    return hands, played


def test_a_limit_is_set_once_and_released_once() -> None:
    async def act(hands: Hands, _: PlayedSetter) -> None:
        for _again in range(3):
            hands.want({GPU: LIMIT})
            await asyncio.sleep(0.02)
        assert hands.limits == {GPU: {"max_mhz": 1584}}
        hands.want({})

    hands, setter = run(act)
    assert [one["verb"] for one in setter.asked] == ["clocks", "release"]
    assert hands.limits == {}


def test_another_setter_is_told_again(monkeypatch: Any) -> None:
    monkeypatch.setattr(hands_module, "CHECK_S", 0.01)

    async def act(hands: Hands, setter: PlayedSetter) -> None:
        hands.want({GPU: LIMIT})
        await asyncio.sleep(0.03)
        setter.generation += 1
        await asyncio.sleep(0.05)

    _, setter = run(act)
    assert [one["verb"] for one in setter.asked] == ["clocks", "clocks"]


def test_what_a_lost_connection_set_is_released_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(hands_module, "CHECK_S", 0.01)

    async def act(hands: Hands, setter: PlayedSetter) -> None:
        hands.want({GPU: LIMIT, "GPU-1": LIMIT})
        await asyncio.sleep(0.03)
        setter.generation += 1
        hands.want({"GPU-1": LIMIT})
        await asyncio.sleep(0.05)

    hands, setter = run(act)
    assert [(one["verb"], one["gpu"]) for one in setter.asked[2:]] == [("clocks", "GPU-1"), ("release", GPU)]
    assert hands.limits == {"GPU-1": {"max_mhz": 1584}}


def test_where_clocks_cannot_be_locked_the_power_is_limited() -> None:
    setter = PlayedSetter()
    setter.refuses = {"clocks": "not_supported"}

    async def act(hands: Hands, _: PlayedSetter) -> None:
        hands.want({GPU: LIMIT})
        await asyncio.sleep(0.02)
        hands.want({GPU: Limit(693, 245)})

    hands, _ = run(act, setter)
    assert [(one["verb"], one.get("watts")) for one in setter.asked] == [
        ("clocks", None), ("power", 560), ("power", 245)]
    assert hands.limits == {GPU: {"watts": 245}}


def test_a_refusal_is_told_and_not_repeated_at_once() -> None:
    setter = PlayedSetter()
    setter.refuses = {"clocks": "no_permission"}

    async def act(hands: Hands, _: PlayedSetter) -> None:
        for _again in range(5):
            hands.want({GPU: LIMIT})
            await asyncio.sleep(0.01)

    hands, _ = run(act, setter)
    assert len(setter.asked) == 1
    assert hands.trouble == "clocks: no_permission"
    assert hands.limits == {}


def test_another_order_is_not_held_up_by_an_old_refusal() -> None:
    setter = PlayedSetter()
    setter.refuses = {"clocks": "failed"}

    async def act(hands: Hands, played: PlayedSetter) -> None:
        hands.want({GPU: LIMIT})
        await asyncio.sleep(0.02)
        played.refuses = {}
        hands.want({GPU: Limit(693, 245)})

    hands, _ = run(act, setter)
    assert hands.limits == {GPU: {"max_mhz": 693}}
    assert not hands.trouble


def test_nothing_wanted_asks_nothing() -> None:
    async def act(hands: Hands, _: PlayedSetter) -> None:
        hands.want({})

    assert not run(act)[1].asked


def test_an_order_that_is_refused_says_why() -> None:
    setter = PlayedSetter()
    setter.refuses = {"stop": "unknown_instance"}
    hands = Hands(setter, lambda _: None)
    assert asyncio.run(hands.order("chat.9", "drain")) == Refusal("stop: unknown_instance", perhaps=False)
    setter.refuses["stop"] = "hangs"
    assert asyncio.run(hands.order("chat.9", "drain")) == Refusal("stop: hangs", perhaps=True)
    del setter.asked[1]
    assert asyncio.run(hands.order("chat.0", "start")) is None
    assert setter.asked == [{"verb": "stop", "instance": "chat.9", "how": "drain"},
                            {"verb": "start", "instance": "chat.0"}]
