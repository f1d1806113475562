"""One file over HTTP: resumed, never trusted, given up only when nothing moves."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from release_kit import Web, serving

from opsctl.agent.fetch import fetch
from opsctl.errors import OpsctlError, RefusedError

BODY = os.urandom(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


def get(url: str, path: Path, *, size: int | None = len(BODY), sha256: str = SHA) -> int:
    """Fetches and returns the bytes that were counted."""
    counted: list[int] = []
    fetch(url, path, size=size, sha256=sha256, advance=counted.append, pause=lambda _: None)
    return sum(counted)


def test_a_whole_file(tmp_path: Path) -> None:
    with serving({"/model": BODY}) as web:
        assert get(f"{web.url}/model", tmp_path / "model") == len(BODY)
    assert (tmp_path / "model").read_bytes() == BODY
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_it_goes_on_where_an_earlier_try_stopped(tmp_path: Path) -> None:
    (tmp_path / "model.part").write_bytes(BODY[:100_000])
    with serving({"/model": BODY}) as web:
        assert get(f"{web.url}/model", tmp_path / "model") == len(BODY)
        assert web.asked == [("/model", "bytes=100000-")]
    assert (tmp_path / "model").read_bytes() == BODY


def test_a_cut_connection_is_resumed_and_not_begun_again(tmp_path: Path) -> None:
    with serving({"/model": BODY}, break_after=70_000, breaks_left=3) as web:
        assert get(f"{web.url}/model", tmp_path / "model") == len(BODY)
        assert [asked for _, asked in web.asked] == ["", "bytes=70000-", "bytes=140000-", "bytes=210000-"]
    assert (tmp_path / "model").read_bytes() == BODY


def test_a_server_without_ranges_sends_all_again(tmp_path: Path) -> None:
    (tmp_path / "model.part").write_bytes(b"x" * 1000)
    with serving({"/model": BODY}, ranges=False) as web:
        assert get(f"{web.url}/model", tmp_path / "model") == len(BODY)
    assert (tmp_path / "model").read_bytes() == BODY


NEWER = os.urandom(len(BODY))


def interrupted(web: Web, path: Path, have: int = 100_000) -> None:
    """A try without a sha256 that was killed when it had so many bytes."""
    def killed(_count: int) -> None:
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{web.url}/model", path, size=len(BODY), sha256="", advance=killed)
    os.truncate(path.with_name("model.part"), have)


@pytest.mark.parametrize("knows_if_range", [True, False])
@pytest.mark.parametrize("have", [100_000, len(BODY)])
@pytest.mark.parametrize("etags", [('"a"', '"b"'), ("", ""), ("", '"b"'), ('W/"a"', 'W/"a"')])
def test_a_source_that_was_replaced_makes_no_mixture(tmp_path: Path, etags: tuple[str, str], have: int,
                                                     knows_if_range: bool) -> None:
    with serving({"/model": BODY}, etag=etags[0], knows_if_range=knows_if_range) as web:
        interrupted(web, tmp_path / "model", have)
        web.content["/model"], web.etag = NEWER, etags[1]
        assert get(f"{web.url}/model", tmp_path / "model", sha256="") == len(NEWER)
    assert (tmp_path / "model").read_bytes() == NEWER
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_without_a_sha256_it_goes_on_when_the_source_says_it_is_the_same(tmp_path: Path) -> None:
    with serving({"/model": BODY}, etag='"a"') as web:
        interrupted(web, tmp_path / "model")
        assert get(f"{web.url}/model", tmp_path / "model", sha256="") == len(BODY)
        assert [asked for _, asked in web.asked] == ["", "bytes=100000-"]
    assert (tmp_path / "model").read_bytes() == BODY


def test_a_partial_file_longer_than_the_source_is_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "model.part").write_bytes(BODY + b"more")
    (tmp_path / "model.part.validator").write_text('"a"')
    with serving({"/model": BODY}) as web:
        assert get(f"{web.url}/model", tmp_path / "model", size=None, sha256="") == len(BODY)
    assert (tmp_path / "model").read_bytes() == BODY


def test_other_bytes_than_signed_are_refused_and_removed(tmp_path: Path) -> None:
    with serving({"/model": b"y" + BODY[1:]}) as web, pytest.raises(RefusedError) as refused:
        get(f"{web.url}/model", tmp_path / "model")
    assert refused.value.code == "fetch.corrupted"
    assert SHA in refused.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_longer_file_than_signed_is_refused_before_it_fills_the_disk(tmp_path: Path) -> None:
    with serving({"/model": BODY + b"z" * 10_000_000}) as web, pytest.raises(RefusedError) as refused:
        get(f"{web.url}/model", tmp_path / "model")
    assert refused.value.code == "fetch.corrupted"
    assert list(tmp_path.iterdir()) == []


def test_a_shorter_file_than_signed_is_no_success(tmp_path: Path) -> None:
    with serving({"/model": BODY[:1000]}) as web, pytest.raises(OpsctlError) as failed:
        get(f"{web.url}/model", tmp_path / "model")
    assert failed.value.code == "fetch.failed"
    assert not (tmp_path / "model").exists()


def test_what_is_not_there_is_asked_for_once(tmp_path: Path) -> None:
    with serving({}) as web, pytest.raises(OpsctlError) as failed:
        get(f"{web.url}/model", tmp_path / "model")
    assert "404" in failed.value.message
    assert len(web.asked) == 1


def test_a_source_that_is_down_is_given_up(tmp_path: Path) -> None:
    pauses: list[float] = []
    with pytest.raises(OpsctlError) as failed:
        fetch("http://127.0.0.1:9/model", tmp_path / "model", size=1, sha256="", advance=lambda _: None,
              pause=pauses.append)
    assert failed.value.code == "fetch.failed"
    assert 3 <= len(pauses) <= 6


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    pauses: list[float] = []
    with serving({"/model": BODY}) as web, pytest.raises(OpsctlError) as failed:
        fetch(f"{web.url}/model", tmp_path / "none" / "model", size=len(BODY), sha256=SHA, advance=lambda _: None,
              pause=pauses.append)
    assert "No such file" in failed.value.message
    assert pauses == []


SECRETS = ("pass-word", "to-ken", "frag-ment")


@pytest.mark.parametrize("harm", ["not there", "down", "corrupted", "longer"])
def test_no_message_holds_what_a_url_may_hide(tmp_path: Path, harm: str) -> None:
    with serving({"/model?X-Amz=to-ken": BODY}) as web:
        address = "127.0.0.1:9" if harm == "down" else web.url.removeprefix("http://")
        path = "none" if harm == "not there" else "model"
        url = f"http://ann:pass-word@{address}/{path}?X-Amz=to-ken#frag-ment"

        def past_the_login(request: urllib.request.Request) -> Any:  # urllib takes a user for a part of the host's name
            asked = urllib.request.Request(request.full_url.replace("ann:pass-word@", ""))
            response = urllib.request.urlopen(asked)
            response.url = request.full_url
            return response
        with pytest.raises(OpsctlError) as failed:
            fetch(url, tmp_path / "model", size=len(BODY) - (harm == "longer"), sha256="0" * 64,
                  advance=lambda _: None, pause=lambda _: None, open_url=past_the_login)
    assert f"http://{address}/{path} " in failed.value.message
    assert not [secret for secret in SECRETS if secret in failed.value.message + failed.value.hint]
