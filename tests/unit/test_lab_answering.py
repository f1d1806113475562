"""Which release answered a stream, from what its instance said before, during and after."""

from __future__ import annotations

import json

import pytest

from opsctl.lab.answering import Spoken, longest, release_of

OLD, NEW = "v1-aaaaaaaaaaaa", "v2-bbbbbbbbbbbb"
SPOKEN = Spoken([1.0, 2.0, 3.0, 9.0, 10.0], [OLD, OLD, OLD, NEW, NEW])  # it was silent while it changed


@pytest.mark.parametrize(("since", "until", "release"), [
    (1.5, 2.5, OLD),
    (0.1, 1.5, OLD),
    (2.2, 2.4, OLD),  # nothing was said, and before and after agree
    (3.1, 3.4, ""),  # before and after differ
    (9.5, 20.0, NEW),
    (10.5, 20.0, NEW),  # nothing was said since
    (0.1, 0.2, OLD),
    (2.5, 9.5, ""),  # two in one stream: cannot be
])
def test_the_release_of_a_stream(since: float, until: float, release: str) -> None:
    assert SPOKEN.during(since, until) == release


def test_an_instance_that_never_spoke() -> None:
    assert Spoken().during(0.0, 9.0) == ""
    assert Spoken().last == ""


@pytest.mark.parametrize(("models", "release", "length"), [
    ([{"id": "chat", "aliases": ["chat", f"chat@{OLD}"], "meta": {"n_ctx": 512}}], OLD, 512),
    ([{"id": "chat", "max_model_len": 4096}, {"id": f"chat@{NEW}", "max_model_len": 4096}], NEW, 4096),
    ([{"id": "other", "meta": None}], "", 0),
    ([], "", 0),
])
def test_what_models_say(models: list[object], release: str, length: int) -> None:
    answer = json.dumps({"object": "list", "data": models}).encode()
    assert release_of(answer, "chat") == release
    assert longest(answer) == length
