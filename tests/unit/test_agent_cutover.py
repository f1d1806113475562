"""Cutovers and first starts: a played systemd, a real engine's API over HTTP, real files, real signatures."""

from __future__ import annotations

import errno
import io
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engine_kit import Engine, engine
from release_kit import ENGINE, Keys, build_environment, lay_down, make_host, make_keys
from systemd_kit import Systemd

from opsctl.agent import cutover as cutover_module
from opsctl.agent import cutover_verbs, drains, job, passed, unfinished
from opsctl.agent import host as host_program
from opsctl.agent.cutover import Order, Tools, accept, cutover, failure, killed, recover, undo_left
from opsctl.agent.durable import point_symlink, remove_tree
from opsctl.agent.paths import Paths
from opsctl.agent.unfinished import Record
from opsctl.errors import LockedError, MixedError, OpsctlError, PausedError, RefusedError, RolledBackError

UNIT = "inference@chat.0.service"
OWNER, OPERATOR = "run:20261122-031500-ab12", "operator:ann"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


class Killed(BaseException):
    """What a kill -9 and a power cut are to the worker: nothing runs after it."""


@dataclass
class World:
    """A host with chat.0 on v1, v2 beside it, and an engine that becomes whatever ``current.0`` says at each start.

    ``moods``: what is odd about the engine of a release; ``dies``: releases whose unit fails at its start.
    """

    paths: Paths
    engine: Engine
    v1: str
    v2: str
    units: Systemd = field(default_factory=Systemd)
    moods: dict[str, dict[str, Any]] = field(default_factory=dict)
    dies: set[str] = field(default_factory=set)
    phases: list[str] = field(default_factory=list)
    before: Callable[[list[str]], subprocess.CompletedProcess[str] | None] = lambda _: None  # may answer instead
    ends_at: str = ""  # the phase in which the worker is killed

    def __post_init__(self) -> None:
        self.units.on = self._obey

    def run(self, argv: Sequence[str], timeout_s: float = 0) -> subprocess.CompletedProcess[str]:
        return self.before(list(argv)) or self.units(argv, timeout_s)

    @property
    def link(self) -> Path:
        return self.paths.current("chat", 0)

    @property
    def serves(self) -> str:
        """The release that the running engine has; empty when the unit does not run."""
        return self.engine.moods.names[-1].partition("@")[2] if self.units.units.get(UNIT) == "active" else ""

    def _obey(self, argv: list[str]) -> None:
        if argv[:2] == ["systemctl", "start"]:
            release = self.link.readlink().name
            fresh = {"names": ("chat", f"chat@{release}"), "health": 200, "completions": 200, "lacks": 0, "running": 0,
                     "chat": 200}
            for name, value in {**fresh, **self.moods.get(release, {})}.items():
                setattr(self.engine.moods, name, value)
            if release in self.dies:
                self.units.units[UNIT] = "failed"
        elif argv[:2] == ["systemctl", "stop"]:
            self.engine.moods.health = 500

    def boots(self, release: str) -> None:
        """As if it had served that release for long."""
        self.link.parent.mkdir(parents=True, exist_ok=True)
        self.link.symlink_to(f"releases/{release}")
        self.units(["systemctl", "start", "--", UNIT])
        self.units.orders.clear()

    def drain(self) -> None:
        drains.put(self.paths, "chat.0", OWNER, 0, "cutover", "ann")
        drains.put(self.paths, "chat.0", OPERATOR, 50, "careful", "ann")

    @property
    def owners(self) -> list[str]:
        return [drain["owner"] for drain in drains.read_drains(self.paths, "chat.0")]

    def tools(self) -> Tools:
        clock = iter(range(1000))
        return Tools(self.run, self._doing, lambda: float(next(clock)), lambda _: None)

    def _doing(self, phase: str) -> None:
        self.phases.append(phase)
        if phase == self.ends_at:
            raise Killed

    def cut(self, percent: int = 1, **order: str) -> dict[str, Any]:
        given = {"release": self.v2, "from_release": self.v1, "owner": OWNER, **order}
        return cutover(self.paths, Order("chat.0", min_speed_percent=percent, **given), self.tools())

    def first_start(self) -> dict[str, Any]:
        return self.cut(release=self.v1, from_release="", owner="")

    def acts(self) -> list[str]:
        return [argv[1] for argv in self.units.orders if argv[0] == "systemctl" and argv[1] in ("start", "stop")]


@pytest.fixture
def bare(tmp_path: Path, keys: Keys) -> Iterator[World]:
    """chat.0 has never served."""
    with engine(names=("nobody",)) as one:
        paths = make_host(tmp_path / "host", keys, port=one.port)
        build_environment(paths)
        releases = [lay_down(paths.releases("chat"), {"model.gguf": content}, keys.private, version, start_timeout_s=9)
                    for version, content in (("v1", b"weights"), ("v2", b"better"))]
        yield World(paths, one, *(release.name for release in releases))


@pytest.fixture
def world(bare: World) -> World:
    bare.boots(bare.v1)
    bare.drain()
    return bare


def test_from_one_release_to_another(world: World) -> None:
    result = world.cut()
    assert {key: result[key] for key in ("changed", "instance", "release", "from", "verdict")} == {
        "changed": True, "instance": "chat.0", "release": world.v2, "from": world.v1, "verdict": "healthy"}
    assert [check["name"] for check in result["checks"]] == [
        "health", "identity", "completion", "chat", "stream", "speed", "unit"]
    assert result["tokens_per_second"] > 0
    assert result["baseline_tokens_per_second"] > 0
    assert min(result["stop_s"], result["start_s"], result["gate_s"]) > 0
    assert world.phases == ["measure", "stop", "flip", "start", "gate"]
    assert world.acts() == ["stop", "start"]
    assert (world.serves, world.link.readlink()) == (world.v2, Path("releases") / world.v2)
    assert world.owners == [OPERATOR]
    assert not world.paths.undo("chat.0").exists()
    kept = passed.read(world.paths, "chat.0", world.v2)
    assert kept is not None
    assert {key: kept[key] for key in ("release", "tokens_per_second", "chat", "stop_s", "start_s", "gate_s")} == {
        "release": world.v2, "tokens_per_second": result["tokens_per_second"], "chat": True, "stop_s": result["stop_s"],
        "start_s": result["start_s"], "gate_s": result["gate_s"]}
    assert kept["at"].endswith("Z")


def test_and_back(world: World) -> None:
    world.cut()
    assert world.cut(release=world.v1, from_release=world.v2)["changed"]
    assert world.serves == world.v1


def test_ordered_starts_do_not_count_against_the_limit_of_an_hour(world: World) -> None:
    world.dies.add(world.v2)
    with pytest.raises(RolledBackError):
        world.cut()
    verbs = [argv[1] for argv in world.units.orders if argv[0] == "systemctl" and argv[1] != "show"]
    assert verbs == ["stop", "reset-failed", "start", "stop", "reset-failed", "start"]


def test_what_served_is_accepted_again(world: World) -> None:
    """After a change of driver, or a boot: started unless it is well, and asked; its drain and its link stay."""
    assert not accept(world.paths, "chat.0", world.tools())["started"]
    assert world.acts() == []
    world.units(["systemctl", "stop", "--", UNIT])
    world.units.orders.clear()
    done = accept(world.paths, "chat.0", world.tools())
    assert (done["started"], done["verdict"], done["release"]) == (True, "healthy", world.v1)
    assert world.acts() == ["start"]
    assert world.owners == [OPERATOR, OWNER]
    assert world.serves == world.v1
    world.units(["systemctl", "stop", "--", UNIT])
    world.dies.add(world.v1)
    with pytest.raises(OpsctlError, match="ended"):
        accept(world.paths, "chat.0", world.tools())


def test_what_never_served_is_not_accepted(bare: World) -> None:
    with pytest.raises(RefusedError, match="never served"):
        accept(bare.paths, "chat.0", bare.tools())


def test_the_undo_is_written_before_the_first_act(world: World) -> None:
    seen: list[tuple[Any, bool, list[str]]] = []

    def look(argv: list[str]) -> None:
        if argv[1] == "stop":
            seen.append((json.loads(world.paths.undo("chat.0").read_bytes()), world.link.readlink().name == world.v1,
                         world.owners))
    world.before = look
    world.cut()
    assert seen[0] == ({"instance": "chat.0", "from": world.v1, "to": world.v2, "owner": OWNER, "ran": True,
                        "touched": True, "boot": "boot-1"}, True, [OPERATOR, OWNER])


def was_fast(world: World) -> None:
    """v1, of old; it cannot be measured now, because somebody else's requests are in flight."""
    passed.write(world.paths, "chat.0", world.v1, {"tokens_per_second": 1e9, "chat": True})
    world.engine.moods.running = 1


FAILURES: list[tuple[str, dict[str, Any], type[OpsctlError], str]] = [
    ("dies", {}, RolledBackError, "instance.did_not_start"),
    ("restarts", {}, RolledBackError, "instance.did_not_start"),
    ("never healthy", {"health": 503}, RolledBackError, "instance.did_not_start"),
    ("another release", {"names": ("chat", "chat@v9-000000000000")}, RolledBackError, "instance.did_not_start"),
    ("never a name", {"names": ()}, RolledBackError, "instance.did_not_start"),
    ("too short", {"lacks": 3}, RolledBackError, "gate.unhealthy"),
    ("errors", {"completions": 500}, RolledBackError, "gate.unhealthy"),
    ("no chat any more", {"chat": 400}, RolledBackError, "gate.unhealthy"),
    ("too slow", {}, RolledBackError, "gate.unhealthy"),
    ("later", {"completions": 503}, PausedError, "gate.inconclusive"),
    ("too slow, and disturbed", {"running": 1}, PausedError, "gate.inconclusive"),
]


@pytest.mark.parametrize(("what", "moods", "kind", "code"), FAILURES, ids=[row[0] for row in FAILURES])
def test_what_fails_is_undone_and_the_release_before_serves(world: World, what: str, moods: dict[str, Any],
                                                            kind: type[OpsctlError], code: str) -> None:
    world.units.log = ["loading model", "boom"]
    world.moods[world.v2] = moods
    if what == "dies":
        world.dies.add(world.v2)
    if what == "restarts":
        def restarts(argv: list[str]) -> None:
            if argv[1] in ("start", "stop"):
                world.units.restarts = int(argv[1] == "start" and world.link.readlink().name == world.v2)
        world.before = restarts
    if "too slow" in what:
        was_fast(world)
    with pytest.raises(kind) as error:
        world.cut()
    assert (type(error.value), error.value.code) == (kind, code)
    assert error.value.log_tail == ("loading model", "boom")
    assert f"{world.v1} serves again" in error.value.message
    assert error.value.hint
    assert (world.serves, world.link.readlink().name) == (world.v1, world.v1)
    assert world.acts() == ["stop", "start", "stop", "start"]
    assert world.phases[-1] == "undo"
    assert world.owners == [OPERATOR]
    assert not world.paths.undo("chat.0").exists()
    assert passed.read(world.paths, "chat.0", world.v2) is None


@pytest.mark.parametrize("mute", ["the new one", "the old one that is brought back"])
def test_no_answer_to_who_are_you_is_asked_again(world: World, mute: str) -> None:
    """It had no time for it, right after its start."""
    release = world.v2 if mute == "the new one" else world.v1
    world.moods[release] = {"names": ()}
    if release == world.v1:
        world.dies.add(world.v2)
    looks = iter(range(100))

    def speaks(argv: list[str]) -> None:
        if argv[1] == "show" and world.acts()[-1:] == ["start"] and world.link.readlink().name == release \
                and next(looks) == 3:
            world.engine.moods.names = ("chat", f"chat@{release}")
    world.before = speaks
    if release == world.v1:
        with pytest.raises(RolledBackError):
            world.cut()
    else:
        world.cut()
    assert world.serves == release


def test_any_speed_will_do_when_the_order_says_so(world: World) -> None:
    was_fast(world)
    assert world.cut(percent=0)["verdict"] == "healthy"


def test_it_may_die_while_it_is_asked(world: World) -> None:
    """And come back between two questions."""
    def look(argv: list[str]) -> None:
        world.units.restarts = int(world.phases[-1:] == ["gate"])
    world.before = look
    with pytest.raises(RolledBackError) as error:
        world.cut(percent=0)
    assert error.value.code == "gate.unhealthy"
    assert "unit: ended" in error.value.message
    assert world.serves == world.v1


def test_neither_comes_up(world: World) -> None:
    world.dies |= {world.v1, world.v2}
    world.units.log = ["boom"]
    with pytest.raises(MixedError) as error:
        world.cut()
    assert error.value.code == "cutover.not_undone"
    assert error.value.log_tail == ("boom", "boom")
    assert world.v1 in error.value.message
    assert world.v2 in error.value.message
    assert world.link.readlink().name == world.v1
    assert not world.paths.undo("chat.0").exists()  # nothing of it is left to undo


def test_the_release_before_may_need_a_few_tries(world: World) -> None:
    """The one that was tried may not have given the memory back yet."""
    world.dies.add(world.v2)
    tries = iter(["activating", "activating", "active"])

    def again(argv: list[str]) -> None:
        if argv[1] == "show" and world.phases[-1:] == ["undo"] and world.link.readlink().name == world.v1:
            world.units.restarts = 2
            world.units.units[UNIT] = next(tries, "active")
    world.before = again
    with pytest.raises(RolledBackError):
        world.cut()
    assert world.serves == world.v1


def test_one_that_did_not_run_before_is_no_mixed_fleet(world: World) -> None:
    world.units.units[UNIT] = "failed"
    world.engine.moods.health = 500
    world.dies |= {world.v1, world.v2}
    with pytest.raises(RolledBackError) as error:
        world.cut()
    assert "did not run before and does not run now" in error.value.message


def test_one_that_failed_is_moved_by_its_last_gate(world: World) -> None:
    passed.write(world.paths, "chat.0", world.v1, {"tokens_per_second": 1e9, "chat": True})
    world.units.units[UNIT] = "failed"
    world.engine.moods.health = 500
    with pytest.raises(RolledBackError) as error:
        world.cut(percent=50)
    assert "1000000000.0" in error.value.message


def test_one_that_is_disturbed_is_measured_by_its_last_gate(world: World) -> None:
    was_fast(world)
    result = world.cut(percent=0)
    assert result["baseline_tokens_per_second"] == 1e9
    assert "chat" in [check["name"] for check in result["checks"]]  # it answered one now


def test_without_a_baseline_speed_is_not_judged(world: World) -> None:
    world.engine.moods.completions = 500
    result = world.cut()
    assert (result["verdict"], result["baseline_tokens_per_second"]) == ("healthy", None)


def test_a_damaged_measurement_is_none(world: World) -> None:
    passed.write(world.paths, "chat.0", world.v1, {"tokens_per_second": 1.5})
    path = world.paths.gates / "chat.0" / f"{world.v1}.json"
    path.write_text(path.read_text()[:-5])
    assert passed.read(world.paths, "chat.0", world.v1) is None


@pytest.mark.parametrize(("harm", "code"), [
    (lambda world: remove_tree(world.paths.releases("chat") / world.v2), "release.not_staged"),
    (lambda world: (world.paths.releases("chat") / world.v2 / "files/model.gguf").write_bytes(b"b"),
     "release.not_staged"),
    (lambda world: (world.paths.engines / ENGINE.directory / ".complete").unlink(), "release.not_staged"),
    (lambda world: (world.paths.releases("chat") / world.v2 / "manifest.json.sig").unlink(), "release.unsigned"),
    (lambda world: point_symlink(world.link, "releases/v0-000000000000"), "cutover.moved"),
    (lambda world: world.link.unlink(), "cutover.moved"),
])
def test_refused_before_anything_is_touched(world: World, harm: Callable[[World], Any], code: str) -> None:
    harm(world)
    with pytest.raises(RefusedError) as error:
        world.cut()
    assert error.value.code == code
    assert world.acts() == []
    assert world.owners == [OPERATOR]  # it serves on, so what was drained for this comes back
    assert not world.paths.undo("chat.0").exists()


def test_where_it_is_already(world: World) -> None:
    world.cut()
    orders = len(world.acts())
    world.drain()
    again = world.cut()
    assert (again["changed"], again["release"], len(world.acts())) == (False, world.v2, orders)
    assert again["tokens_per_second"] > 0
    assert world.owners == [OPERATOR]
    world.engine.moods.health = 500
    with pytest.raises(RefusedError, match="not healthy"):
        world.cut()


def test_what_fails_while_the_engine_that_serves_is_measured_leaves_it_alone(world: World,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    world.engine.moods.health = 503  # nobody waits for it to be well either
    seen: list[Any] = []

    def full(phase: str) -> None:
        seen.append((phase, unfinished.read(world.paths, "chat.0")))
        if phase == "measure":
            raise OSError(errno.ENOSPC, "full")
    monkeypatch.setattr(world, "_doing", full)
    with pytest.raises(OSError, match="full"):
        world.cut()
    assert seen[0] == ("measure", Record("chat.0", world.v1, world.v2, OWNER, touched=False))
    assert [argv for argv in world.units.orders if argv[1] != "show"] == []
    assert world.owners == [OPERATOR]
    assert not world.paths.undo("chat.0").exists()


def test_a_unit_that_does_not_stop(world: World) -> None:
    """Nothing was flipped: it goes on with what it had."""
    with_refusal(world, "stop")
    with pytest.raises(RolledBackError) as error:
        world.cut()
    assert error.value.code == "instance.not_stopped"
    assert (world.serves, world.link.readlink().name) == (world.v1, world.v1)


def test_one_that_cannot_be_stopped_to_be_undone_keeps_its_record(world: World) -> None:
    world.moods[world.v2] = {"lacks": 3}
    with_refusal(world, "stop", from_the=2)
    with pytest.raises(MixedError) as error:
        world.cut()
    assert error.value.code == "cutover.not_undone"
    assert world.paths.undo("chat.0").exists()  # so the voice keeps traffic away from it
    assert world.link.readlink().name == world.v2


def with_refusal(world: World, verb: str, from_the: int = 1) -> None:
    """systemd refuses ``verb`` from its n-th time on."""
    times = iter(range(1, 100))
    world.before = lambda argv: subprocess.CompletedProcess(argv, 1, "", "Job timed out") if (
        argv[1] == verb and next(times) >= from_the) else None


# Cut off in the middle.


POINTS = ["stop", "flip", "start", "gate"]  # the act that did not take place any more


def cut_off(world: World, point: str) -> None:
    world.ends_at = point
    with pytest.raises(Killed):
        world.cut()
    world.ends_at = ""
    world.drain()  # ``finally`` ran in this test; it does not when a worker is killed
    world.units.orders.clear()
    assert world.paths.undo("chat.0").exists()


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_workers_cutover_is_undone_there_and_then(world: World, point: str) -> None:
    cut_off(world, point)
    record, trouble = undo_left(world.paths, "chat.0", OWNER, world.tools())
    assert (record, trouble) == (Record("chat.0", world.v1, world.v2, OWNER), "")
    assert (world.serves, world.link.readlink().name) == (world.v1, world.v1)
    assert world.owners == [OPERATOR]
    assert not world.paths.undo("chat.0").exists()
    orders = len(world.acts())
    assert undo_left(world.paths, "chat.0", OWNER, world.tools()) == (None, "")
    assert len(world.acts()) == orders


def test_a_worker_that_was_killed_before_it_stopped_anything_costs_nothing(world: World) -> None:
    cut_off(world, "stop")
    undo_left(world.paths, "chat.0", OWNER, world.tools())
    assert world.acts() == ["start"]  # which an active unit does not notice


@pytest.mark.parametrize("boot", ["boot-1", "boot-2"])
def test_a_worker_that_was_killed_while_it_measured_has_touched_nothing(world: World, boot: str) -> None:
    cut_off(world, "measure")
    world.engine.moods.health = 503
    world.paths.boot_id.write_text(f"{boot}\n")
    if boot == "boot-1":
        undo_left(world.paths, "chat.0", OWNER, world.tools())
    else:
        assert recover(world.paths, world.units)["undone"] == ["chat.0"]
    assert world.units.orders == []
    assert (world.link.readlink().name, world.owners) == (world.v1, [OPERATOR])
    assert not world.paths.undo("chat.0").exists()


def test_a_record_of_an_older_version_has_touched(world: World) -> None:
    cut_off(world, "gate")
    path = world.paths.undo("chat.0")
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "touched"}))
    assert unfinished.read(world.paths, "chat.0") == Record("chat.0", world.v1, world.v2, OWNER)


@pytest.mark.parametrize("point", POINTS)
def test_after_a_power_cut_the_release_before_is_there_at_boot(world: World, point: str) -> None:
    cut_off(world, point)
    world.paths.boot_id.write_text("boot-2\n")
    world.units.units.clear()
    assert recover(world.paths, world.units) == {"changed": True, "undone": ["chat.0"]}
    assert world.link.readlink().name == world.v1
    assert world.acts() == []  # it waits for us in systemd's queue
    assert world.owners == [OPERATOR]
    assert not world.paths.undo("chat.0").exists()
    assert recover(world.paths, world.units) == {"changed": False, "undone": []}


def test_what_runs_already_is_stopped_and_started_without_waiting(world: World) -> None:
    cut_off(world, "gate")
    world.paths.boot_id.write_text("boot-2\n")
    recover(world.paths, world.units)
    assert world.acts() == ["stop", "start"]
    assert ["systemctl", "start", "--no-block", "--", UNIT] in world.units.orders
    assert world.serves == world.v1


def test_one_that_cannot_be_ordered_to_start_is_told(world: World) -> None:
    cut_off(world, "gate")
    world.paths.boot_id.write_text("boot-2\n")
    with_refusal(world, "start")
    with pytest.raises(OpsctlError, match="Job timed out"):
        recover(world.paths, world.run)
    assert world.link.readlink().name == world.v1


def test_the_next_cutover_undoes_what_was_left_before_it_begins(world: World) -> None:
    cut_off(world, "gate")
    assert world.cut()["changed"]
    assert world.acts() == ["stop", "start", "stop", "start"]
    assert world.serves == world.v2


def test_one_of_this_boot_is_left_alone_at_boot(world: World) -> None:
    cut_off(world, "gate")
    assert not recover(world.paths, world.units)["changed"]
    assert world.units.orders == []


def test_nobody_undoes_one_that_runs(world: World) -> None:
    met: list[str] = []

    def meanwhile(argv: list[str]) -> None:
        if argv[1] == "start":
            world.paths.boot_id.write_text("boot-3\n")
            assert not recover(world.paths, Systemd())["changed"]
            with pytest.raises(LockedError) as locked:
                undo_left(world.paths, "chat.0", OWNER, Tools(Systemd()))
            met.append(locked.value.code)
    world.before = meanwhile
    assert world.cut()["changed"]
    assert met == ["cutover.at_work"]
    assert world.link.readlink().name == world.v2


def test_a_record_that_cannot_be_read_is_a_persons_business(world: World) -> None:
    cut_off(world, "gate")
    world.paths.undo("chat.0").write_text("{")
    with pytest.raises(OpsctlError) as error:
        recover(world.paths, world.units)
    assert (error.value.code, world.link.readlink().name) == ("cutover.bad_record", world.v2)
    assert str(world.paths.undo("chat.0")) in error.value.message
    assert unfinished.of_earlier_boot(world.paths, "chat.0")  # so the voice says down


# How a cutover ended. Pure.

RAN, FAILED_BEFORE = Record("chat.0", "v1-a", "v2-b"), Record("chat.0", "v1-a", "v2-b", ran=False)
FIRST = Record("chat.0", "", "v2-b", ran=False)


@pytest.mark.parametrize(("record", "code", "trouble", "kind", "outcome", "words"), [
    (RAN, "instance.died", "", RolledBackError, "instance.did_not_start", "did not start: x; v1-a serves again."),
    (RAN, "gate.unhealthy", "", RolledBackError, "gate.unhealthy", "does not pass the gate: x; v1-a serves again."),
    (RAN, "gate.inconclusive", "", PausedError, "gate.inconclusive", "v1-a serves again."),
    (RAN, "instance.not_stopped", "", RolledBackError, "instance.not_stopped", "was not tried: x"),
    (RAN, "cutover.killed", "", RolledBackError, "cutover.killed", "v1-a serves again."),
    (RAN, "gate.inconclusive", "y", MixedError, "cutover.not_undone", "does not come back: y."),
    (FAILED_BEFORE, "instance.died", "y", RolledBackError, "instance.did_not_start", "does not run now: y."),
    (FAILED_BEFORE, "gate.inconclusive", "y", PausedError, "gate.inconclusive", "does not run now: y."),
    (FIRST, "instance.died", "", RolledBackError, "instance.did_not_start", "it has no release again."),
])
def test_how_it_ended(record: Record, code: str, trouble: str, kind: type[OpsctlError], outcome: str, words: str
                      ) -> None:
    found = failure(record, OpsctlError(code, "x."), trouble, ("log",))
    assert (type(found), found.code, found.log_tail) == (kind, outcome, ("log",))
    assert found.message.endswith(words) or words in found.message
    assert found.hint


def test_the_last_word_of_a_worker_that_is_gone_is_kept() -> None:
    assert killed({"state": "running"}).message == "the worker of its cutover was killed"
    assert killed({"state": "failed", "error": {"message": "unexpected KeyError."}}).message == "unexpected KeyError"


# First starts: cutovers from nothing.


def test_a_first_start(bare: World) -> None:
    result = bare.first_start()
    assert (result["changed"], result["release"], result["baseline_tokens_per_second"]) == (True, bare.v1, None)
    assert [check["name"] for check in result["checks"]] == [
        "health", "identity", "completion", "stream", "speed", "unit"]
    assert bare.serves == bare.v1
    assert not bare.paths.undo("chat.0").exists()


def test_an_instance_that_has_served_is_left_alone(world: World) -> None:
    result = world.cut(from_release="")
    assert (result["changed"], result["release"]) == (False, world.v1)
    assert world.acts() == []


@pytest.mark.parametrize("failure", ["dies", "never healthy", "too short"])
def test_a_first_start_that_fails_leaves_nothing(bare: World, failure: str) -> None:
    bare.units.log = ["boom"]
    if failure == "dies":
        bare.dies.add(bare.v1)
    bare.moods[bare.v1] = {"never healthy": {"health": 503}, "too short": {"lacks": 1}}.get(failure, {})
    with pytest.raises(RolledBackError) as error:
        bare.first_start()
    assert error.value.log_tail == ("boom",)
    assert "no release again" in error.value.message
    assert not bare.link.is_symlink()
    assert bare.units.units[UNIT] == "inactive"
    assert not bare.paths.undo("chat.0").exists()


def test_a_first_start_that_a_power_cut_ended_is_undone_at_boot(bare: World) -> None:
    bare.ends_at = "start"
    with pytest.raises(Killed):
        bare.first_start()
    assert bare.link.is_symlink()
    bare.paths.boot_id.write_text("boot-2\n")
    bare.units.units.clear()
    (bare.paths.placements / "chat.0.toml").unlink()  # the instance left meanwhile
    assert recover(bare.paths, bare.units)["changed"]
    assert not bare.link.is_symlink()
    assert not bare.paths.undo("chat.0").exists()


def test_a_journal_that_cannot_be_read_keeps_nothing_from_being_undone(bare: World) -> None:
    def ill(argv: list[str]) -> None:
        if argv[0] == "journalctl":
            raise OpsctlError("host.systemd", "journalctl could not be run.")
    bare.before = ill
    bare.dies.add(bare.v1)
    with pytest.raises(RolledBackError) as error:
        bare.first_start()
    assert "journalctl could not be run." in error.value.log_tail
    assert not bare.link.is_symlink()


# The verbs.


def said(argv: list[str]) -> tuple[int, dict[str, Any]]:
    out = io.StringIO()
    with redirect_stdout(out):
        code = host_program.main(argv)
    return code, json.loads(out.getvalue())


@pytest.fixture
def here(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """``opsctl-host`` on that host; jobs are begun and looked at, and nobody waits for one."""
    monkeypatch.setattr(host_program, "Paths", lambda: world.paths)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    for name in ("start", "wait"):
        monkeypatch.setattr(job, name, partial(getattr(job, name), run=world.units))
    return world


NAME = "opsctl-cutover@chat.0"


def begun(world: World) -> list[str]:
    return next(argv for argv in world.units.orders if argv[0] == "systemd-run")


def test_a_cutover_is_a_unit_that_systemd_undoes_when_it_dies(here: World) -> None:
    code, status = said(["cutover", "chat.0", "--release", here.v2, "--from", here.v1, "--owner", OWNER,
                         "--min-speed-percent", "70", "--wait-s", "0"])
    assert (code, status["state"]) == (0, "running")
    order = begun(here)
    assert f"--unit={NAME}.service" in order
    assert order[order.index("work-cutover"):] == [
        "work-cutover", "chat.0", "--release", here.v2, "--from", here.v1, "--owner", OWNER,
        "--min-speed-percent", "70"]
    (after,) = [word for word in order if word.startswith("--property=ExecStopPost=")]
    assert after.endswith(f" work-undo chat.0 --owner {OWNER}")
    assert "--property=TimeoutStopSec=769" in order  # to stop it, what v1 may take to start, and some
    assert not any("Nice" in word for word in order)  # it measures
    again = ["cutover", "chat.0", "--release", here.v2, "--from", here.v1, "--owner", OWNER,
             "--min-speed-percent", "70", "--wait-s", "0"]
    assert said(again)[1]["state"] == "running"
    assert len([argv for argv in here.units.orders if argv[0] == "systemd-run"]) == 1
    code, document = said(["cutover", "chat.0", "--release", here.v1, "--from", here.v2, "--wait-s", "0"])
    assert (code, document["error"]["code"]) == (4, "job.other")


OTHER = "run:20261122-040000-cd34"


def test_another_run_that_orders_the_same_joins_it_and_keeps_no_drain(here: World) -> None:
    same = ["cutover", "chat.0", "--release", here.v2, "--from", here.v1, "--wait-s", "0"]
    assert not said([*same, "--owner", OWNER])[1]["joined"]
    drains.put(here.paths, "chat.0", OTHER, 0, "cutover", "bob")
    code, status = said([*same, "--owner", OTHER, "--min-speed-percent", "30"])
    assert (code, status["state"], status["joined"]) == (0, "running", True)
    assert here.owners == [OPERATOR, OWNER]
    reporter = job.Reporter(here.paths, NAME, begun(here)[begun(here).index("work-cutover"):])
    assert said([*same, "--owner", OWNER])[1]["joined"]
    assert here.owners == [OPERATOR, OWNER], "its own worker ends that one"
    reporter.finished({"changed": True})
    here.units.units.pop(f"{NAME}.service")
    watched = ["cutover-status", "chat.0", "--release", here.v2]
    assert said(watched)[1]["result"] == {"changed": True}
    assert len([argv for argv in here.units.orders if argv[0] == "systemd-run"]) == 1


def test_a_first_start_is_the_same_job_as_a_cutover_from_nothing(here: World) -> None:
    assert said(["first-start", "chat.0", "--release", here.v1, "--wait-s", "0"])[0] == 0
    order = begun(here)
    assert order[order.index("work-cutover"):] == [
        "work-cutover", "chat.0", "--release", here.v1, "--from", "none", "--min-speed-percent", "50"]
    assert "--property=TimeoutStopSec=760" in order
    assert said(["cutover", "chat.0", "--release", here.v1, "--from", "none", "--wait-s", "0"])[0] == 0


@pytest.mark.parametrize("verb", ["cutover-status", "first-start-status"])
def test_a_status_is_that_of_the_release_that_is_asked_for(here: World, verb: str) -> None:
    assert said([verb, "chat.0", "--release", here.v2])[1]["state"] == "none"
    said(["cutover", "chat.0", "--release", here.v2, "--from", here.v1, "--owner", OWNER, "--wait-s", "0"])
    job.Reporter(here.paths, NAME, begun(here)[begun(here).index("work-cutover"):]).doing("gate")
    assert said([verb, "chat.0", "--release", here.v2])[1]["phase"] == "gate"
    assert said([verb, "chat.0"])[1]["phase"] == "gate"
    code, document = said([verb, "chat.0", "--release", here.v1])
    assert (code, document["error"]["code"]) == (4, "job.other")


@pytest.mark.parametrize("argv", [
    ["--from", "v1"], ["--from", "none", "--owner", "../x"], ["--from", "none", "--min-speed-percent", "-1"], [],
])
def test_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        host_program.main(["cutover", "chat.0", "--release", "v1-000000000000", *argv])
    assert stopped.value.code == 2


def test_no_job_for_an_instance_that_is_none(here: World) -> None:
    code, document = said(["cutover", "../x", "--release", here.v2, "--from", here.v1])
    assert (code, document["error"]["code"]) == (3, "instance.unknown")
    assert here.units.orders == []


@pytest.fixture
def played(here: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The unit's own verbs as well."""
    monkeypatch.setattr(cutover_verbs, "Tools", lambda doing=lambda _: None: here.tools())
    monkeypatch.setattr(cutover_module, "last_words", lambda record, run=None: ("Killed",))
    return here


def work(world: World) -> list[str]:
    return ["work-cutover", "chat.0", "--release", world.v2, "--from", world.v1, "--owner", OWNER]


def test_what_systemd_runs_after_a_good_end_changes_nothing(played: World) -> None:
    assert said(work(played))[0] == 0
    assert said(["work-undo", "chat.0", "--owner", OWNER]) == (0, {"changed": False, "instance": "chat.0"})
    status = said(["cutover-status", "chat.0", "--release", played.v2])[1]
    assert (status["state"], status["result"]["changed"]) == ("done", True)


@pytest.mark.parametrize(("point", "code", "exit_code"), [
    ("measure", "cutover.killed", 5), ("stop", "cutover.killed", 6), ("gate", "cutover.killed", 6)])
def test_a_killed_worker_is_spoken_for(played: World, point: str, code: str, exit_code: int) -> None:
    played.ends_at = point
    with pytest.raises(Killed):
        said(work(played))
    played.ends_at = ""
    played.drain()
    assert said(["work-undo", "chat.0", "--owner", OWNER])[0] == 0
    status = said(["cutover-status", "chat.0", "--release", played.v2])[1]
    assert (status["state"], status["error"]["code"], status["error"]["exit_code"]) == ("failed", code, exit_code)
    assert played.serves == played.v1
    assert played.owners == [OPERATOR]


def test_a_worker_that_fails_unexpectedly_is_spoken_for_too(played: World) -> None:
    def broken(argv: list[str]) -> None:
        if argv[1] == "stop":
            played.before = lambda _: None
            raise RuntimeError("what")
    played.before = broken
    assert said(work(played))[0] == 1
    assert said(["work-undo", "chat.0", "--owner", OWNER])[1]["changed"]
    status = said(["cutover-status", "chat.0"])[1]
    assert (status["error"]["code"], status["error"]["exit_code"]) == ("cutover.killed", 6)
    assert "RuntimeError: what" in status["error"]["message"]


def test_one_that_cannot_be_undone_is_mixed(played: World) -> None:
    played.ends_at = "gate"
    with pytest.raises(Killed):
        said(work(played))
    played.ends_at = ""
    with_refusal(played, "stop")
    assert said(["work-undo", "chat.0", "--owner", OWNER])[0] == 1
    status = said(["cutover-status", "chat.0"])[1]
    assert (status["error"]["code"], status["error"]["exit_code"]) == ("cutover.not_undone", 7)
    assert played.paths.undo("chat.0").exists()
