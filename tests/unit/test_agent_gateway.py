"""The gateway takes only what was signed, resumes, and keeps a ledger that never contradicts itself."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from release_kit import Keys, lay_down, make_host, make_keys

from opsctl.agent import gateway
from opsctl.agent.durable import locked
from opsctl.agent.paths import Paths
from opsctl.errors import LockedError, OpsctlError, RefusedError, UsageError

MODEL = os.urandom(50_000)
DIGESTS = ("a" * 64, "b" * 64)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def host(tmp_path: Path, keys: Keys) -> Paths:
    return make_host(tmp_path / "host", keys)


def begin(host: Paths, directory: Path, **more: Any) -> dict[str, Any]:
    body = {name: base64.b64encode((directory / path).read_bytes()).decode()
            for name, path in (("manifest", "manifest.json"), ("signature", "manifest.json.sig"))}
    return gateway.begin(host, json.dumps(body).encode(), **more)


def send(host: Paths, directory: Path) -> dict[str, Any]:
    """Sends a whole release."""
    for file in begin(host, directory)["needed"]:
        content = (directory / "files" / file["path"]).read_bytes()[file["have"]:]
        gateway.receive(host, "chat", directory.name, file["path"], file["have"], io.BytesIO(content))
    return gateway.accept(host, "chat", directory.name)


def test_a_release_is_taken_and_everybody_may_read_it(host: Paths, keys: Keys, tmp_path: Path) -> None:
    directory = lay_down(tmp_path, {"model.gguf": MODEL, "sub/a.json": b"{}"}, keys.private)
    assert send(host, directory) == {"changed": True, "release": directory.name}
    there = host.gateway_releases / "chat" / directory.name
    assert (there / "files" / "model.gguf").read_bytes() == MODEL
    assert all(path.stat().st_mode & 0o004 for path in there.rglob("*"))
    assert [release["version"] for release in gateway.releases(host, "chat")["releases"]] == ["v1"]


def test_again_is_nothing_to_do(host: Paths, keys: Keys, tmp_path: Path) -> None:
    directory = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private)
    send(host, directory)
    assert begin(host, directory)["accepted"]
    assert not gateway.accept(host, "chat", directory.name)["changed"]


def test_sending_goes_on_where_it_stopped(host: Paths, keys: Keys, tmp_path: Path) -> None:
    directory = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private)
    begin(host, directory)
    first = gateway.receive(host, "chat", directory.name, "model.gguf", 0, io.BytesIO(MODEL[:20_000]))
    assert first == {"have": 20_000, "complete": False}
    assert begin(host, directory)["needed"] == [{"path": "model.gguf", "size": 50_000, "have": 20_000}]
    with pytest.raises(RefusedError, match="20000 bytes are here, not 10000"):
        gateway.receive(host, "chat", directory.name, "model.gguf", 10_000, io.BytesIO(MODEL[10_000:]))
    assert send(host, directory)["changed"]


def test_what_does_not_fit_is_refused_before_a_byte_is_sent(host: Paths, keys: Keys, tmp_path: Path) -> None:
    directory = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private)
    with pytest.raises(RefusedError) as refused:
        begin(host, directory, free_bytes=lambda _: len(MODEL))
    assert refused.value.code == "host.disk_full"
    send(host, directory)
    second = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private, "v2")
    assert begin(host, second, free_bytes=lambda _: 0)["needed"] == []  # linked: it needs nothing


def test_what_a_killed_sender_left_does_not_stand_in_the_way(host: Paths, keys: Keys, tmp_path: Path) -> None:
    directory = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private)
    begin(host, directory)
    incoming = host.gateway_releases / "chat" / ".incoming" / directory.name
    (incoming / ".manifest.json.x1y2z3").write_bytes(b"{")  # killed between writing and renaming
    assert send(host, directory)["changed"]
    there = host.gateway_releases / "chat" / directory.name
    assert {path.name for path in there.iterdir()} == {"manifest.json", "manifest.json.sig", "files"}


def test_a_release_with_the_same_weights_moves_no_byte(host: Paths, keys: Keys, tmp_path: Path) -> None:
    send(host, lay_down(tmp_path, {"model.gguf": MODEL}, keys.private, "v1"))
    second = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private, "v1.1", max_model_len=65536)
    assert begin(host, second)["needed"] == []
    assert gateway.accept(host, "chat", second.name)["changed"]


def test_a_rotten_file_of_another_release_is_sent_again(host: Paths, keys: Keys, tmp_path: Path) -> None:
    first = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private, "v1")
    send(host, first)
    kept = host.gateway_releases / "chat" / first.name / "files" / "model.gguf"
    kept.chmod(0o644)
    kept.write_bytes(b"?" + MODEL[1:])
    second = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private, "v2")
    assert begin(host, second)["needed"] == [{"path": "model.gguf", "size": len(MODEL), "have": 0}]
    assert send(host, second)["changed"]


@pytest.mark.parametrize("lost", ["manifest.json", "manifest.json.sig", "files/model.gguf"])
def test_a_release_that_broke_here_is_taken_again(host: Paths, keys: Keys, tmp_path: Path, lost: str) -> None:
    directory = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private)
    send(host, directory)
    target = host.gateway_releases / "chat" / directory.name
    for folder in (target, target / "files"):
        folder.chmod(0o755)
    (target / lost).unlink()
    assert send(host, directory)["changed"]
    assert begin(host, directory)["accepted"]


def test_a_foreign_release_is_not_even_begun(host: Paths, tmp_path: Path) -> None:
    directory = lay_down(tmp_path, {"model.gguf": MODEL}, make_keys(tmp_path / "other").private)
    with pytest.raises(RefusedError) as refused:
        begin(host, directory)
    assert refused.value.code == "release.foreign_signature"
    assert not (host.gateway_releases / "chat").exists()


@pytest.mark.parametrize("sent", [MODEL[:-1] + b"!", MODEL + b"more"])
def test_other_bytes_than_signed_are_thrown_away(host: Paths, keys: Keys, tmp_path: Path, sent: bytes) -> None:
    directory = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private)
    begin(host, directory)
    with pytest.raises(RefusedError) as refused:
        gateway.receive(host, "chat", directory.name, "model.gguf", 0, io.BytesIO(sent))
    assert refused.value.code == "release.tampered"
    with pytest.raises(RefusedError):
        gateway.accept(host, "chat", directory.name)
    assert begin(host, directory)["needed"][0]["have"] == 0


def test_files_that_nobody_signed_are_not_taken(host: Paths, keys: Keys, tmp_path: Path) -> None:
    directory = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private)
    begin(host, directory)
    with pytest.raises(RefusedError) as refused:
        gateway.receive(host, "chat", directory.name, "../../evil", 0, io.BytesIO(b""))
    assert refused.value.code == "release.extra_file"


@pytest.mark.parametrize(("service", "release"), [("../chat", "v1-000000000000"), ("chat", "../v1-000000000000"),
                                                   ("chat", "v1")])
def test_names_that_lead_elsewhere(host: Paths, service: str, release: str) -> None:
    with pytest.raises(UsageError):
        gateway.accept(host, service, release)


def test_one_sender_at_a_time(host: Paths, keys: Keys, tmp_path: Path) -> None:
    directory = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private)
    begin(host, directory)
    lock = host.gateway_releases / "chat" / ".incoming" / f".{directory.name}.lock"
    with locked(lock), pytest.raises(LockedError) as refused:
        begin(host, directory)
    assert refused.value.code == "gateway.busy"


def test_the_manifest_of_a_release_is_given_as_it_was_signed(host: Paths, keys: Keys, tmp_path: Path) -> None:
    directory = lay_down(tmp_path, {"model.gguf": MODEL}, keys.private)
    send(host, directory)
    given = gateway.manifest(host, "chat", directory.name)
    assert base64.b64decode(given["manifest"]) == (directory / "manifest.json").read_bytes()
    assert base64.b64decode(given["signature"]) == (directory / "manifest.json.sig").read_bytes()
    with pytest.raises(RefusedError) as refused:
        gateway.manifest(host, "chat", "v9-000000000000")
    assert refused.value.code == "gateway.no_release"


# The ledger.


@pytest.fixture
def ledger(host: Paths) -> Paths:
    """A host that has v1 (digest a...) and v2 (digest b...)."""
    for version, digest in zip(("v1", "v2"), DIGESTS, strict=True):
        (host.gateway_releases / "chat" / f"{version}-{digest[:12]}").mkdir(parents=True)
    return host


def append(host: Paths, version: str, digest: str, after: int) -> dict[str, Any]:
    return gateway.append_ledger(host, "chat", version, digest, after=after, by="ann@desk", run="17", note="why",
                                 now=0.0)


def lines(host: Paths) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = gateway.show_ledger(host, "chat")["lines"]
    return found


def test_the_ledger_grows_line_by_line(ledger: Paths) -> None:
    assert lines(ledger) == []
    append(ledger, "v1", DIGESTS[0], 0)
    append(ledger, "v2", DIGESTS[1], 1)
    assert append(ledger, "v1", DIGESTS[0], 2) == {"changed": True, "number": 3}
    assert [line["version"] for line in lines(ledger)] == ["v1", "v2", "v1"]
    assert lines(ledger)[0] == {"number": 1, "version": "v1", "digest": DIGESTS[0], "at": "1970-01-01T00:00:00Z",
                                "by": "ann@desk", "run": "17", "note": "why", "action": "serve",
                                "release": "v1-aaaaaaaaaaaa"}


def test_the_same_again_is_nothing_to_do(ledger: Paths) -> None:
    append(ledger, "v1", DIGESTS[0], 0)
    assert append(ledger, "v1", DIGESTS[0], 0) == {"changed": False, "number": 1}


@pytest.mark.parametrize(("version", "digest", "after", "code"), [
    ("v2", DIGESTS[1], 0, "ledger.moved"),
    ("v1", DIGESTS[1], 1, "ledger.inconsistent"),
    ("v3", "c" * 64, 1, "ledger.no_release"),
    ("v2", "b", 1, "ledger.inconsistent"),
    ("V2", DIGESTS[1], 1, "release.bad_version"),
])
def test_lines_that_do_not_fit_are_refused(ledger: Paths, version: str, digest: str, after: int, code: str) -> None:
    append(ledger, "v1", DIGESTS[0], 0)
    with pytest.raises(OpsctlError) as refused:
        append(ledger, version, digest, after)
    assert refused.value.code == code
    assert len(lines(ledger)) == 1


def test_a_line_that_a_power_cut_tore_is_no_line(ledger: Paths) -> None:
    append(ledger, "v1", DIGESTS[0], 0)
    path = ledger.ledgers / "chat.jsonl"
    with path.open("ab") as file:
        file.write(b'{"number": 2, "versi')
    assert len(lines(ledger)) == 1
    append(ledger, "v2", DIGESTS[1], 1)
    assert [line["number"] for line in lines(ledger)] == [1, 2]


def test_a_ledger_that_was_edited_is_damaged(ledger: Paths) -> None:
    append(ledger, "v1", DIGESTS[0], 0)
    path = ledger.ledgers / "chat.jsonl"
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(OpsctlError) as refused:
        lines(ledger)
    assert refused.value.code == "ledger.damaged"
