"""gc: never what serves, is kept, or is worked on; whoever works meanwhile is told by his lock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from release_kit import Keys, build_environment, lay_down, make_host, make_keys

from opsctl.agent import unfinished
from opsctl.agent.durable import locked, make_read_only
from opsctl.agent.gc import UNKNOWN, Decision, Found, collect, decide, freed_bytes
from opsctl.agent.manifest import Engine
from opsctl.agent.paths import Paths
from opsctl.agent.unfinished import Record
from opsctl.errors import LockedError

NONE: frozenset[str] = frozenset()


def names(*several: str) -> frozenset[str]:
    return frozenset(several)


@pytest.mark.parametrize(("found", "serving", "keep", "working", "goes"), [
    (Found({}, {}), NONE, NONE, NONE, Decision((), (), ())),
    # what serves stays, and so does what it needs
    (Found({"v1": "e1", "v2": "e2", "v3": "e2"}, {}, names("e1", "e2", "e3")), names("v2"), NONE, NONE,
     Decision(("v1", "v3"), (), ("e1", "e3"))),
    (Found({"v1": "e1", "v2": "e2", "v3": "e2"}, {}, names("e1", "e2")), names("v2"), names("v1"), NONE,
     Decision(("v3",), (), ())),
    # kept or worked on is not here, or half here
    (Found({"v1": "e1"}, {"v2": "e2", "v3": "e3", "v4": "e4"}, names("e1", "e2", "e3", "e4")), names("v1"),
     names("v9", "v3"), names("v4"), Decision((), ("v2",), ("e2",))),
    (Found({"v1": "e1", "v2": "e2"}, {}, names("e1", "e2")), NONE, NONE, names("v1"), Decision(("v2",), (), ("e2",))),
    # serving does not keep a half-staged copy of the same release
    (Found({"v1": "e1"}, {"v1": "e1"}), names("v1"), NONE, NONE, Decision((), ("v1",), ())),
    # other services' engines
    (Found({"v1": "e1"}, {}, names("e1", "e2"), names("e2")), NONE, NONE, NONE, Decision(("v1",), (), ("e1",))),
    # a manifest that cannot be read: the release goes like any; while it stays, every engine does
    (Found({"v1": UNKNOWN}, {}, names("e1")), NONE, NONE, NONE, Decision(("v1",), (), ("e1",))),
    (Found({"v1": UNKNOWN, "v2": "e2"}, {}, names("e1")), names("v1"), NONE, NONE, Decision(("v2",), (), ())),
    (Found({}, {"v1": UNKNOWN}, names("e1")), NONE, NONE, names("v1"), Decision((), (), ())),
    (Found({}, {}, names("e1"), names(UNKNOWN)), NONE, NONE, NONE, Decision((), (), ())),
])
def test_what_goes(found: Found, serving: frozenset[str], keep: frozenset[str], working: frozenset[str],
                   goes: Decision) -> None:
    assert decide(found, serving, keep, working) == goes


@pytest.mark.parametrize(("trees", "freed"), [
    ([[((1, 1), 1, 10), ((1, 2), 1, 5)]], [15]),
    ([[((1, 1), 2, 10)]], [0]),  # another release, which stays, has it too
    ([[((1, 1), 2, 10)], [((1, 1), 2, 10)]], [0, 10]),  # with its last name
    ([[((1, 1), 2, 10), ((1, 1), 2, 10)]], [10]),
    ([[((1, 1), 3, 10)], [((1, 1), 3, 10)]], [0, 0]),
    ([[((1, 1), 1, 10)], [((2, 1), 1, 7)]], [10, 7]),
])
def test_what_gets_free(trees: list[Any], freed: list[int]) -> None:
    assert freed_bytes(trees) == freed


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


def engine(version: str) -> Engine:
    return Engine("llamacpp", version, ">=3.10", f"xllamacpp=={version} --hash=sha256:{'0' * 64}\n")


@pytest.fixture
def host(tmp_path: Path, keys: Keys) -> Paths:
    paths = make_host(tmp_path / "host", keys)
    for version in ("1", "2"):
        build_environment(paths, engine(version))
    return paths


def release(host: Paths, keys: Keys, version: str, files: Mapping[str, bytes], engine_version: str = "1") -> str:
    directory = lay_down(host.releases("chat"), files, keys.private, version, engine(engine_version))
    make_read_only(directory)
    return directory.name


def point(host: Paths, name: str, index: int = 0) -> None:
    host.current("chat", index).symlink_to(f"releases/{name}")


def there(host: Paths) -> set[str]:
    return {path.name for path in host.releases("chat").iterdir() if not path.name.startswith(".")}


def snapshot(root: Path) -> list[str]:
    return sorted(str(path) for path in root.rglob("*"))


def test_what_nobody_serves_goes_with_its_engine(host: Paths, keys: Keys) -> None:
    old = release(host, keys, "v1", {"model.gguf": b"x" * 1000}, "2")
    now = release(host, keys, "v2", {"model.gguf": b"y" * 10})
    kept = release(host, keys, "v0", {"model.gguf": b"z" * 10})
    point(host, now)
    half = host.releases("chat") / ".staging" / "v3-000000000000" / "files"
    half.mkdir(parents=True)
    (half / "model.gguf.part").write_bytes(b"x" * 50)
    size = sum(path.stat().st_size for path in (host.releases("chat") / old).rglob("*") if path.is_file())
    before = snapshot(host.root)
    told = collect(host, "chat", [kept], dry_run=True)
    assert snapshot(host.root) == before
    done = collect(host, "chat", [kept])
    assert done == {"changed": True, "engines": [engine("2").directory], "bytes": size + 50,
                    "removed": [{"release": old, "bytes": size}, {"release": "v3-000000000000", "bytes": 50}]}
    assert told == {**done, "changed": False}
    assert there(host) == {now, kept}
    assert [path.name for path in host.engines.iterdir() if not path.name.startswith(".")] == [engine("1").directory]
    assert not half.parent.exists()
    assert collect(host, "chat", [kept]) == {"changed": False, "engines": [], "bytes": 0, "removed": []}


def test_an_instance_that_left_keeps_what_it_points_at(host: Paths, keys: Keys) -> None:
    one, two = (release(host, keys, version, {"a": version.encode()}) for version in ("v1", "v2"))
    point(host, one, 0)
    point(host, two, 7)
    assert collect(host, "chat", [])["removed"] == []


def test_linked_files_are_counted_with_their_last_name(host: Paths, keys: Keys) -> None:
    one = release(host, keys, "v1", {"model.gguf": b"x" * 1000})
    two = release(host, keys, "v2", {"model.gguf": b"x" * 1000})
    folders = [host.releases("chat") / name / "files" for name in (one, two)]
    folders[1].chmod(0o755)
    (folders[1] / "model.gguf").unlink()
    (folders[1] / "model.gguf").hardlink_to(folders[0] / "model.gguf")
    point(host, two)
    signed = sum(path.stat().st_size for path in (host.releases("chat") / one).glob("manifest.json*"))
    (gone,) = collect(host, "chat", [])["removed"]
    assert gone == {"release": one, "bytes": signed}
    assert (folders[1] / "model.gguf").read_bytes() == b"x" * 1000


def test_a_running_stage_keeps_its_release_and_engine(host: Paths, keys: Keys) -> None:
    here = release(host, keys, "v1", {"a": b"1"}, "1")
    half = lay_down(host.releases("chat") / ".staging", {"a": b"2"}, keys.private, "v2", engine("2"))
    for name in (here, half.name):
        with locked(host.releases("chat") / f".{name}.lock"):
            removed = collect(host, "chat", [], dry_run=True)["removed"]
            assert name not in [one["release"] for one in removed]
    with locked(host.releases("chat") / f".{half.name}.lock"):
        done = collect(host, "chat", [])
    assert [one["release"] for one in done["removed"]] == [here]
    assert done["engines"] == [engine("1").directory]
    assert half.is_dir()


def test_an_engine_that_is_being_built_stays(host: Paths) -> None:
    with locked(host.engines / f".{engine('1').directory}.lock"):
        assert collect(host, "chat", [])["engines"] == [engine("2").directory]


def test_nothing_goes_while_an_instance_is_cut_over(host: Paths, keys: Keys) -> None:
    old = release(host, keys, "v1", {"a": b"1"})
    point(host, release(host, keys, "v2", {"a": b"2"}))
    with unfinished.held(host, "chat.0"), pytest.raises(LockedError, match=r"chat\.0 is being cut over"):
        collect(host, "chat", [])
    unfinished.write(host, Record("chat.0", old, "v2-000000000000"))
    for dry_run in (False, True):
        with pytest.raises(LockedError):
            collect(host, "chat", [], dry_run=dry_run)
    assert old in there(host)
    unfinished.remove(host, "chat.0")
    assert collect(host, "chat", [])["changed"]
    assert old not in there(host)


def test_what_a_gc_that_was_cut_off_left_is_removed(host: Paths, keys: Keys) -> None:
    name = release(host, keys, "v1", {"a": b"1"})
    releases = host.releases("chat")
    (releases / name).rename(releases / f".removing-{name}")
    again = release(host, keys, "v1", {"a": b"1"})
    assert again == name
    point(host, name)
    (host.engines / ".removing-llamacpp-0-x").mkdir()
    done = collect(host, "chat", [])
    assert [one["release"] for one in done["removed"]] == [name]
    assert there(host) == {name}
    assert not list(releases.glob(".removing-*"))
    assert not list(host.engines.glob(".removing-*"))


def test_a_service_that_is_not_here(host: Paths) -> None:
    assert collect(host, "embed", ["v1-000000000000"])["removed"] == []
