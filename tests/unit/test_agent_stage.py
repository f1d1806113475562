"""Staging: from a real HTTP server onto a made-up host, with real signatures."""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from release_kit import ENGINE, Keys, Web, build_environment, lay_down, make_host, make_keys, published, serving

from opsctl.agent import environment
from opsctl.agent.manifest import Engine
from opsctl.agent.pace import Pace
from opsctl.agent.paths import Paths
from opsctl.agent.stage import MARGIN_BYTES, Plan, Room, is_staged, plan_stage, stage
from opsctl.errors import OpsctlError, RefusedError

MODEL = os.urandom(200_000)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def host(tmp_path: Path, keys: Keys) -> Paths:
    paths = make_host(tmp_path / "host", keys)
    build_environment(paths)
    return paths


@pytest.fixture
def gateway(tmp_path: Path) -> Path:
    return tmp_path / "gateway"


@pytest.fixture
def web() -> Iterator[Web]:
    with serving({}) as running:
        yield running


def publish(web: Web, directory: Path) -> str:
    web.content.update(published(directory))
    return directory.name


def refusal(host: Paths, web: Web, name: str, **more: Any) -> OpsctlError:
    with pytest.raises(OpsctlError) as error:
        stage(host, web.url, "chat", name, **more)
    assert not (host.releases("chat") / name).exists()
    return error.value


def test_a_release_is_brought_whole_and_closed(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    name = publish(web, lay_down(gateway, {"model.gguf": MODEL, "a/b.json": b"{}"}, keys.private))
    seen: list[tuple[int, int]] = []
    done = stage(host, web.url, "chat", name, report=lambda *now: seen.append(now))
    target = host.releases("chat") / name
    assert done["changed"]
    assert (target / "files" / "model.gguf").read_bytes() == MODEL
    assert seen[-1] == (len(MODEL) + 2, len(MODEL) + 2)
    assert oct(target.stat().st_mode & 0o777) == "0o555"
    assert oct((target / "files" / "model.gguf").stat().st_mode & 0o777) == "0o444"
    assert is_staged(host, "chat", name)


def test_the_second_time_there_is_nothing_to_do(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    name = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private))
    stage(host, web.url, "chat", name)
    web.asked.clear()
    assert not stage(host, web.url, "chat", name)["changed"]
    assert web.asked == []


def test_files_of_another_release_are_linked_and_not_fetched(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    first = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private, "v1"))
    stage(host, web.url, "chat", first)
    second = publish(web, lay_down(gateway, {"model.gguf": MODEL, "new.json": b"{}"}, keys.private, "v2", threads=2))
    web.asked.clear()
    done = stage(host, web.url, "chat", second, free_bytes=lambda _: 300_000_000)
    one, two = (host.releases("chat") / name / "files" / "model.gguf" for name in (first, second))
    assert one.stat().st_ino == two.stat().st_ino
    assert done["linked_files"] == 1
    assert not [path for path, _ in web.asked if path.endswith("model.gguf")]


@pytest.mark.parametrize("harm", [b"?" + MODEL[1:], b""])
def test_a_rotten_file_of_another_release_is_fetched_and_not_taken_over(
        host: Paths, web: Web, gateway: Path, keys: Keys, harm: bytes) -> None:
    first = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private, "v1"))
    stage(host, web.url, "chat", first)
    kept = host.releases("chat") / first / "files" / "model.gguf"
    kept.chmod(0o644)
    kept.write_bytes(harm)
    second = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private, "v2"))
    seen: list[tuple[int, int]] = []
    done = stage(host, web.url, "chat", second, report=lambda *now: seen.append(now))
    assert (done["linked_files"], done["fetched_bytes"]) == (0, len(MODEL))
    assert (host.releases("chat") / second / "files" / "model.gguf").read_bytes() == MODEL
    assert seen[-1] == (len(MODEL), len(MODEL))
    assert kept.read_bytes() == harm


def test_space_is_asked_again_when_a_rotten_file_must_be_fetched(host: Paths, web: Web, gateway: Path, keys: Keys
                                                                 ) -> None:
    first = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private, "v1"))
    stage(host, web.url, "chat", first)
    kept = host.releases("chat") / first / "files" / "model.gguf"
    kept.chmod(0o644)
    kept.write_bytes(b"?" + MODEL[1:])
    second = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private, "v2"))
    assert refusal(host, web, second, free_bytes=lambda _: 100_000).code == "host.disk_full"


DAMAGES: list[Callable[[Path], object]] = [
    lambda release: (release / "manifest.json").write_bytes(b"{}"),
    lambda release: (release / "manifest.json").write_bytes(b""),
    lambda release: (release / "manifest.json").unlink(),
    lambda release: (release / "manifest.json.sig").unlink(),
    lambda release: (release / "manifest.json.sig").write_bytes(b"\0" * 100),
]


def damaged(host: Paths, web: Web, gateway: Path, keys: Keys, damage: Callable[[Path], object]) -> str:
    name = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private))
    stage(host, web.url, "chat", name)
    release = host.releases("chat") / name
    release.chmod(0o755)
    for path in release.glob("manifest*"):
        path.chmod(0o644)
    damage(release)
    return name


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_release_with_a_damaged_manifest_is_brought_again(host: Paths, web: Web, gateway: Path, keys: Keys,
                                                            damage: Callable[[Path], object]) -> None:
    name = damaged(host, web, gateway, keys, damage)
    assert not is_staged(host, "chat", name)
    assert stage(host, web.url, "chat", name)["changed"]
    assert is_staged(host, "chat", name)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_of_a_release_that_serves_is_left_for_a_person(
        host: Paths, web: Web, gateway: Path, keys: Keys, damage: Callable[[Path], object]) -> None:
    name = damaged(host, web, gateway, keys, damage)
    (host.services / "chat" / "current.0").symlink_to(f"releases/{name}")
    with pytest.raises(RefusedError) as error:
        stage(host, web.url, "chat", name)
    assert error.value.code == "release.broken"
    assert "current.0 points at it" in error.value.message
    assert (host.releases("chat") / name / "files" / "model.gguf").read_bytes() == MODEL


def test_an_interrupted_stage_goes_on_with_what_it_has(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    name = publish(web, lay_down(gateway, {"a.json": b"{}", "model.gguf": MODEL}, keys.private))
    model = f"/releases/chat/{name}/files/model.gguf"
    kept = web.content.pop(model)
    with pytest.raises(OpsctlError):
        stage(host, web.url, "chat", name)
    partial = host.releases("chat") / ".staging" / name / "files" / "model.gguf.part"
    partial.write_bytes(MODEL[:150_000])
    (partial.parent / "left-over.link").write_bytes(b"rubbish")
    web.content[model] = kept
    web.asked.clear()
    assert stage(host, web.url, "chat", name)["fetched_bytes"] == 50_000
    assert [asked for asked in web.asked if "/files/" in asked[0]] == [(model, "bytes=150000-")]
    assert {path.name for path in (host.releases("chat") / name / "files").iterdir()} == {"a.json", "model.gguf"}


def test_corrupted_on_the_gateway_after_signing(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    name = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private))
    web.content[f"/releases/chat/{name}/files/model.gguf"] = MODEL[:-1] + b"!"
    error = refusal(host, web, name)
    assert (error.code, int(error.exit_code)) == ("fetch.corrupted", 5)


def test_unsigned_on_the_gateway(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    name = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private))
    del web.content[f"/releases/chat/{name}/manifest.json.sig"]
    assert refusal(host, web, name).code == "release.unsigned"
    assert not [path for path, _ in web.asked if "/files/" in path]


def test_a_foreign_signature(host: Paths, web: Web, gateway: Path, tmp_path: Path) -> None:
    name = publish(web, lay_down(gateway, {"model.gguf": MODEL}, make_keys(tmp_path / "other").private))
    assert refusal(host, web, name).code == "release.foreign_signature"


def test_another_release_under_the_asked_name(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    directory = lay_down(gateway, {"model.gguf": MODEL}, keys.private)
    web.content.update({path.replace(directory.name, "v1-000000000000"): content
                        for path, content in published(directory).items()})
    assert refusal(host, web, "v1-000000000000").code == "release.tampered"


def test_not_on_the_gateway(host: Paths, web: Web) -> None:
    assert refusal(host, web, "v9-000000000000").code == "release.not_on_gateway"


def test_it_does_not_fit(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    name = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private))
    error = refusal(host, web, name, free_bytes=lambda _: 100_000_000)
    assert (error.code, int(error.exit_code)) == ("host.disk_full", 5)
    assert not [path for path, _ in web.asked if "/files/" in path]


def test_a_release_that_lost_a_file_is_brought_again(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    name = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private))
    stage(host, web.url, "chat", name)
    folder = host.releases("chat") / name / "files"
    folder.chmod(0o755)
    (folder / "model.gguf").unlink()
    assert not is_staged(host, "chat", name)
    assert stage(host, web.url, "chat", name)["changed"]
    assert (folder / "model.gguf").read_bytes() == MODEL


def test_a_broken_release_that_serves_is_left_for_a_person(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    name = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private))
    stage(host, web.url, "chat", name)
    (host.services / "chat" / "current.0").symlink_to(f"releases/{name}")
    folder = host.releases("chat") / name / "files"
    folder.chmod(0o755)
    (folder / "model.gguf").unlink()
    with pytest.raises(RefusedError) as error:
        stage(host, web.url, "chat", name)
    assert error.value.code == "release.broken"


def wheel(folder: Path, code: str = "") -> tuple[Path, Engine]:
    """An engine's wheel that is quickly built, and the engine that pins it."""
    path = folder / "xllamacpp-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("xllamacpp/__init__.py"), code)
        info = "xllamacpp-1.0.dist-info"
        archive.writestr(zipfile.ZipInfo(f"{info}/METADATA"), "Metadata-Version: 2.1\nName: xllamacpp\nVersion: 1.0\n")
        archive.writestr(zipfile.ZipInfo(f"{info}/WHEEL"),
                         "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, Engine("llamacpp", "1.0", ">=3.10", f"xllamacpp==1.0 --hash=sha256:{digest}\n")


def test_the_engines_environment_comes_from_the_gateways_wheels_alone(host: Paths, web: Web, tmp_path: Path) -> None:
    path, engine = wheel(tmp_path)
    web.content["/wheels/"] = f'<a href="{path.name}">{path.name}</a>'.encode()
    web.content[f"/wheels/{path.name}"] = path.read_bytes()
    assert environment.build(host, engine, f"{web.url}/wheels/")
    folder = host.engines / engine.directory
    assert (folder / ".complete").exists()
    assert (folder / "lock.txt").read_text() == engine.lock
    assert not environment.build(host, engine, f"{web.url}/wheels/")
    assert {asked for asked, _ in web.asked} == {"/wheels/", f"/wheels/{path.name}"}


def test_a_wheel_with_another_hash_makes_no_environment(host: Paths, web: Web, tmp_path: Path) -> None:
    path, engine = wheel(tmp_path)
    web.content["/wheels/"] = f'<a href="{path.name}">{path.name}</a>'.encode()
    wheel(tmp_path, "print('evil')")
    web.content[f"/wheels/{path.name}"] = path.read_bytes()
    with pytest.raises(OpsctlError) as error:
        environment.build(host, engine, f"{web.url}/wheels/")
    assert error.value.code == "engine.not_built"
    assert any("hash" in line.lower() for line in error.value.log_tail)
    assert not environment.is_complete(host, engine)


@pytest.mark.parametrize(("wanted", "fits"), [
    (">=3.10", True), (">=3.13", False), ("3.11", True), ("3.1", False), ("3.12", False),
])
def test_which_python_fits(wanted: str, fits: bool) -> None:
    assert environment.python_fits(wanted, (3, 11)) is fits


LISTING = """<html><body><pre><a href="../">../</a>
<a href="xllamacpp-1.0-cp310-abi3-manylinux_x86_64.whl">xllamacpp-1.0-cp310-abi3-manyl..&gt;</a> 22-Nov 100
<a href="xllamacpp-1.0-cp313-cp313-manylinux_x86_64.whl">x</a> <a href="xllamacpp-2.0-py3-none-any.whl">x</a>
<a href="torch-2.9.0%2Bcu128-cp310-cp310-manylinux_x86_64.whl">x</a> <a href="typing_extensions-4.1-py3-none-any.whl">
</a> <a href="opsctl_agent-0.1-py3-none-any.whl">x</a> <a href="lock.txt">x</a></pre></body></html>"""


@pytest.mark.parametrize(("lock", "wheels"), [
    ("xllamacpp==1.0 --hash=sha256:00\n", [["xllamacpp-1.0-cp310-abi3-manylinux_x86_64.whl",
                                           "xllamacpp-1.0-cp313-cp313-manylinux_x86_64.whl"]]),
    ("torch==2.9.0+cu128 \\\n    --hash=a\nTyping.Extensions[x]==4.1 ; python_version < '3.11' \\\n    --hash=b",
     [["torch-2.9.0%2Bcu128-cp310-cp310-manylinux_x86_64.whl"], ["typing_extensions-4.1-py3-none-any.whl"]]),
    ("numpy==1.0\nxllamacpp==3.0\n", []),
])
def test_which_wheels_an_environment_may_take(lock: str, wheels: list[list[str]]) -> None:
    assert environment.wheels_of(lock, LISTING) == wheels


def with_wheel(web: Web, size: int) -> None:
    web.content["/wheels/"] = b'<a href="xllamacpp-1.0-py3-none-any.whl"></a><a href="xllamacpp-1.0-cp311-x.whl"></a>'
    web.content["/wheels/xllamacpp-1.0-py3-none-any.whl"] = b"x" * 10
    web.content["/wheels/xllamacpp-1.0-cp311-x.whl"] = b"x" * size


@pytest.fixture
def without_engine(tmp_path: Path, keys: Keys) -> Paths:
    return make_host(tmp_path / "bare", keys)


ENGINE_BYTES = environment.VENV_BYTES + environment.UNPACKED * 1_000_000


def test_space_counts_files_and_engine_beside_what_serves(without_engine: Paths, web: Web, gateway: Path, keys: Keys
                                                          ) -> None:
    """Nothing was fetched when one byte is missing, and the engine's wheels were only weighed."""
    name = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private))
    with_wheel(web, 1_000_000)
    enough = len(MODEL) + ENGINE_BYTES + MARGIN_BYTES
    error = refusal(without_engine, web, name, free_bytes=lambda _: enough - 1)
    assert (error.code, int(error.exit_code)) == ("host.disk_full", 5)
    assert "and its engine (about 70 MB) does not fit" in error.message
    assert not [path for path, _ in web.asked if "/files/" in path]
    assert not without_engine.engines.exists()
    plan = plan_stage(without_engine, web.url, "chat", name, free_bytes=lambda _: enough)
    assert (plan["fits"], plan["free_after_bytes"], plan["engine_bytes"]) == (True, MARGIN_BYTES, ENGINE_BYTES)
    assert not plan_stage(without_engine, web.url, "chat", name, free_bytes=lambda _: enough - 1)["fits"]


def test_a_release_that_is_here_without_its_engine_needs_space_too(without_engine: Paths, web: Web, gateway: Path,
                                                                   keys: Keys) -> None:
    name = lay_down(without_engine.releases("chat"), {"model.gguf": MODEL}, keys.private).name
    with_wheel(web, 1_000_000)
    with pytest.raises(RefusedError) as error:
        stage(without_engine, web.url, "chat", name, free_bytes=lambda _: ENGINE_BYTES)
    assert error.value.code == "host.disk_full"
    plan = plan_stage(without_engine, web.url, "chat", name, free_bytes=lambda _: ENGINE_BYTES)
    assert (plan["staged"], plan["engine_built"], plan["fetch_bytes"], plan["fits"]) == (False, False, 0, False)


@pytest.mark.parametrize(("of_engines", "fits"), [(ENGINE_BYTES + MARGIN_BYTES, True), (ENGINE_BYTES, False)])
def test_two_file_systems_are_counted_each_for_itself(tmp_path: Path, of_engines: int, fits: bool) -> None:
    room = Room(tmp_path / "srv", tmp_path / "opt", ENGINE_BYTES, False,
                lambda path: of_engines if path.name == "opt" else 1000 + MARGIN_BYTES)
    plan = Plan((), (), (), 1000)
    assert room.fits(plan) is fits
    assert room.after(plan) == MARGIN_BYTES
    assert not room.fits(Plan((), (), (), 1001))


def test_a_gateway_that_lists_no_wheels(without_engine: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    name = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private))
    error = refusal(without_engine, web, name)
    assert error.code == "fetch.failed"
    assert "/wheels/ could not be asked for the wheels of llamacpp 1.0: HTTP 404" in error.message


def contents(root: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in root.rglob("*"))


def test_a_plan_tells_what_is_to_be_done_and_writes_nothing(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    first = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private, "v1"))
    stage(host, web.url, "chat", first)
    second = publish(web, lay_down(gateway, {"model.gguf": MODEL, "new": b"x" * 500}, keys.private, "v2", threads=2))
    half = host.releases("chat") / ".staging" / second / "files" / "new.part"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"x" * 100)
    before = contents(host.root)
    assert plan_stage(host, web.url, "chat", second, free_bytes=lambda _: 10**9) == {
        "staged": False, "fetch_bytes": 400, "link_files": 1, "engine_built": True, "engine_bytes": 0,
        "free_bytes": 10**9, "free_after_bytes": 10**9 - 400, "fits": True}
    web.asked.clear()
    staged = plan_stage(host, web.url, "chat", first)
    assert (staged["staged"], staged["fetch_bytes"], staged["fits"]) == (True, 0, True)
    assert staged["free_bytes"] == staged["free_after_bytes"]
    assert web.asked == []
    assert contents(host.root) == before


def test_a_plan_for_a_release_that_is_broken(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    """It is brought whole again: its own files, which will be thrown away, are no source of links."""
    name = publish(web, lay_down(gateway, {"a": b"1" * 100, "model.gguf": MODEL}, keys.private))
    stage(host, web.url, "chat", name)
    folder = host.releases("chat") / name / "files"
    folder.chmod(0o755)
    (folder / "a").unlink()
    plan = plan_stage(host, web.url, "chat", name)
    assert (plan["staged"], plan["fetch_bytes"], plan["link_files"]) == (False, len(MODEL) + 100, 0)
    (host.services / "chat" / "current.0").symlink_to(f"releases/{name}")
    with pytest.raises(RefusedError) as error:
        plan_stage(host, web.url, "chat", name)
    assert error.value.code == "release.broken"


@pytest.mark.parametrize("missing", ["manifest.json", "manifest.json.sig"])
def test_a_plan_for_what_the_gateway_cannot_give(host: Paths, web: Web, gateway: Path, keys: Keys, missing: str
                                                 ) -> None:
    name = publish(web, lay_down(gateway, {"model.gguf": MODEL}, keys.private))
    del web.content[f"/releases/chat/{name}/{missing}"]
    with pytest.raises(RefusedError):
        plan_stage(host, web.url, "chat", name)


def test_the_rate_limit_is_kept_and_progress_stays_exact(host: Paths, web: Web, gateway: Path, keys: Keys) -> None:
    name = publish(web, lay_down(gateway, {"a": MODEL[:50_000], "model.gguf": MODEL}, keys.private))
    now = [0.0]

    def pause(seconds: float) -> None:
        now[0] += seconds

    seen: list[tuple[int, int]] = []
    stage(host, web.url, "chat", name, report=lambda *one: seen.append(one),
          pace=Pace(lambda: 50_000, lambda: now[0], pause))
    assert now[0] == pytest.approx(5.0, abs=0.3)
    assert seen[-1] == (250_000, 250_000)


def test_a_python_that_does_not_fit_is_refused_before_anything_is_built(host: Paths) -> None:
    engine = Engine("llamacpp", "2.0", f"3.{sys.version_info[1] + 1}", ENGINE.lock)
    with pytest.raises(RefusedError) as error:
        environment.build(host, engine, "http://127.0.0.1:9/wheels/")
    assert error.value.code == "engine.python"
    assert not (host.engines / engine.directory).exists()
