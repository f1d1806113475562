"""The random model is a GGUF that a reader takes, the same each time."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from opsctl.errors import RefusedError
from opsctl.lab.model import SHAPES, write_model


def test_a_small_model_is_read_back_and_always_the_same(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    digests = set()
    for name in ("a.gguf", "b.gguf"):
        count = write_model(tmp_path / name, "small")
        assert count == (tmp_path / name).stat().st_size < 1_000_000
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("llama.context_length").contents() == SHAPES["small"].context
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_what_writing_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RefusedError, match="gguf") as caught:
        write_model(tmp_path / "x.gguf", "small")
    assert caught.value.code == "lab.model_needs"
    assert "pip install" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
