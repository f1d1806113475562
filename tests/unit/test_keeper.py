"""The guard at work on a played host: what it sees, what the voice says then, and what the setter is asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest

from opsctl.agent.guard import keeper as keeper_module
from opsctl.agent.guard.hands import Hands, Limit
from opsctl.agent.guard.keeper import Keeper
from opsctl.agent.guard.model import Pool
from opsctl.agent.paths import Paths

DAY_S = 86400.0
UUIDS = ("GPU-0", "GPU-1")


class PlayedSetter:
    generation = 0

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.refuses = ""

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(dict(request))
        if self.refuses and request["verb"] in ("stop", "start"):
            return {"ok": False, "code": "failed", "words": self.refuses}
        return {"ok": True, **{key: request[key] for key in ("max_mhz", "watts") if key in request}}

    def verbs(self) -> list[str]:
        return [one["verb"] for one in self.asked]


class PlayedHost:
    """Two GPUs of one instance, ``chat.0``; time goes on only when a test says so."""

    def __init__(self, root: Path, mode: str = "enforce") -> None:
        self.paths = Paths(root)
        self.paths.placements.mkdir(parents=True, exist_ok=True)
        (self.paths.placements / "chat.0.toml").write_text(
            'instance = "chat.0"\nservice = "chat"\nindex = 0\naddress = "127.0.0.1"\nport = 8100\n'
            f"gpus = {json.dumps(UUIDS)}\ntensor_parallel = 2\nmin_serving = 1\nstatistics = [\"http://lb/;csv\"]\n")
        self.paths.guard.parent.mkdir(parents=True, exist_ok=True)
        self.paths.boot_id.parent.mkdir(parents=True, exist_ok=True)
        self.paths.boot_id.write_text("boot-1\n")
        if mode != "auto":
            self.paths.guard_orders.parent.mkdir(parents=True, exist_ok=True)
            self.paths.guard_orders.write_text(json.dumps({"mode": mode}))
        self.now, self.unit, self.said = 1000.0, "active", list[str]()
        self.setter = PlayedSetter()
        self.keeper = self.begin()

    def begin(self) -> Keeper:
        """The agent starts."""
        hands = Hands(self.setter, self.said.append, clock=lambda: self.now)
        self.keeper = Keeper(self.paths, "gpu-1", hands, lambda _: self.unit, self.said.append,
                             clock=lambda: self.now, wall=lambda: self.now)
        self.keeper._tick()
        return self.keeper

    def gpus(self, *margins: float, **more: Any) -> list[dict[str, Any]]:
        return [{"uuid": uuid, "index": index, "pci": f"0:{index}", "name": "NVIDIA H200", "state": "ok",
                 "temperature_c": 87 - margin, "margin_c": margin, "margin_source": "margin_api",
                 "clock_sm_max_mhz": 1980, "clock_sm_mhz": 1980, "power_limits_w": {"default": 700.0},
                 "offsets_c": {"slowdown": -2, "shutdown": -8}, **more}
                for index, (uuid, margin) in enumerate(zip(UUIDS, margins, strict=False))]

    async def see(self, *margins: float, seconds: float = 1.0, **more: Any) -> None:
        """Samples, one each second."""
        for _ in range(int(seconds)):
            self.now += 1
            self.keeper.see(self.gpus(*margins, **more), self.now)
            self.keeper._tick()
            await asyncio.sleep(0.005)

    async def silence(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now += 1
            self.keeper._tick()
            await asyncio.sleep(0)

    def told(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.paths.guard.read_text())
        return document["instances"][0]


def play(root: Path, act: Callable[[PlayedHost], Coroutine[Any, Any, None]], mode: str = "enforce") -> PlayedHost:
    async def main() -> PlayedHost:
        host = PlayedHost(root, mode)
        working = asyncio.create_task(host.keeper._hands.work())
        await act(host)
        await asyncio.sleep(0.05)
        working.cancel()
        return host

    return asyncio.run(main())


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> dict[str, Pool]:
    """What the load balancers say."""
    said = {"now": Pool(2, 1)}

    async def look(*_: Any) -> Pool:
        return said["now"]

    monkeypatch.setattr(keeper_module.pool, "look", look)
    return said


def test_a_cool_host_is_left_alone(tmp_path: Path) -> None:
    async def act(host: PlayedHost) -> None:
        await host.see(20, 22, seconds=5)
        assert (host.keeper.weight("chat.0"), host.keeper.down("chat.0")) == (100, "")
        assert host.told()["word"] == "normal"

    assert not play(tmp_path, act).setter.asked


def test_one_hot_gpu_moves_the_whole_instance(tmp_path: Path, pools: dict[str, Pool]) -> None:
    async def act(host: PlayedHost) -> None:
        await host.see(20, 20, seconds=3)
        await host.see(20, -3, seconds=2)
        assert host.keeper.weight("chat.0") == 1
        limits = {gpu["uuid"]: gpu["clock_limit_mhz"] for gpu in json.loads(host.paths.guard.read_text())["gpus"]}
        assert limits["GPU-0"] == limits["GPU-1"] == 1980 * 35 // 100 // 15 * 15
        assert host.told()["moves"][-1]["to"] == 3
        await host.see(20, 15, seconds=200)
        assert host.keeper.weight("chat.0") == 100

    host = play(tmp_path, act)
    assert host.setter.verbs().count("clocks") == 4  # least, then slowed, each for both
    assert host.setter.verbs()[-2:] == ["release", "release"]


def test_on_the_first_day_weights_act_and_nothing_else(tmp_path: Path, pools: dict[str, Pool]) -> None:
    async def act(host: PlayedHost) -> None:
        await host.see(20, -5, seconds=20)
        assert host.keeper.weight("chat.0") == 1
        assert not host.told()["acts"]
        host.keeper._observed_s = DAY_S
        await host.see(20, -5, seconds=1)
        assert host.told()["acts"]

    host = play(tmp_path, act, mode="auto")
    assert host.setter.verbs().count("clocks") == 2


def test_only_what_was_seen_counts_as_observed(tmp_path: Path) -> None:
    async def act(host: PlayedHost) -> None:
        await host.see(20, 20, seconds=60)
        seen = host.keeper._observed_s
        assert 50 <= seen <= 60
        await host.silence(100)
        assert host.keeper._observed_s - seen <= 10
        host.now += DAY_S * 3  # the machine slept, or its clock jumped
        await host.see(20, 20, seconds=1)
        assert host.keeper._observed_s < 80

    play(tmp_path, act, mode="auto")


async def hot_until_stopped(host: PlayedHost) -> None:
    await host.see(20, 20, seconds=3)
    await host.see(20, -5, seconds=8)


def test_it_stops_where_others_serve_and_starts_again(tmp_path: Path, pools: dict[str, Pool]) -> None:
    async def act(host: PlayedHost) -> None:
        await hot_until_stopped(host)
        assert host.setter.asked[-1] == {"verb": "stop", "instance": "chat.0", "how": "drain"}
        assert host.keeper.down("chat.0") == "too hot: stopping"
        host.unit = "deactivating"
        await host.see(20, 15, seconds=60)  # it drains for long, and cools meanwhile
        host.unit = "inactive"
        await host.see(20, 15, seconds=2)
        assert host.keeper.stopped("chat.0")
        await host.see(20, 15, seconds=60)
        assert host.setter.asked[-1] == {"verb": "start", "instance": "chat.0"}
        host.unit = "active"
        await host.see(20, 15, seconds=2)
        assert not host.keeper.stopped("chat.0")
        assert host.keeper.weight("chat.0") == 1  # and climbs from here

    play(tmp_path, act)


def test_it_is_stopped_at_once_when_the_drain_does_not_cool_it(tmp_path: Path, pools: dict[str, Pool]) -> None:
    async def act(host: PlayedHost) -> None:
        await hot_until_stopped(host)
        host.unit = "deactivating"
        await host.see(20, -7.5, seconds=3)
        assert host.setter.asked[-1] == {"verb": "stop", "instance": "chat.0", "how": "now"}

    play(tmp_path, act)


@pytest.mark.parametrize("said", [Pool(0, 1), Pool(None, 1, "no answer")])
def test_it_never_stops_where_too_few_would_serve(tmp_path: Path, pools: dict[str, Pool], said: Pool) -> None:
    pools["now"] = said

    async def act(host: PlayedHost) -> None:
        await host.see(20, 20, seconds=3)
        await host.see(20, -7, seconds=60)
        assert (host.keeper.weight("chat.0"), host.keeper.down("chat.0")) == (1, "")
        assert any("Would stop" in reason for reason in host.told()["reasons"])

    assert "stop" not in play(tmp_path, act).setter.verbs()


def test_a_stop_that_is_refused_leaves_it_serving_the_least(tmp_path: Path, pools: dict[str, Pool]) -> None:
    async def act(host: PlayedHost) -> None:
        host.setter.refuses = "a cutover is at work on chat.0"
        await hot_until_stopped(host)
        await host.see(20, -5, seconds=3)
        assert (host.keeper.weight("chat.0"), host.keeper.down("chat.0")) == (1, "")
        assert any("a cutover is at work" in reason for reason in host.told()["reasons"])
        assert host.setter.verbs().count("stop") == 1  # and not each second

    play(tmp_path, act)


def test_without_samples_the_weight_falls_and_nothing_else(tmp_path: Path, pools: dict[str, Pool]) -> None:
    async def act(host: PlayedHost) -> None:
        await host.see(20, 20, seconds=3)
        weights = []
        for _ in range(60):
            await host.silence(1)
            weights.append(host.keeper.weight("chat.0"))
        assert list(dict.fromkeys(weights)) == [100, 50, 1]
        await host.see(20, 20, seconds=2)
        assert host.keeper.weight("chat.0") == 100

    assert not play(tmp_path, act).setter.asked


def test_a_lost_gpu_takes_the_instance_down(tmp_path: Path) -> None:
    async def act(host: PlayedHost) -> None:
        await host.see(20, 20, seconds=3)
        gpus = host.gpus(20, 20)
        gpus[1] = {"uuid": "GPU-1", "index": 1, "state": "lost", "words": "it is gone"}
        host.now += 1
        host.keeper.see(gpus, host.now)
        assert host.keeper.down("chat.0") == "GPU 1 lost"
        host.now += 1
        host.keeper.see(host.gpus(20), host.now)  # NVML counts one less
        assert "GPU-1" in host.keeper.down("chat.0") or "GPU 1" in host.keeper.down("chat.0")
        await host.see(20, 20, seconds=1)
        assert host.keeper.down("chat.0") == ""

    play(tmp_path, act)


def test_parts_of_a_gpu_stand_for_the_whole(tmp_path: Path, pools: dict[str, Pool]) -> None:
    async def act(host: PlayedHost) -> None:
        placement = host.paths.placements / "chat.0.toml"
        placement.write_text(placement.read_text().replace('["GPU-0", "GPU-1"]', '["MIG-1"]'))
        parts = [{"uuid": "MIG-0", "id": 0, "profile": "1g"}, {"uuid": "MIG-1", "id": 1, "profile": "1g"}]
        await host.see(20, seconds=10, mig=parts)
        assert host.keeper.down("chat.0") == ""
        await host.see(-3, seconds=2, mig=parts)
        assert host.keeper.weight("chat.0") == 1

    assert {one["gpu"] for one in play(tmp_path, act).setter.asked} == {"GPU-0"}


def test_a_restart_goes_on_where_it_was(tmp_path: Path, pools: dict[str, Pool]) -> None:
    pools["now"] = Pool(0, 1)

    async def act(host: PlayedHost) -> None:
        await host.see(20, 20, seconds=3)
        await host.see(20, -3, seconds=3)
        await host.keeper._save()
        host.said.clear()
        host.begin()
        assert host.keeper.weight("chat.0") == 1  # before the first sample
        assert set(host.keeper._hands._wanted) == set(UUIDS)  # and clocks are held as they were
        assert not host.said  # nothing has moved
        host.paths.boot_id.write_text("boot-2\n")
        host.begin()
        assert host.keeper.weight("chat.0") == 100

    play(tmp_path, act)


def test_a_stray_file_leaves_no_instance_unguarded(tmp_path: Path, pools: dict[str, Pool]) -> None:
    pools["now"] = Pool(0, 1)

    async def act(host: PlayedHost) -> None:
        stray = host.paths.placements / "chat.0.bak.toml"
        stray.write_bytes((host.paths.placements / "chat.0.toml").read_bytes())
        host.begin()
        await host.see(20, -3, seconds=3)
        assert host.keeper.weight("chat.0") == 1
        (host.paths.placements / "chat.0.toml").write_text("torn = ")
        await host.see(20, -3, seconds=10)
        assert host.keeper.weight("chat.0") == 1

    play(tmp_path, act)


def test_a_stop_is_remembered_while_systemd_says_nothing(tmp_path: Path, pools: dict[str, Pool]) -> None:
    async def act(host: PlayedHost) -> None:
        await hot_until_stopped(host)
        host.unit = "inactive"
        await host.see(20, 15, seconds=2)
        await host.keeper._save()
        host.unit = ""
        host.begin()
        await host.see(20, 15, seconds=2)
        assert host.keeper.stopped("chat.0")
        host.unit = "inactive"
        await host.see(20, 15, seconds=40)
        assert host.setter.asked[-1] == {"verb": "start", "instance": "chat.0"}

    play(tmp_path, act)


def test_who_only_observes_starts_nothing(tmp_path: Path, pools: dict[str, Pool]) -> None:
    async def act(host: PlayedHost) -> None:
        await hot_until_stopped(host)
        host.unit = "inactive"
        await host.see(20, 15, seconds=2)
        host.paths.guard_orders.write_text(json.dumps({"mode": "observe"}))
        await host.see(20, 15, seconds=60)

    assert "start" not in play(tmp_path, act).setter.verbs()


def test_instances_that_share_a_cut_gpu_share_its_least_clock(tmp_path: Path, pools: dict[str, Pool]) -> None:
    assert keeper_module.lesser(Limit(1575, 560), Limit(690, None)) == Limit(690, 560)
    assert keeper_module.lesser(Limit(None, None), Limit(None, None)) == Limit(None, None)


def test_wrong_files_change_nothing_and_are_said_once(tmp_path: Path) -> None:
    async def act(host: PlayedHost) -> None:
        host.paths.guard_policy.write_text("less_margin_c = \"warm\"\n")
        host.paths.guard_orders.write_text("{")
        await host.see(20, 20, seconds=20)
        assert host.keeper.weight("chat.0") == 100
        said = [line for line in host.said if "less_margin_c" in line]
        assert len(said) == 1

    play(tmp_path, act)


def test_an_orderly_end_frees_the_clocks(tmp_path: Path, pools: dict[str, Pool]) -> None:
    pools["now"] = Pool(0, 1)

    async def act(host: PlayedHost) -> None:
        await host.see(20, 20, seconds=3)
        await host.see(20, -3, seconds=2)
        await host.keeper.leave()

    assert play(tmp_path, act).setter.verbs()[-1] == "release-all"
