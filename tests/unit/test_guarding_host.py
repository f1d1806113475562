"""opsctl-host guard, guard-mode, guard-unlatch: what is passed on, what is ordered, what is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import guard_kit
import pytest
from machines import Machine
from release_kit import Keys, make_host, make_keys

from opsctl.agent import audit, guard_verbs, guard_view
from opsctl.agent.drains import boot_clock
from opsctl.agent.guard.model import Policy
from opsctl.agent.paths import Paths
from opsctl.agent.state import state
from opsctl.errors import ConfigurationError


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def host(tmp_path: Path, keys: Keys) -> Paths:
    return make_host(tmp_path / "host", keys)


def write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def gpus(good_at: float | None = 4999.0) -> dict[str, Any]:
    """What the reader's side of the agent tells of the same GPUs."""
    device = {"uuid": guard_kit.GPU_0, "index": 0, "model": "NVIDIA H200", "instance": "chat.0", "state": "ok",
              "temperature_c": 61, "margin_c": 26, "margin_source": "margin_api", "power_w": 412.3,
              "power_limit_w": 700.0, "utilisation_percent": 93, "memory_used_mib": 1.0, "memory_total_mib": 2.0,
              "reasons": [], "xids": [], "pids": []}
    return {"at_boot_s": 5000.0, "good_at_boot_s": good_at, "state": "ok", "words": "", "devices": [device]}


def test_the_document_is_passed_on_with_its_age(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    write(paths.guard, guard_kit.document())
    write(paths.gpus, gpus())
    found = guard_view.look(paths, 5001.25)
    assert found is not None
    assert (found["age_s"], found["sample_age_s"], found["words"]) == (1.2, 2.2, "")
    assert (found["mode"], found["instances"]) == ("auto", [guard_kit.instance()])
    assert [one["power_limit_w"] for one in found["gpus"]] == [700.0, None]  # the reader knows no second one
    assert "at_boot_s" not in found


def test_what_is_ordered_is_told_besides_what_the_guard_goes_by(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    assert guard_view.answer(paths, 5000.0)["ordered"] == "auto"
    write(paths.guard, guard_kit.document(mode="enforce"))
    write(paths.guard_orders, {"mode": "observe"})
    found = guard_view.answer(paths, 5000.0)
    assert (found["mode"], found["ordered"]) == ("enforce", "observe")


@pytest.mark.parametrize(("now", "words"), [
    (5005.0, ""),
    (5006.0, "the guard said nothing for 6 s: systemctl status opsctl-agent"),
    (4000.0, ""),  # written by another boot's clock a moment before a look: never a negative age
])
def test_a_guard_that_is_silent_is_told(tmp_path: Path, now: float, words: str) -> None:
    paths = Paths(tmp_path)
    write(paths.guard, guard_kit.document())
    found = guard_view.answer(paths, now)
    assert found["words"] == words
    assert found["age_s"] >= 0


def test_gpus_are_seen_where_no_guard_speaks(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    write(paths.gpus, gpus())
    found = guard_view.answer(paths, 5000.0)
    assert (found["age_s"], found["instances"], found["enforcing"]) == (None, [], False)
    assert found["words"].startswith("no guard speaks here: systemctl status opsctl-agent")
    (one,) = found["gpus"]
    assert (one["margin_c"], one["time_to_slowdown_s"], one["power_limit_w"]) == (26, None, 700.0)
    assert set(one) == {*guard_kit.gpu(), "power_limit_w"}


def test_nothing_at_all_is_words_and_not_an_error(host: Paths) -> None:
    done = Machine(host, "gpu-1").run(["opsctl-host", "guard"])
    found = json.loads(done.stdout)
    assert (done.returncode, found["age_s"], found["gpus"], found["mode"]) == (0, None, [], "auto")
    assert "systemctl status opsctl-agent" in found["words"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"at_boot_s": 1}'])
def test_half_a_file_is_no_traceback(tmp_path: Path, text: str) -> None:
    paths = Paths(tmp_path)
    paths.guard.parent.mkdir(parents=True)
    paths.guard.write_text(text)
    assert guard_view.answer(paths, 5000.0)["gpus"] == []


def test_it_needs_no_root(host: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("opsctl.agent.host.Paths", lambda: host)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    from opsctl.agent import host as program

    assert program.main(["guard"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "opsctl.guard/v1"
    assert program.main(["guard-mode", "enforce"]) == 5
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "host.needs_root"


def test_orders_are_kept_together(host: Paths) -> None:
    assert guard_verbs.set_mode(host, "enforce", "ann@desk", lambda: 10.0) == {
        "changed": True, "mode": "enforce", "before": "auto"}
    guard_verbs.unlatch(host, "chat.0", "bob@desk", lambda: 20.0)
    assert json.loads(host.guard_orders.read_text()) == {
        "mode": "enforce", "unlatch": {"chat.0": 20.0}, "by": "bob@desk", "at": 20.0}
    assert not guard_verbs.set_mode(host, "enforce", "cyd@desk", lambda: 30.0)["changed"]
    assert guard_view.orders(host)["by"] == "bob@desk"  # nothing was changed, so nobody changed it
    guard_verbs.set_mode(host, "observe", "cyd@desk", lambda: 40.0)
    assert guard_view.orders(host) == {"mode": "observe", "unlatch": {"chat.0": 20.0}, "by": "cyd@desk", "at": 40.0}
    assert host.guard_orders.stat().st_mode & 0o777 == 0o644  # the agent is another user


def test_an_order_for_one_instance_leaves_those_for_others(host: Paths) -> None:
    first = (host.placements / "chat.0.toml").read_text()
    (host.placements / "chat.1.toml").write_text(first.replace("chat.0", "chat.1").replace("index = 0", "index = 1"))
    guard_verbs.unlatch(host, "chat.0", "ann", lambda: 10.0)
    guard_verbs.unlatch(host, "chat.1", "ann", lambda: 20.0)
    guard_verbs.unlatch(host, "chat.0", "ann", lambda: 30.0)
    assert guard_view.orders(host)["unlatch"] == {"chat.0": 30.0, "chat.1": 20.0}


@pytest.mark.parametrize("text", ["{", '{"mode": "full speed", "unlatch": 3}', '["enforce"]'])
def test_orders_that_cannot_be_read_are_none_and_the_next_one_mends_them(host: Paths, text: str) -> None:
    host.guard_orders.parent.mkdir(parents=True, exist_ok=True)
    host.guard_orders.write_text(text)
    assert guard_view.orders(host)["mode"] == "auto"
    guard_verbs.set_mode(host, "observe", "ann")
    assert guard_view.orders(host)["mode"] == "observe"


def test_only_what_is_placed_here_is_unlatched(host: Paths) -> None:
    with pytest.raises(ConfigurationError) as error:
        guard_verbs.unlatch(host, "../chat.0", "ann")
    assert error.value.code == "instance.unknown"
    assert not host.guard_orders.exists()


def test_who_ordered_what_is_in_the_journal(host: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(audit, "record", lambda verb, what: written.append({"verb": verb, **what}))
    machine = Machine(host, "gpu-1")
    assert machine.run(["opsctl-host", "guard-mode", "enforce", "--by", "ann@desk"]).returncode == 0
    assert machine.run(["opsctl-host", "guard-unlatch", "chat.0", "--by", "ann@desk"]).returncode == 0
    machine.run(["opsctl-host", "guard"])
    assert written == [{"verb": "guard-mode", "mode": "enforce", "by": "ann@desk"},
                       {"verb": "guard-unlatch", "instance": "chat.0", "by": "ann@desk"}]


@pytest.mark.parametrize(("text", "less", "words"), [
    (None, None, ""),
    ('less_margin_c = "5.5"\n', 5.5, ""),
    ('less_margin_c = "hot"\n', None, "less_margin_c"),
])
def test_the_numbers_are_told_when_asked(host: Paths, text: str | None, less: float | None, words: str) -> None:
    if text:
        host.guard_policy.write_text(text)
    found = json.loads(Machine(host, "gpu-1").run(["opsctl-host", "guard", "--policy"]).stdout)
    assert found["policy"]["less_margin_c"] == (less or Policy().less_margin_c)
    assert words in found["policy_words"]
    assert "policy" not in json.loads(Machine(host, "gpu-1").run(["opsctl-host", "guard"]).stdout)


def test_state_has_the_guard_where_there_is_one(host: Paths) -> None:
    def inactive(argv: Sequence[str], timeout_s: float = 0) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 0, "LoadState=loaded\nActiveState=inactive\nSubState=dead\n", "")
    assert "guard" not in state(host, inactive)
    write(host.gpus, gpus())
    assert "guard" not in state(host, inactive)  # GPUs are seen, and no guard ever spoke
    write(host.guard, guard_kit.document(at_boot_s=boot_clock()))
    found = state(host, inactive)["guard"]
    assert (found["mode"], found["words"], found["instances"]) == ("auto", "", [guard_kit.instance()])
