"""The hosts' own wheel, and the wheels that the engines' locks name."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from opsctl.bundle import agent_wheel
from opsctl.bundle.agent_wheel import agent_files, agent_version, build_agent_wheel, requirement_line
from opsctl.bundle.engine_wheels import fetch_engine_wheels, pip_download_arguments, read_lock
from opsctl.engines.events import discard
from opsctl.errors import ConfigurationError, OpsctlError, RefusedError
from opsctl.resources import PACKAGE


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


def test_the_wheel_holds_what_hosts_run_and_needs_nothing(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(archive.read(name).decode() for name in names if name.endswith("/METADATA"))
        entry_points = next(archive.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    packages = {name.split("/")[1] for name in names if name.startswith("opsctl/") and name.count("/") > 1}
    assert packages == {"agent", "serving"}
    assert "opsctl/agent/pyproject.toml" not in names
    assert "Requires-Dist" not in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert {line.split(" ")[0] for line in entry_points.splitlines() if "=" in line} \
        == {"opsctl-host", "opsctl-launch", "opsctl-agent"}


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


def test_a_failing_build_shows_hatchlings_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_wheel, "agent_files", lambda: {"pyproject.toml": b"[project]\nname = 1\n"})
    with pytest.raises(OpsctlError) as caught:
        build_agent_wheel(tmp_path)
    assert caught.value.code == "bundle.agent_not_built"
    assert caught.value.log_tail


def test_a_lock_is_read(tmp_path: Path) -> None:
    lock = tmp_path / "engine.lock"
    lock.write_text(f"# made by a tool\n--no-binary :none:\nfoo-bar==1.0.post1 \\\n    --hash=sha256:{'a' * 64} \\\n"
                    f"    --hash=sha256:{'b' * 64}\n    # via x\n"
                    f"baz[cpu]==2 ; python_version > '3' --hash=sha256:{'c' * 64}\n", encoding="utf-8")
    read = read_lock(lock)
    assert read.requirements == ("foo-bar==1.0.post1", "baz==2")
    assert read.digests == {"a" * 64, "b" * 64, "c" * 64}


@pytest.mark.parametrize("line", ["foo==1.0", f"foo>=1 --hash=sha256:{'a' * 64}", "foo==1 --hash=md5:00",
                                  f"./foo.whl --hash=sha256:{'a' * 64}"])
def test_a_lock_without_versions_and_hashes_is_refused(tmp_path: Path, line: str) -> None:
    lock = tmp_path / "engine.lock"
    lock.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        read_lock(lock)
    assert caught.value.code == "bundle.lock_without_hash"


def test_the_engines_own_locks_are_hashed() -> None:
    locks = sorted((PACKAGE / "serving").glob("*.lock"))
    assert locks
    assert all(read_lock(lock).requirements for lock in locks)


def test_pip_is_asked_for_the_hosts_python(tmp_path: Path) -> None:
    arguments = pip_download_arguments(tmp_path / "a.lock", tmp_path)
    assert {"--require-hashes", "--only-binary=:all:", "--no-deps"} <= set(arguments)
    platforms = [arguments[index + 1] for index, word in enumerate(arguments) if word == "--platform"]
    assert "manylinux_2_36_x86_64" in platforms
    assert "manylinux_2_37_x86_64" not in platforms  # Debian 12 has glibc 2.36


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


def write_lock(directory: Path, wheel: Path, digest: str = "") -> Path:
    lock = directory / "engine.lock"
    line = requirement_line(wheel)
    lock.write_text(line.replace(line[-65:-1], digest) if digest else line, encoding="utf-8")
    return lock


def test_wheels_come_through_pip_once_and_from_the_cache_then(index_on_disk: Path, wheel: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        assert fetch_engine_wheels([write_lock(tmp_path, wheel)], out, discard) == (wheel.name,)
        assert (out / wheel.name).read_bytes() == wheel.read_bytes()
        for path in index_on_disk.iterdir():
            path.unlink()


def test_a_cached_wheel_that_went_bad_is_fetched_again(index_on_disk: Path, wheel: Path, tmp_path: Path) -> None:
    lock = write_lock(tmp_path, wheel)
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
        fetch_engine_wheels([write_lock(tmp_path, wheel, "0" * 64)], tmp_path, discard)
    assert caught.value.code == "bundle.wheel_tampered"


def test_a_wheel_that_nobody_has_is_named(index_on_disk: Path, wheel: Path, tmp_path: Path) -> None:
    (index_on_disk / wheel.name).unlink()
    with pytest.raises(OpsctlError) as caught:
        fetch_engine_wheels([write_lock(tmp_path, wheel)], tmp_path, discard)
    assert caught.value.code == "bundle.wheels_unavailable"
    assert "opsctl-agent" in "\n".join(caught.value.log_tail)
