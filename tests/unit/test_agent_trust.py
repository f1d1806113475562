"""Who may release: only bytes that a trusted key signed, under their own name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from release_kit import Keys, lay_down, make_keys, release_of

from opsctl.agent import manifest as manifests
from opsctl.agent.store import verify_files
from opsctl.agent.trust import read_signed
from opsctl.errors import ConfigurationError, OpsctlError, RefusedError

FILES = {"model.gguf": b"weights", "sub/chat.jinja": b"{{ messages }}"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def release(tmp_path: Path, keys: Keys) -> Path:
    return lay_down(tmp_path, FILES, keys.private)


def refused(directory: Path, keys: Keys) -> OpsctlError:
    with pytest.raises(RefusedError) as error:
        verify_files(directory, read_signed(directory, keys.allowed_signers).release)
    assert error.value.hint
    return error.value


def test_a_signed_release_is_read(release: Path, keys: Keys) -> None:
    signed = read_signed(release, keys.allowed_signers)
    verify_files(release, signed.release)
    assert signed.directory_name == release.name
    assert {file.path for file in signed.release.files} == set(FILES)


def test_unsigned(release: Path, keys: Keys) -> None:
    (release / "manifest.json.sig").unlink()
    assert refused(release, keys).code == "release.unsigned"


def test_signed_by_somebody_else(release: Path, keys: Keys, tmp_path: Path) -> None:
    other = make_keys(tmp_path / "other")
    error = refused(release, other)
    assert error.code == "release.foreign_signature"
    assert str(other.allowed_signers) in error.message


def test_several_keys_are_accepted(release: Path, keys: Keys, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.write_text(make_keys(tmp_path / "new").allowed_signers.read_text() + keys.allowed_signers.read_text())
    assert read_signed(release, both)


def test_a_changed_manifest(release: Path, keys: Keys) -> None:
    path = release / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"parallel":4', b'"parallel":9'))
    assert refused(release, keys).code == "release.tampered"


def test_another_releases_manifest_and_signature_under_this_name(release: Path, keys: Keys, tmp_path: Path) -> None:
    other = lay_down(tmp_path / "other", {"model.gguf": b"older"}, keys.private)
    for name in ("manifest.json", "manifest.json.sig"):
        shutil.copy(other / name, release / name)
    assert refused(release, keys).code == "release.tampered"


def test_one_flipped_bit(release: Path, keys: Keys) -> None:
    (release / "files" / "model.gguf").write_bytes(b"weighTs")
    error = refused(release, keys)
    assert error.code == "release.tampered"
    assert "model.gguf" in error.message


@pytest.mark.parametrize(("change", "code"), [
    (lambda files: (files / "model.gguf").unlink(), "release.missing_file"),
    (lambda files: (files / "model.gguf").write_bytes(b"weights and more"), "release.tampered"),
    (lambda files: (files / "sub" / "evil.py").write_bytes(b"import os"), "release.extra_file"),
    (lambda files: (files / "link").symlink_to("/etc/passwd"), "release.extra_file"),
    (lambda files: (files.parent / "more").write_bytes(b""), "release.extra_file"),
    (lambda files: ((files / "model.gguf").unlink(), (files / "model.gguf").symlink_to("/etc/passwd")),
     "release.missing_file"),
])
def test_files_that_are_not_as_signed(release: Path, keys: Keys, change, code: str) -> None:
    change(release / "files")
    assert refused(release, keys).code == code


def test_missing_public_keys_are_said_by_path(release: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="none/allowed_signers"):
        read_signed(release, tmp_path / "none" / "allowed_signers")


def test_manifest_bytes_are_canonical_and_round_trip() -> None:
    release = release_of(FILES, "v1", threads=2)
    content = release.to_bytes()
    assert manifests.parse(content) == release
    assert manifests.parse(content).to_bytes() == content
    assert content.endswith(b"}\n")
    assert content.index(b'"arguments"') < content.index(b'"created"') < content.index(b'"engine"')


@pytest.mark.parametrize(("key", "value"), [
    ("schema", "opsctl.release/v2"), ("version", "V1"), ("version", "../v1"), ("version", "x" * 41), ("service", "a/b"),
    ("files", []), ("files", [{"path": "../x", "size": 1, "sha256": "0" * 64}]),
    ("files", [{"path": "/etc/x", "size": 1, "sha256": "0" * 64}]),
    ("files", [{"path": "a//b", "size": 1, "sha256": "0" * 64}]),
    ("files", [{"path": "a\nb", "size": 1, "sha256": "0" * 64}]),
    ("files", [{"path": "x", "size": -1, "sha256": "0" * 64}]),
    ("files", [{"path": "x", "size": 1, "sha256": "0"}]),
    ("files", [{"path": "x", "size": 1, "sha256": "0" * 64}] * 2),
    ("files", [{"path": "x", "size": 1, "sha256": "0" * 64}, {"path": "x/y", "size": 1, "sha256": "0" * 64}]),
    ("arguments", {"x": [1]}), ("engine", {"name": "llamacpp", "version": "../1", "python": "3.11", "lock": ""}),
    ("created", None),
])
def test_a_wrong_manifest_is_refused(key: str, value: object) -> None:
    document = json.loads(release_of(FILES).to_bytes()) | {key: value}
    with pytest.raises(RefusedError):
        manifests.parse(manifests.canonical(document))


def test_keys_of_newer_versions_are_left_alone() -> None:
    document = json.loads(release_of(FILES).to_bytes()) | {"fingerprint": {"nll": 1.5}}
    assert manifests.parse(manifests.canonical(document)).version == "v1"


@pytest.mark.parametrize(("name", "parts"), [
    ("v1-0123456789ab", ("v1", "0123456789ab")), ("v1-rc.2-0123456789ab", ("v1-rc.2", "0123456789ab")),
    ("v1", ("v1", "")), ("v1-0123", ("v1-0123", "")), ("", ("", "")),
])
def test_folder_names(name: str, parts: tuple[str, str]) -> None:
    assert manifests.split_directory_name(name) == parts
