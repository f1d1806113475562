"""An instance that left: nothing of it stays but its releases, and nothing is taken from under a cutover."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from release_kit import Keys, make_host, make_keys
from systemd_kit import Systemd

from opsctl.agent import drains, leaving, passed, unfinished
from opsctl.agent.durable import point_symlink
from opsctl.agent.paths import Paths
from opsctl.agent.settings import Placement, read_placement
from opsctl.errors import LockedError, OpsctlError

UNIT = "inference@chat.0.service"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def host(tmp_path: Path, keys: Keys) -> Paths:
    """chat.0 serves v1, was drained by ann, passed a gate, and has a cache; so does chat.1, which stays."""
    paths = make_host(tmp_path, keys)
    (paths.releases("chat") / "v1-000000000000").mkdir(parents=True)
    for index in (0, 1):
        point_symlink(paths.current("chat", index), "releases/v1-000000000000")
        drains.put(paths, f"chat.{index}", "operator:ann", 0, "", "ann")
        passed.write(paths, f"chat.{index}", "v1-000000000000", {})
        (paths.cache(f"chat.{index}") / "kernels").mkdir(parents=True)
    return paths


def placement(host: Paths) -> Placement:
    return read_placement(host, "chat.0")


def of(host: Paths, index: int) -> list[bool]:
    name = f"chat.{index}"
    return [host.current("chat", index).is_symlink(), host.drains(name).exists(), (host.gates / name).exists(),
            host.cache(name).exists()]


def test_it_is_drained_stopped_and_forgotten_and_its_releases_stay(host: Paths) -> None:
    drained: list[str] = []
    system = Systemd({UNIT: "active"})
    system.on = lambda argv: drained.extend(
        one["owner"] for one in drains.read_drains(host, "chat.0")) if argv[:2] == ["systemctl", "stop"] else None
    done = leaving.leave(host, placement(host), system)
    assert (done["changed"], done["stopped"]) == (True, True)
    assert drained == ["operator:ann", "run:leaving"]
    assert of(host, 0) == [False] * 4
    assert of(host, 1) == [True] * 4
    assert (host.releases("chat") / "v1-000000000000").is_dir()
    again = leaving.leave(host, placement(host), system)
    assert (again["changed"], again["removed"]) == (False, [])
    assert [argv[1] for argv in system.orders].count("stop") == 1


def test_what_an_interrupted_run_left_is_taken_away(host: Paths) -> None:
    """Stopped already, forgotten in part."""
    host.current("chat", 0).unlink()
    assert leaving.leave(host, placement(host), Systemd())["changed"]
    assert of(host, 0) == [False] * 4


def test_not_while_a_cutover_works_on_it(host: Paths) -> None:
    system = Systemd({UNIT: "active"})
    with unfinished.held(host, "chat.0"), pytest.raises(LockedError) as refused:
        leaving.leave(host, placement(host), system)
    assert refused.value.code == "cutover.busy"
    assert system.orders == []
    assert of(host, 0) == [True] * 4


def test_a_unit_that_does_not_stop_is_not_forgotten(host: Paths) -> None:
    class Stubborn(Systemd):
        def __call__(self, argv, timeout_s=0.0):  # type: ignore[no-untyped-def]
            done = super().__call__(argv, timeout_s)
            return subprocess.CompletedProcess(argv, 1, "", "no") if argv[:2] == ["systemctl", "stop"] else done

    with pytest.raises(OpsctlError) as failed:
        leaving.leave(host, placement(host), Stubborn({UNIT: "active"}))
    assert failed.value.code == "instance.not_stopped"
    assert of(host, 0) == [True] * 4
