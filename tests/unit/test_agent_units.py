"""Jobs, launching and the host's state, against a systemd that is played."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from release_kit import ENGINE, Keys, Web, build_environment, lay_down, make_host, make_keys, serving
from systemd_kit import Systemd

from opsctl.agent import cutover, job, launch, stage, systemd
from opsctl.agent import host as host_program
from opsctl.agent.paths import Paths
from opsctl.agent.state import state
from opsctl.errors import LockedError

UNIT = "inference@chat.0.service"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def engine() -> Iterator[Web]:
    """An engine that answers as chat's release does, once ``content`` says so."""
    with serving({}) as web:
        yield web


@pytest.fixture
def host(tmp_path: Path, keys: Keys, engine: Web) -> Paths:
    paths = make_host(tmp_path / "host", keys, port=int(engine.url.rpartition(":")[2]))
    build_environment(paths)
    return paths


@pytest.fixture
def release(host: Paths, keys: Keys) -> str:
    return lay_down(host.releases("chat"), {"model.gguf": b"weights"}, keys.private, start_timeout_s=5).name


def serve(engine: Web, *names: str) -> None:
    engine.content.update({
        "/health": b"{}",
        "/v1/models": json.dumps({"data": [{"id": names[0], "aliases": list(names)}]}).encode(),
        "/metrics": b"llamacpp:requests_processing 3\nllamacpp:requests_deferred 1\n"})


def current(host: Paths) -> Path:
    return host.services / "chat" / "current.0"


# opsctl-launch


def test_release_and_placement_become_one_command(host: Paths, release: str) -> None:
    current(host).symlink_to(f"releases/{release}")
    argv = launch.prepare(host, "chat.0").argv
    assert argv[0] == str(host.engines / ENGINE.directory / "bin/python")
    assert argv[argv.index("--model") + 1] == str(host.releases("chat") / release / "files" / "model.gguf")
    assert [argv[at + 1] for at, word in enumerate(argv) if word == "--name"] == ["chat", f"chat@{release}"]


@pytest.mark.parametrize(("harm", "code", "exit_code"), [
    (lambda host, release: current(host).unlink(), "instance.no_release", 97),
    (lambda host, release: (host.releases("chat") / release / "manifest.json.sig").unlink(), "release.unsigned", 97),
    (lambda host, release: host.allowed_signers.unlink(), "trust.missing", 96),
    (lambda host, release: (host.placements / "chat.0.toml").write_text("instance = 'chat.1'\n"), "host.bad_file", 96),
    (lambda host, release: (host.placements / "chat.0.toml").unlink(), "instance.unknown", 96),
    (lambda host, release: (host.engines / ENGINE.directory / ".complete").unlink(), "engine.not_built", 97),
])
def test_what_may_not_run_does_not(host: Paths, release: str, harm: Callable[[Paths, str], None], code: str,
                                   exit_code: int, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    current(host).symlink_to(f"releases/{release}")
    harm(host, release)
    monkeypatch.setattr(launch, "Paths", lambda: host)
    assert launch.main(["chat.0"]) == exit_code
    assert f"[{code}]" in capsys.readouterr().err


def test_a_disk_that_cannot_be_read_is_tried_again(host: Paths, release: str, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launch, "read_placement", failing(OSError(errno.EIO, "Input/output error")))
    assert launch.main(["chat.0"]) == 1
    assert "Input/output error" in capsys.readouterr().err


# opsctl-host state


def test_the_state_of_a_serving_host(host: Paths, engine: Web, release: str) -> None:
    serve(engine, "chat")
    current(host).symlink_to(f"releases/{release}")
    found = state(host, Systemd({UNIT: "active"}))
    assert found["schema"] == "opsctl.host-state/v1"
    (instance,) = found["instances"]
    assert {key: instance[key] for key in ("instance", "unit", "release", "health", "running", "waiting")} == {
        "instance": "chat.0", "unit": "active", "release": "v1", "health": "healthy", "running": 3, "waiting": 1}
    (stored,) = found["releases"]
    assert stored["complete"]
    assert stored["digest"] == instance["digest"]
    assert stored["bytes"] == len(b"weights")


def test_the_state_of_a_host_that_has_never_served(host: Paths) -> None:
    (instance,) = state(host, Systemd())["instances"]
    assert (instance["release"], instance["health"], instance["running"]) == ("", "unknown", None)


def test_an_engine_that_hangs_is_unhealthy(host: Paths, engine: Web, release: str) -> None:
    current(host).symlink_to(f"releases/{release}")
    (instance,) = state(host, Systemd({UNIT: "active"}))["instances"]
    assert (instance["health"], instance["running"]) == ("unhealthy", None)


# Jobs


def test_a_job_runs_as_a_unit_and_is_found_again(host: Paths) -> None:
    units = Systemd()
    assert job.start(host, "opsctl-stage-chat-v1", ["work-stage"], units)
    (order,) = [argv for argv in units.orders if argv[0] == "systemd-run"]
    assert "--unit=opsctl-stage-chat-v1.service" in order
    assert order[-1] == "work-stage"
    assert not job.start(host, "opsctl-stage-chat-v1", ["work-stage"], units)
    reporter = job.Reporter(host, "opsctl-stage-chat-v1")
    reporter.doing("fetch")
    reporter.progress(5, 10)
    assert job.look(host, "opsctl-stage-chat-v1", units)["done"] == 5
    reporter.finished({"changed": True})
    units.units.clear()
    assert job.look(host, "opsctl-stage-chat-v1", units)["result"] == {"changed": True}


def cutover_verb(release: str) -> list[str]:
    return ["work-cutover", "chat.0", "--release", release, "--from", "none", "--min-speed-percent", "50"]


V1, V2 = "v1-000000000000", "v2-000000000000"


def test_a_job_that_runs_for_another_release_is_named_and_not_joined(host: Paths) -> None:
    units = Systemd()
    job.start(host, "j", cutover_verb(V1), units)
    with pytest.raises(LockedError) as error:
        job.start(host, "j", cutover_verb(V2), units)
    assert V1 in error.value.message
    assert int(error.value.exit_code) == 4


@pytest.mark.parametrize("ended", [False, True])
def test_nobody_gets_the_result_of_another_release(host: Paths, ended: bool) -> None:
    units = Systemd()
    job.start(host, "j", cutover_verb(V1), units)
    reporter = job.Reporter(host, "j", cutover_verb(V1))
    if ended:
        reporter.finished({"changed": True})
        units.units.clear()
    with pytest.raises(LockedError, match=V1):
        job.wait(host, "j", cutover_verb(V2), 0.0, lambda _: None, units)
    assert job.wait(host, "j", cutover_verb(V1), 0.0, lambda _: None, units)["state"] == (
        "done" if ended else "running")


@pytest.mark.parametrize(("one", "other"), [
    (("chat", "x-v1-000000000000"), ("chat-x", "v1-000000000000")),
    (("chat", "v1-000000000000"), ("chat", "v1-000000000001")),
])
def test_no_two_releases_share_a_stage(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert stage.job_name(*one) != stage.job_name(*other)


def test_a_first_start_beside_another_one_ends_with_locked(host: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    units = Systemd()
    monkeypatch.setattr(host_program, "Paths", lambda: host)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    for name in ("start", "look"):
        monkeypatch.setattr(job, name, partial(getattr(job, name), run=units))
    monkeypatch.setattr(job, "wait", lambda *given: {"state": "running", "given": given[2]})
    assert said(["first-start", "chat.0", "--release", V1, "--wait-s", "0"])[0] == 0
    code, document = said(["first-start", "chat.0", "--release", V2, "--wait-s", "0"])
    assert (code, document["error"]["code"]) == (4, "job.other")
    assert said(["first-start-status", "chat.0"])[1]["given"] is None
    assert said(["first-start-status", "chat.0", "--release", V2])[1]["given"] == cutover_verb(V2)[:4]


def test_a_job_that_died_is_told_with_its_log(host: Paths) -> None:
    units = Systemd(log=["Killed"])
    job.Reporter(host, "j")
    status = job.look(host, "j", units)
    assert status["state"] == "failed"
    assert status["error"]["log_tail"] == ["Killed"]


def test_a_job_that_never_was(host: Paths) -> None:
    assert job.look(host, "j", Systemd())["state"] == "none"


def test_watching_ends_when_time_is_over_and_the_job_goes_on(host: Paths) -> None:
    units = Systemd({"j.service": "active"})
    clock = iter(range(100))
    status = job.wait(host, "j", None, 3.0, lambda _: None, units, clock=lambda: float(next(clock)),
                      pause=lambda _: None)
    assert status["state"] == "running"


def test_units_are_read_in_the_order_asked() -> None:
    text = ("Id=a\nActiveState=active\nNRestarts=2\n\n"
            "Id=b\nActiveState=failed\nActiveEnterTimestamp=Sun 2026-11-22 01:22:56 UTC\n")
    found = systemd.parse_show(text, ["a.service", "b.service"])
    assert (found["a.service"].active, found["a.service"].restarts) == ("active", 2)
    assert (found["b.service"].active, found["b.service"].since) == ("failed", "2026-11-22T01:22:56Z")
    assert systemd.parse_show("", ["a.service"])["a.service"].active == ""  # no answer is not "inactive"


# The command line of opsctl-host


def said(argv: list[str]) -> tuple[int, dict[str, Any]]:
    out = io.StringIO()
    with redirect_stdout(out):
        code = host_program.main(argv)
    return code, json.loads(out.getvalue())


def test_an_error_is_one_document(host: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    host.settings.unlink()
    monkeypatch.setattr(host_program, "Paths", lambda: host)
    code, document = said(["state", "--json"])
    assert code == 3
    assert document["error"]["code"] == "host.not_provisioned"
    assert document["exit_code"] == 3


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error
    return fail


@pytest.mark.parametrize(("error", "code"), [
    (OSError(errno.ENOSPC, "No space left on device", "/srv/x.part"), "host.disk_full"),
    (OSError(errno.EIO, "Input/output error"), "host.system"),
    (PermissionError(errno.EACCES, "Permission denied", "/srv/x"), "host.system"),
    (ValueError("what"), "unexpected"),
])
def test_whatever_happens_is_one_document(host: Paths, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
                                          ) -> None:
    monkeypatch.setattr(host_program, "state", failing(error))
    returned, document = said(["state", "--json"])
    assert (returned, document["exit_code"], document["error"]["code"]) == (1, 1, code)
    assert str(getattr(error, "filename", None) or "") in document["error"]["message"]


def test_a_worker_on_a_full_disk_leaves_a_status(host: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_program, "Paths", lambda: host)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(cutover, "cutover", failing(OSError(errno.ENOSPC, "full")))
    assert said(["work-cutover", "chat.0", "--release", V1, "--from", "none"])[0] == 1
    status = job.look(host, "opsctl-cutover@chat.0", Systemd())
    assert (status["state"], status["error"]["code"]) == ("failed", "host.disk_full")


@pytest.mark.parametrize("argv", [["stage", "--service", "../x", "--release", "v1-000000000000"],
                                  ["stage", "--service", "chat", "--release", "v1"], ["nonsense"]])
def test_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        host_program.main(argv)
    assert stopped.value.code == 2


def test_acts_want_root(host: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    code, document = said(["ledger-append", "--service", "chat", "--version", "v1", "--digest", "a", "--after", "0"])
    assert (code, document["error"]["code"]) == (5, "host.needs_root")
