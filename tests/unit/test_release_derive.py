"""A release with the files of another: no byte moves, and a version name is taken once for the whole fleet."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from machines import Machine
from release_kit import ENGINE, Keys, lay_down, make_host, make_keys

from opsctl.engines.events import discard
from opsctl.errors import OpsctlError, RefusedError, UsageError
from opsctl.releases.importing import Request, import_model
from opsctl.releases.publish import Published, publish
from opsctl.releases.store import find, verify_all

MODEL = {"model.gguf": os.urandom(100_000), "sub/notes.md": b"hello"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def gateway(tmp_path: Path, keys: Keys) -> Machine:
    return Machine(make_host(tmp_path / "ops-1", keys), "ops-1")


@pytest.fixture
def request_(tmp_path: Path, keys: Keys, gateway: Machine) -> Request:
    """v1 is in the bundle with parallel=2; the gateway answers and is empty."""
    bundle = tmp_path / "bundle"
    lay_down(bundle / "releases" / "chat", MODEL, keys.private, parallel=2)
    return Request("release:v1", "chat", "v1.1", ("max_model_len=65536",), bundle, keys.private, keys.allowed_signers,
                   gateway=Published(gateway, "ops-1", keys.allowed_signers))


def published(request: Request, gateway: Machine, version: str) -> None:
    stored = find(request.bundle, "chat", version)
    assert stored is not None
    assert publish(gateway, stored, discard, host="ops-1")


def forget(request: Request, version: str) -> None:
    """Takes a release out of the bundle."""
    stored = find(request.bundle, "chat", version)
    assert stored is not None
    shutil.rmtree(stored.directory)


def refused(request: Request, code: str) -> OpsctlError:
    folder = request.bundle / "releases" / "chat"
    before = sorted(folder.iterdir()) if folder.is_dir() else []
    with pytest.raises(OpsctlError) as error:
        import_model(request, discard)
    assert error.value.code == code, error.value.message
    assert error.value.hint
    assert [path for path in sorted(folder.iterdir()) if path.name != ".lock"] == [
        path for path in before if path.name != ".lock"]
    return error.value


def test_the_files_are_links_and_only_what_was_set_differs(request_: Request) -> None:
    done = import_model(request_, discard)
    base = find(request_.bundle, "chat", "v1")
    assert base is not None and done.directory is not None
    assert done.changed
    for path in MODEL:
        one, two = (directory / "files" / path for directory in (base.directory, done.directory))
        assert one.stat().st_ino == two.stat().st_ino
    assert done.release.arguments == {**base.release.arguments, "max_model_len": 65536}
    assert done.release.arguments["parallel"] == 2
    assert done.release.engine == ENGINE  # not the one that this opsctl ships
    assert done.release.source == "release:v1"
    verify_all(request_.bundle, request_.allowed_signers)


def test_the_same_again_is_nothing_to_do_and_another_is_refused(request_: Request) -> None:
    first = import_model(request_, discard)
    again = import_model(request_, discard)
    assert (again.changed, again.digest) == (False, first.digest)
    error = refused(replace(request_, settings=("max_model_len=1024",)), "release.version_taken")
    assert "its max_model_len is 65536, not 1024" in error.message


def test_nothing_is_sent_when_it_is_published(request_: Request, gateway: Machine) -> None:
    published(request_, gateway, "v1")
    import_model(request_, discard)
    gateway.verbs.clear()
    published(request_, gateway, "v1.1")
    assert gateway.verbs == ["release-begin", "release-accept"]


def test_a_bundle_that_has_it_no_more_takes_the_manifest_from_the_gateway(request_: Request, gateway: Machine) -> None:
    published(request_, gateway, "v1")
    forget(request_, "v1")
    gateway.verbs.clear()
    done = import_model(request_, discard)
    assert (done.changed, done.directory) == (True, None)
    assert "receive" not in gateway.verbs
    releases = gateway.paths.gateway_releases / "chat"
    (old,), (new,) = releases.glob("v1-*"), releases.glob("v1.1-*")
    assert new.name == f"v1.1-{done.digest[:12]}"
    for path in MODEL:
        assert (old / "files" / path).stat().st_ino == (new / "files" / path).stat().st_ino
    again = import_model(request_, discard)
    assert (again.changed, again.digest) == (False, done.digest)
    refused(replace(request_, settings=()), "release.version_taken")


def test_a_release_in_the_bundle_that_lost_a_file_counts_as_gone(request_: Request, gateway: Machine) -> None:
    published(request_, gateway, "v1")
    stored = find(request_.bundle, "chat", "v1")
    assert stored is not None
    (stored.directory / "files" / "model.gguf").unlink()
    assert import_model(request_, discard).directory is None


def test_a_gateway_whose_files_rotted_is_not_given_what_it_cannot_have(request_: Request, gateway: Machine) -> None:
    published(request_, gateway, "v1")
    forget(request_, "v1")
    (kept,) = gateway.paths.gateway_releases.glob("chat/v1-*/files/model.gguf")
    kept.chmod(0o644)
    kept.write_bytes(b"?" * len(MODEL["model.gguf"]))
    assert "model.gguf" in refused(request_, "gateway.lacks_files").message


@pytest.mark.parametrize("answers", [True, False])
def test_a_release_that_is_nowhere(request_: Request, answers: bool) -> None:
    request = replace(request_, source="release:v9", gateway=request_.gateway if answers else None)
    assert ("the gateway was not asked" in refused(request, "import.no_release").message) is not answers


def test_a_release_that_somebody_changed_is_not_signed_again(request_: Request) -> None:
    stored = find(request_.bundle, "chat", "v1")
    assert stored is not None
    manifest = stored.directory / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"parallel":2', b'"parallel":3'))
    refused(request_, "release.tampered")


@pytest.mark.parametrize("setting", ["max_model_len=many", "no_such=1", "parallel"])
def test_settings_are_checked_by_the_engine(request_: Request, setting: str) -> None:
    with pytest.raises(UsageError):
        import_model(replace(request_, settings=(setting,)), discard)


# A name that the gateway has.


def test_the_same_content_becomes_the_gateways_release(request_: Request, gateway: Machine) -> None:
    """Two people import the same: the fleet has one release of that name, signed once."""
    published(request_, gateway, "v1")
    first = import_model(request_, discard)
    published(request_, gateway, "v1.1")
    forget(request_, "v1.1")
    again = import_model(request_, discard)
    assert (again.changed, again.digest) == (True, first.digest)
    verify_all(request_.bundle, request_.allowed_signers)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    return folder


def test_files_under_a_name_that_the_gateway_has(request_: Request, gateway: Machine, model: Path) -> None:
    request = replace(request_, source=str(model), version="v2", settings=())
    first = import_model(request, discard)
    published(request_, gateway, "v2")
    forget(request_, "v2")
    again = import_model(request, discard)
    assert (again.changed, again.digest) == (True, first.digest)
    forget(request_, "v2")
    assert "parallel" in refused(replace(request, settings=("parallel=9",)), "release.version_taken").message
    (model / "more.json").write_text("{}")
    assert "more.json" in refused(request, "release.version_taken").message


def test_one_that_was_made_apart_from_the_gateways_is_said(request_: Request, gateway: Machine, model: Path) -> None:
    request = replace(request_, source=str(model), version="v2", settings=(), gateway=None)
    import_model(request, discard)
    published(request, gateway, "v2")
    forget(request_, "v2")
    stored = gateway.paths.gateway_releases / "chat"
    (folder,) = stored.glob("v2-*")
    other = replace(request, settings=("parallel=7",))
    import_model(other, discard)  # the gateway was not asked
    error = refused(replace(other, gateway=request_.gateway), "release.version_taken")
    assert "on the gateway already" in error.message
    assert folder.name.startswith("v2-")


def test_the_gateway_takes_a_name_once(request_: Request, gateway: Machine, keys: Keys, tmp_path: Path) -> None:
    published(request_, gateway, "v1")
    lay_down(tmp_path / "other" / "releases" / "chat", MODEL, keys.private, parallel=3)
    stored = find(tmp_path / "other", "chat", "v1")
    assert stored is not None
    with pytest.raises(RefusedError) as error:
        publish(gateway, stored, discard, host="ops-1")
    assert error.value.code == "release.version_taken"
