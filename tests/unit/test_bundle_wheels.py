"""The hosts' own wheel, and the wheels that the engines' locks name."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from release_kit import ENGINE, lay_down, make_keys

from opsctl.agent.manifest import Engine
from opsctl.bundle import agent_wheel
from opsctl.bundle.agent_wheel import (
    agent_files,
    agent_lock,
    agent_version,
    build_agent_wheel,
    requirement_line,
    requirements,
)
from opsctl.bundle.build import locks_for
from opsctl.bundle.engine_wheels import (
    Target,
    WantedLock,
    fetch_engine_wheels,
    pip_download_arguments,
    release_locks,
    shipped_locks,
    targets_of,
    wanted_lock,
)
from opsctl.engines.events import discard
from opsctl.errors import ConfigurationError, OpsctlError, RefusedError
from opsctl.resources import PACKAGE
from opsctl.stack.knowledge import knowledge


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_agent_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_same_content_gives_the_same_file(wheel: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        again = build_agent_wheel(tmp_path)
    finally:
        os.umask(before)
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


def test_another_content_gives_another_version(tmp_path: Path) -> None:
    package = shutil.copytree(PACKAGE, tmp_path / "opsctl", ignore=shutil.ignore_patterns("data", "__pycache__"))
    before = agent_version(agent_files(package))
    (package / "agent/__pycache__").mkdir(exist_ok=True)
    (package / "agent/__pycache__/host.cpython-311.pyc").write_bytes(b"compiled")
    assert agent_version(agent_files(package)) == before == agent_version(agent_files())
    (package / "agent/another.py").write_text("", encoding="utf-8")
    assert agent_version(agent_files(package)) != before


def test_the_wheel_holds_what_hosts_run(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(archive.read(name).decode() for name in names if name.endswith("/METADATA"))
        entry_points = next(archive.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    packages = {name.split("/")[1] for name in names if name.startswith("opsctl/") and name.count("/") > 1}
    assert packages == {"agent", "serving"}
    data = {path.name for path in (PACKAGE / "serving").iterdir() if path.suffix in (".csv", ".json", ".lock")}
    assert {f"opsctl/serving/{name}" for name in data} <= set(names)
    assert "vllm_versions.csv" in data
    assert "opsctl/agent/pyproject.toml" not in names
    needs = {line.split()[1].split(">")[0] for line in metadata.splitlines() if line.startswith("Requires-Dist")}
    assert needs == {one.name for one in agent_lock().requirements} == {"nvidia-ml-py"}
    assert "opsctl/agent/agent.lock" in names
    assert "Requires-Python: >=3.10" in metadata
    assert {line.split(" ")[0] for line in entry_points.splitlines() if "=" in line} \
        == {"opsctl-host", "opsctl-launch", "opsctl-agent", "opsctl-setter"}


def test_what_hosts_run_imports_nothing_but_itself_and_the_standard_library() -> None:
    shipped = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in agent_files()
               if path.endswith(".py")}
    for path, content in agent_files().items():
        if not path.endswith(".py"):
            continue
        for line in content.decode().splitlines():
            words = line.split()
            if len(words) > 1 and words[0] in ("from", "import") and not line[0].isspace():
                module = words[1].rstrip(",")
                own = module.startswith("opsctl")
                assert module in shipped if own else module.split(".")[0] in sys.stdlib_module_names, f"{path}: {line}"


def test_the_requirement_is_hashed(wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert requirement_line(wheel) == f"opsctl-agent=={version} --hash=sha256:{digest}\n"


def test_all_that_hosts_install_is_pinned_and_hashed(wheel: Path) -> None:
    found = wanted_lock("opsctl-agent.txt", requirements(wheel)).requirements
    assert [one.name for one in found] == ["opsctl-agent", "nvidia-ml-py"]
    assert all(one.version and one.digests for one in found)


def test_a_failing_build_shows_hatchlings_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_wheel, "agent_files", lambda: {"pyproject.toml": b"[project]\nname = 1\n"})
    with pytest.raises(OpsctlError) as caught:
        build_agent_wheel(tmp_path)
    assert caught.value.code == "bundle.agent_not_built"
    assert caught.value.log_tail


HASHES = {letter: letter * 64 for letter in "abc"}


@pytest.mark.parametrize(("python", "wanted"), [("3.11", ("foo-bar", "old")), ("3.13", ("foo-bar", "new"))])
def test_what_counts_on_a_host_is_decided_by_the_hosts_python(python: str, wanted: tuple[str, ...]) -> None:
    lock = wanted_lock("engine.lock", f"foo_bar==1.0.post1 --hash=sha256:{HASHES['a']}\n"
                       f"old==2 ; python_version < '3.12' --hash=sha256:{HASHES['b']}\n"
                       f"new==2 ; python_full_version >= '3.12' --hash=sha256:{HASHES['b']}\n"
                       f"windows==2 ; sys_platform == 'win32' --hash=sha256:{HASHES['c']}\n",
                       Target(python, (2, 36)))
    assert tuple(one.name for one in lock.requirements) == wanted
    assert lock.digests == {HASHES["a"], HASHES["b"]}
    assert ";" not in lock.text  # pip judges markers by its own Python, not by --python-version


def test_a_marker_that_nobody_understands_is_refused() -> None:
    with pytest.raises(ConfigurationError) as caught:
        wanted_lock("engine.lock", f"foo==1 ; moon == 'full' --hash=sha256:{HASHES['a']}\n")
    assert caught.value.code == "engine.lock_marker"


def test_the_engines_own_locks_are_hashed() -> None:
    locks = shipped_locks(PACKAGE / "serving")
    assert locks
    assert all(lock.requirements for lock in locks)


def test_the_locks_of_releases_are_wanted_each_once(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys")
    folder = tmp_path / "bundle" / "releases" / "chat"
    text = f"vllm==0.33.0 --hash=sha256:{HASHES['a']}\n"
    pinned = Engine("vllm", "0.33.0", "3.13", text)
    for version, engine in (("v1", ENGINE), ("v2", pinned), ("v3", pinned)):
        lay_down(folder, {"model.gguf": b"x"}, keys.private, version, engine)
    on_its_way = folder / ".incoming-1"
    on_its_way.mkdir()
    (on_its_way / "manifest.json").write_text("{")
    (next(folder.glob("v3-*")) / "manifest.json.sig").unlink()  # verify's affair
    found = release_locks(tmp_path / "bundle")
    assert [(lock.name, lock.target.python) for lock in found] == [
        (ENGINE.directory, "3.11"), (pinned.directory, "3.13")]
    assert release_locks(tmp_path / "nothing") == []


def test_pip_is_asked_for_the_hosts_python(tmp_path: Path) -> None:
    arguments = pip_download_arguments(tmp_path / "a.lock", tmp_path)
    assert {"--require-hashes", "--only-binary=:all:", "--no-deps"} <= set(arguments)
    platforms = [arguments[index + 1] for index, word in enumerate(arguments) if word == "--platform"]
    assert "manylinux_2_36_x86_64" in platforms
    assert "manylinux_2_37_x86_64" not in platforms  # Debian 12 has glibc 2.36
    assert "manylinux1_x86_64" in platforms  # vLLM to 0.11.2


def test_pip_is_asked_for_the_python_of_the_lock(tmp_path: Path) -> None:
    words = " ".join(pip_download_arguments(tmp_path / "a.lock", tmp_path, Target("3.13", (2, 41))))
    assert "--python-version 3.13 " in words
    assert "--abi cp313 " in words
    assert "manylinux_2_41_x86_64" in words


@pytest.fixture
def index_on_disk(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose pip knows one folder and no index; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    shutil.copy(wheel, folder)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def lock_of(wheel: Path, digest: str = "") -> WantedLock:
    line = requirement_line(wheel)
    return wanted_lock("engine.lock", line.replace(line[-65:-1], digest) if digest else line)


def test_wheels_come_through_pip_once_and_from_the_cache_then(index_on_disk: Path, wheel: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        assert fetch_engine_wheels([lock_of(wheel)], out, discard) == (wheel.name,)
        assert (out / wheel.name).read_bytes() == wheel.read_bytes()
        for path in index_on_disk.iterdir():
            path.unlink()


def test_a_cached_wheel_that_went_bad_is_fetched_again(index_on_disk: Path, wheel: Path, tmp_path: Path) -> None:
    lock = lock_of(wheel)
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        fetch_engine_wheels([lock], out, discard)
        assert (out / wheel.name).read_bytes() == wheel.read_bytes()
        cached = next((tmp_path / "cache").rglob("*.whl"))
        cached.unlink()
        cached.write_bytes(b"bad")


def test_a_wheel_that_is_not_what_was_locked_is_refused(index_on_disk: Path, wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        fetch_engine_wheels([lock_of(wheel, "0" * 64)], tmp_path, discard)
    assert caught.value.code == "bundle.wheel_tampered"


def test_a_wheel_that_nobody_has_is_named(index_on_disk: Path, wheel: Path, tmp_path: Path) -> None:
    (index_on_disk / wheel.name).unlink()
    with pytest.raises(OpsctlError) as caught:
        fetch_engine_wheels([lock_of(wheel)], tmp_path, discard)
    assert caught.value.code == "bundle.wheels_unavailable"
    assert "opsctl-agent" in "\n".join(caught.value.log_tail)


BOTH = (Target("3.11", (2, 36)), Target("3.13", (2, 41)))


def tiny_wheel(folder: Path, tag: str) -> Path:
    """A wheel that pip takes for what its name says."""
    path = folder / f"tiny-1.0-{tag}.whl"
    about = {"METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
             "WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}\n", "RECORD": ""}
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in about.items():
            archive.writestr(f"tiny-1.0.dist-info/{name}", text)
    return path


@pytest.mark.parametrize(("tags", "taken"), [
    (["cp311-cp311-manylinux_2_28_x86_64", "cp313-cp313-manylinux_2_28_x86_64", "cp312-cp312-manylinux_2_28_x86_64"],
     ["cp311-cp311-manylinux_2_28_x86_64", "cp313-cp313-manylinux_2_28_x86_64"]),
    (["cp310-abi3-manylinux2014_x86_64"], ["cp310-abi3-manylinux2014_x86_64"]),
    (["cp310-abi3-manylinux_2_17_x86_64", "cp310-abi3-manylinux_2_39_x86_64"],  # the second only where glibc has it
     ["cp310-abi3-manylinux_2_17_x86_64", "cp310-abi3-manylinux_2_39_x86_64"])])
def test_hosts_of_two_pythons_get_wheels_for_each(index_on_disk: Path, tmp_path: Path, tags: list[str],
                                                  taken: list[str]) -> None:
    made = [tiny_wheel(index_on_disk, tag) for tag in tags]
    lock = "tiny==1.0" + "".join(f" --hash=sha256:{hashlib.sha256(one.read_bytes()).hexdigest()}" for one in made)
    out = tmp_path / "out"
    out.mkdir()
    found = fetch_engine_wheels([wanted_lock("engine.lock", lock, target) for target in BOTH], out, discard)
    assert found == tuple(f"tiny-1.0-{tag}.whl" for tag in taken) == tuple(sorted(path.name for path in out.iterdir()))


def test_a_python_that_a_lock_has_no_wheel_for_is_named(index_on_disk: Path, tmp_path: Path) -> None:
    made = tiny_wheel(index_on_disk, "cp311-cp311-manylinux_2_28_x86_64")
    lock = f"tiny==1.0 --hash=sha256:{hashlib.sha256(made.read_bytes()).hexdigest()}"
    with pytest.raises(OpsctlError) as caught:
        fetch_engine_wheels([wanted_lock("engine.lock", lock, BOTH[1])], tmp_path, discard)
    assert "engine.lock for Python 3.13" in caught.value.message


def test_targets_are_the_releases_pythons() -> None:
    systems = [system for system in knowledge().systems if system.id == "debian"]
    assert targets_of(systems) == BOTH
    older = replace(systems[1], glibc="2.40")
    assert targets_of([systems[1], older]) == (Target("3.13", (2, 40)),)


def test_what_ships_is_wanted_for_each_python_of_the_hosts(tmp_path: Path) -> None:
    found = locks_for(tmp_path, [system for system in knowledge().systems if system.id == "debian"])
    names = {"agent.lock", *(path.name for path in (PACKAGE / "serving").glob("*.lock"))}
    assert len(names) > 1
    assert {(lock.name, lock.target) for lock in found} == {(name, target) for name in names for target in BOTH}


def test_a_release_for_any_python_is_wanted_for_each_and_one_for_one_alone(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys")
    folder = tmp_path / "bundle" / "releases" / "chat"
    text = f"vllm==0.33.0 --hash=sha256:{HASHES['a']}\n"
    engines = {f"v{place}": Engine("vllm", f"0.33.{place}", python, text)
               for place, python in enumerate((">=3.10", ">=3.12", "3.13", "3.12"))}
    for version, engine in engines.items():
        lay_down(folder, {"model.gguf": b"x"}, keys.private, version, engine)
    found = {(lock.name, lock.target) for lock in release_locks(tmp_path / "bundle", BOTH)}
    assert found == {(engines["v0"].directory, BOTH[0]), (engines["v0"].directory, BOTH[1]),
                     (engines["v1"].directory, BOTH[1]), (engines["v2"].directory, BOTH[1]),
                     (engines["v3"].directory, Target("3.12", (2, 36)))}
