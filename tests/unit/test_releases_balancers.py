"""A hook of the operator's as load balancer: called with plain words, believed in numbers, its failures told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from opsctl.errors import ConfigurationError, PausedError
from opsctl.fleet.model import Fleet, Host
from opsctl.releases.balancers import Hook, Nobody, balancers


def fleet(directory: Path, hook: str = "hooks/balancer") -> Fleet:
    host = Host("gpu-1", "192.0.2.1", ("gpu", "gateway"), variables={"load_balancer_hook": hook} if hook else {})
    return Fleet(directory, directory / "inventory.ini", (host,), (), load_balancer="hook")


def script(directory: Path, body: str) -> None:
    path = directory / "hooks" / "balancer"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\necho \"$@\" >>{directory}/called\n{body}\n")
    path.chmod(0o755)


def test_a_hook_is_called_with_a_word_and_a_server(tmp_path: Path) -> None:
    script(tmp_path, '[ "$1" != sessions ] || echo 7')
    hook = balancers(fleet(tmp_path))
    assert isinstance(hook, Hook)
    hook.drain("gpu-1.chat.0")
    assert hook.open_sessions("gpu-1.chat.0", 2) == (7, ())
    hook.undrain("gpu-1.chat.0")
    assert (tmp_path / "called").read_text().splitlines() == [
        "drain gpu-1.chat.0", "sessions gpu-1.chat.0", "undrain gpu-1.chat.0"]


@pytest.mark.parametrize(("body", "said"), [
    ("echo many", "'many', not a number"),
    ("exit 3", "ended with 3"),
    ("true", "'', not a number"),
])
def test_a_hook_that_fails_pauses_the_rollout(tmp_path: Path, body: str, said: str) -> None:
    script(tmp_path, body)
    with pytest.raises(PausedError, match="hooks/balancer sessions") as paused:
        balancers(fleet(tmp_path)).open_sessions("gpu-1.chat.0", 2)
    assert said in paused.value.message


@pytest.mark.parametrize(("hook", "said"), [("", "names no executable"), ("hooks/none", "there is no")])
def test_a_hook_that_is_not_there_is_a_matter_of_the_inventory(tmp_path: Path, hook: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        balancers(fleet(tmp_path, hook))


def test_without_a_load_balancer_nobody_is_asked(tmp_path: Path) -> None:
    nobody = balancers(replace(fleet(tmp_path), load_balancer="none"))
    assert isinstance(nobody, Nobody)
    assert nobody.open_sessions("gpu-1.chat.0", 2) == (0, ())
    assert nobody.lacking("gpu-1.chat.0", 2) == ()
