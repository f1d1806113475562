"""The verbs of traffic, from the words of a command line to the document that they answer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from release_kit import Keys, make_host, make_keys

from opsctl.agent import traffic_verbs
from opsctl.agent.paths import Paths
from opsctl.agent.verbs import Act
from opsctl.errors import ConfigurationError


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def host(tmp_path: Path, keys: Keys) -> Paths:
    return make_host(tmp_path / "host", keys)


def says(host: Paths, *words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, act: Act, about: str, *, acts: bool = True, audited: bool = True) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=about)
        one.set_defaults(act=act)
        return one

    traffic_verbs.register(verb)
    arguments = parser.parse_args(words)
    said: dict[str, Any] = arguments.act(host, arguments)
    return said


def test_a_drain_and_its_end(host: Paths) -> None:
    first = says(host, "drain", "chat.0", "--owner", "operator:ann", "--reason", "a fan is loud")
    assert (first["changed"], first["instance"], first["weight"]) == (True, "chat.0", 0)
    assert first["drains"][0]["reason"] == "a fan is loud"
    leased = says(host, "drain", "chat.0", "--owner", "run:r1", "--weight", "20", "--for-s", "60")
    assert leased["changed"]
    assert 0 < leased["drains"][1]["lease_s"] <= 60
    assert not says(host, "drain", "chat.0", "--owner", "run:r1", "--weight", "20", "--for-s", "90")["changed"]
    ended = says(host, "undrain", "chat.0", "--owner", "operator:ann")
    assert (ended["changed"], ended["weight"], len(ended["drains"])) == (True, 20, 1)
    assert not says(host, "undrain", "chat.0", "--owner", "operator:ann")["changed"]
    assert says(host, "undrain", "chat.0", "--owner", "run:r1")["weight"] == 100


@pytest.mark.parametrize("words", [["drain", "chat.9", "--owner", "guard"], ["undrain", "../x", "--owner", "guard"],
                                   ["idle", "chat.9"]])
def test_an_unknown_instance_is_refused(host: Paths, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        says(host, *words)
    assert error.value.code == "instance.unknown"
    assert not list(host.state.rglob("*.json"))


@pytest.mark.parametrize("words", [
    ["--owner", "ann"], ["--owner", "operator:../x"], [], ["--owner", "guard", "--weight", "100"],
    ["--owner", "guard", "--weight", "-1"], ["--owner", "guard", "--for-s", "0"],
    ["--owner", "guard", "--for-s", "inf"], ["--owner", "guard", "--for-s", "nan"],
    ["--owner", "guard", "--for-s", "soon"],
])
def test_words_that_are_refused(host: Paths, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        says(host, "drain", "chat.0", *words)
    assert usage.value.code == 2
    assert not host.drains("chat.0").exists()
    assert "error: " in capsys.readouterr().err
