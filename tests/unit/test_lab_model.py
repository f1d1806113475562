"""The random model is a GGUF that a reader takes, the same each time."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from opsctl.errors import RefusedError
from opsctl.lab.model import SHAPES, write_model

DIGEST = "c328a5dccc8d6facf640de953adceb88586e330d9749b0c303e99b54794bcf78"  # of the small model, seed 0


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


def test_another_seed_is_another_model_of_the_same_shape(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    sizes = [write_model(tmp_path / f"{seed}.gguf", "small", seed) for seed in (0, 1)]
    assert sizes[0] == sizes[1]
    assert (tmp_path / "0.gguf").read_bytes() != (tmp_path / "1.gguf").read_bytes()


def test_the_default_model_is_that_of_earlier_labs(tmp_path: Path) -> None:
    """A release made of it keeps its digest: whoever imports it again has nothing to do."""
    pytest.importorskip("gguf")
    write_model(tmp_path / "a.gguf", "small")
    assert hashlib.sha256((tmp_path / "a.gguf").read_bytes()).hexdigest() == DIGEST


def test_what_writing_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RefusedError, match="gguf") as caught:
        write_model(tmp_path / "x.gguf", "small")
    assert caught.value.code == "lab.model_needs"
    assert "pip install" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
