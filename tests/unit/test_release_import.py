"""Importing a model: what comes in, what is refused, and that a version name is taken once."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from release_kit import Keys, make_keys, serving

from opsctl.engines.events import Event, Note, Progress, discard
from opsctl.errors import ConfigurationError, OpsctlError, RefusedError, UsageError
from opsctl.releases.importing import Imported, Request, import_model
from opsctl.releases.store import verify_all


def gguf(size: int = 4096) -> bytes:
    """A header that is right: two keys, one tensor."""
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value
    keys = text(b"tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b")
    keys += text(b"general.alignment") + struct.pack("<II", 4, 64)
    tensors = text(b"w") + struct.pack("<IQIQ", 1, 16, 0, 0)
    return (b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + keys + tensors).ljust(size, b"\0")


def safetensors(body: bytes = b"12345678", **header: object) -> bytes:
    table = header or {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps({"__metadata__": {"format": "pt"}, **table}).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.gguf").write_bytes(gguf())
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "notes.md").write_text("hello")
    return folder


@pytest.fixture
def request_(tmp_path: Path, model: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> Request:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Request(str(model), "chat", "v1", (), tmp_path / "bundle", keys.private, keys.allowed_signers)


def refused(request: Request, code: str, kind: type[OpsctlError] = RefusedError) -> OpsctlError:
    """Asserts the refusal, and that the bundle has no trace of it."""
    before = releases(request)
    with pytest.raises(kind) as error:
        import_model(request, discard)
    assert error.value.code == code, error.value.message
    assert error.value.hint
    assert releases(request) == before
    return error.value


def releases(request: Request) -> list[str]:
    folder = request.bundle / "releases" / "chat"
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.is_dir() else []


def test_a_folder_becomes_a_signed_release(request_: Request, model: Path) -> None:
    seen: list[Event] = []
    done = import_model(request_, seen.append)
    assert done.changed
    assert [file.path for file in done.release.files] == ["config.json", "model.gguf", "sub/notes.md"]
    assert done.directory.name == f"v1-{done.digest[:12]}"
    assert done.release.engine.name == "llamacpp"
    assert done.release.arguments["parallel"] == 4
    assert any(isinstance(event, Progress) and event.done == event.total == done.release.size for event in seen)
    (signed,) = verify_all(request_.bundle, request_.allowed_signers)
    assert signed.digest == done.digest


def test_a_later_edit_of_the_source_changes_no_release(request_: Request, model: Path) -> None:
    import_model(request_, discard)
    with (model / "model.gguf").open("r+b") as file:
        file.seek(100)
        file.write(b"!!!!")
    verify_all(request_.bundle, request_.allowed_signers)


def test_one_file(request_: Request, model: Path) -> None:
    done = import_model(replace(request_, source=str(model / "model.gguf")), discard)
    assert [file.path for file in done.release.files] == ["model.gguf"]


def test_links_are_followed_and_said(request_: Request, model: Path) -> None:
    (model / "model.gguf").rename(model.parent / "blob")
    (model / "model.gguf").symlink_to("../blob")
    seen: list[Event] = []
    done = import_model(request_, seen.append)
    assert not (done.directory / "files" / "model.gguf").is_symlink()
    assert any(isinstance(event, Note) and "symbolic link" in event.message for event in seen)


def test_hidden_files_are_left_out_and_said(request_: Request, model: Path) -> None:
    (model / ".gitattributes").write_text("x")
    seen: list[Event] = []
    assert ".gitattributes" not in {file.path for file in import_model(request_, seen.append).release.files}
    assert any(isinstance(event, Note) and ".gitattributes" in event.message for event in seen)


# A version name is taken once.


def again(request: Request) -> Imported:
    return import_model(request, discard)


def test_the_same_content_again_is_nothing_to_do(request_: Request) -> None:
    first = import_model(request_, discard)
    second = again(request_)
    assert (second.changed, second.digest) == (False, first.digest)


@pytest.mark.parametrize(("change", "words"), [
    (lambda request, model: replace(request, settings=("parallel=9",)), "parallel"),
    (lambda request, model: ((model / "config.json").write_text('{"a": 1}'), request)[1], "config.json"),
    (lambda request, model: ((model / "more.json").write_text("{}"), request)[1], "more.json"),
    (lambda request, model: ((model / "config.json").unlink(), request)[1], "config.json"),
])
def test_other_content_under_a_taken_name(request_: Request, model: Path,
                                          change: Callable[[Request, Path], Request], words: str) -> None:
    import_model(request_, discard)
    assert words in refused(change(request_, model), "release.version_taken").message


def test_another_version_shares_the_files(request_: Request) -> None:
    first = import_model(request_, discard)
    second = import_model(replace(request_, version="v1.1", settings=("max_model_len=8192",)), discard)
    one, two = (done.directory / "files" / "model.gguf" for done in (first, second))
    assert one.stat().st_ino == two.stat().st_ino
    verify_all(request_.bundle, request_.allowed_signers)


# What is refused.

EVIL = pickle.dumps({"weights": [1.0]}, protocol=4)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "data.pkl", "model.ckpt", "A.PT"])
def test_pickles_by_name(request_: Request, model: Path, name: str) -> None:
    (model / name).write_bytes(b"whatever")
    assert name in refused(request_, "release.pickle").message


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.model", "model.safetensors", "second.gguf", "config2.json",
                                  "README"])
def test_pickles_under_another_name(request_: Request, model: Path, name: str) -> None:
    (model / name).write_bytes(EVIL)
    assert name in refused(request_, "release.pickle").message


def test_a_torch_archive_under_another_name(request_: Request, model: Path) -> None:
    with zipfile.ZipFile(model / "tokenizer.model", "w") as archive:
        archive.writestr("archive/data.pkl", EVIL)
    refused(request_, "release.pickle")


@pytest.mark.parametrize(("name", "code"), [
    ("modeling_x.py", "release.code"), ("run.sh", "release.code"), ("picture.png", "release.unknown_format"),
    ("weights", "release.unknown_format"),
])
def test_what_a_release_does_not_carry(request_: Request, model: Path, name: str, code: str) -> None:
    (model / name).write_bytes(b"x")
    refused(request_, code)


@pytest.mark.parametrize(("name", "content"), [
    ("model.safetensors", safetensors(b"1234")),
    ("model.safetensors", safetensors() + b"trailing"),
    ("model.safetensors", safetensors(b"x" * 8, w={"data_offsets": [0, 4]}, v={"data_offsets": [2, 8]})),
    ("model.safetensors", safetensors(b"x" * 8, w={"data_offsets": [0, 4]}, v={"data_offsets": [5, 8]})),
    ("model.safetensors", safetensors(b"", w={"data_offsets": "no"})),
    ("model.safetensors", struct.pack("<Q", 1 << 40) + b"{}"),
    ("model.safetensors", struct.pack("<Q", 2) + b"[]"),
    ("model.safetensors", b"short"),
    ("model2.gguf", gguf()[:60]),
    ("model2.gguf", gguf(200)[:128]),
    ("model2.gguf", b"GGUF" + struct.pack("<IQQ", 1, 1, 1)),
    ("model2.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1)),
    ("model2.gguf", b"<html>not found</html>"),
    ("config2.json", b"<html>not found</html>"),
    ("config2.json", b""),
    ("vocab.txt", b""),
])
def test_damaged_files(request_: Request, model: Path, name: str, content: bytes) -> None:
    (model / name).write_bytes(content)
    assert name in refused(replace(request_, settings=("model_file=model.gguf",)), "release.malformed").message


def test_good_safetensors_pass_whatever_their_first_bytes(request_: Request, model: Path) -> None:
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"pad": ""}}
    missing = 0x0280 - len(json.dumps(header))  # 80 02: how a pickle begins
    text = json.dumps({**header, "__metadata__": {"pad": "x" * missing}}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"12345678")
    assert struct.pack("<Q", len(text))[:2] == b"\x80\x02"
    assert import_model(request_, discard).changed


def test_a_shard_that_is_missing(request_: Request, model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors"}}))
    refused(request_, "release.incomplete")


def test_nothing_that_the_engine_could_serve(request_: Request, model: Path) -> None:
    (model / "model.gguf").unlink()
    refused(request_, "release.no_model_file")


def test_an_empty_folder(request_: Request, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(replace(request_, source=str(tmp_path / "empty")), "import.empty")


def test_a_link_to_nowhere(request_: Request, model: Path) -> None:
    (model / "b.json").symlink_to("gone.json")
    assert "b.json" in refused(request_, "import.unreadable").message


def test_a_file_that_may_not_be_read(request_: Request, model: Path) -> None:
    if os.geteuid() == 0:
        os.mkfifo(model / "b.json")  # root reads everything; a pipe is no file for anybody
    else:
        (model / "b.json").write_text("{}")
        (model / "b.json").chmod(0)
    refused(request_, "import.unreadable")


@pytest.mark.parametrize(("source", "code"), [
    ("/nowhere/at/all", "import.no_source"), ("ftp://host/x.gguf", "import.bad_source"),
    ("https://host/", "import.bad_source"),
])
def test_sources_that_are_none(request_: Request, source: str, code: str) -> None:
    refused(replace(request_, source=source), code, UsageError)


def test_a_bad_version_name(request_: Request) -> None:
    refused(replace(request_, version="V 1"), "release.bad_version")


def test_a_key_that_nobody_trusts(request_: Request, tmp_path: Path) -> None:
    other = make_keys(tmp_path / "other")
    error = refused(replace(request_, key=other.private), "trust.own_key", ConfigurationError)
    assert "allowed_signers" in error.message


def test_no_key(request_: Request, tmp_path: Path) -> None:
    refused(replace(request_, key=tmp_path / "none"), "release.no_key")


def test_an_import_that_was_killed_leaves_nothing_for_the_next(request_: Request) -> None:
    left = request_.bundle / "releases" / "chat" / ".incoming-killed"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    done = import_model(request_, discard)
    assert releases(request_) == [done.directory.name]


# From a URL.


def test_a_url_is_downloaded_and_its_secrets_stay_out_of_the_manifest(request_: Request) -> None:
    with serving({}) as web:
        web.answer = lambda path: gguf() if path.startswith("/m/model.gguf") else None
        done = import_model(replace(request_, source=f"{web.url}/m/model.gguf?token=secret"), discard)
    assert [file.path for file in done.release.files] == ["model.gguf"]
    assert done.release.source == f"{web.url}/m/model.gguf"
    assert b"secret" not in (done.directory / "manifest.json").read_bytes()


def test_an_interrupted_download_goes_on(request_: Request, tmp_path: Path) -> None:
    body = gguf(300_000)
    with serving({"/model.gguf": body}, etag='"1"') as web:
        request = replace(request_, source=f"{web.url}/model.gguf")
        web.content["/model.gguf"] = body[:200_000]

        def interrupted(event: Event) -> None:
            if isinstance(event, Progress) and event.done:
                raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            import_model(request, interrupted)
        (partial,) = (tmp_path / "cache").rglob("*.part")
        partial.write_bytes(body[:200_000])
        web.content["/model.gguf"] = body
        web.asked.clear()
        assert import_model(request, discard).changed
        assert web.asked[-1] == ("/model.gguf", "bytes=200000-")
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_a_file_url(request_: Request, model: Path) -> None:
    assert import_model(replace(request_, source=f"file://{model}/model.gguf"), discard).changed


def test_a_url_that_is_not_there(request_: Request) -> None:
    with serving({}) as web, pytest.raises(OpsctlError) as failed:
        import_model(replace(request_, source=f"{web.url}/model.gguf"), discard)
    assert "Not Found" in failed.value.message


def test_a_login_in_a_url_is_refused_without_repeating_it(request_: Request) -> None:
    with pytest.raises(OpsctlError) as failed:
        import_model(replace(request_, source="http://ann:pass-word@host/model.gguf?to-ken"), discard)
    assert "not supported" in failed.value.message
    assert "pass-word" not in failed.value.message and "to-ken" not in failed.value.message
