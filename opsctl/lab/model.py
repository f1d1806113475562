"""Writes a random model that a real engine serves: a llama of noise, in GGUF. It says nothing, at a realistic speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsctl.errors import RefusedError

SEED = 0  # one seed writes the same file every time, so that releases made of it have the same digest


@dataclass(frozen=True)
class Shape:
    """A llama's dimensions; ``context`` in tokens."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    feed_forward: int
    context: int


SHAPES = {
    # 0.5 MB, five tokens a millisecond: answers at once
    "small": Shape(layers=2, hidden=64, heads=4, key_value_heads=2, feed_forward=128, context=4096),
    # 102 MB, 50 streams of 20 tokens a second: slow enough that a drain has something to wait for
    "mid": Shape(layers=8, hidden=512, heads=8, key_value_heads=4, feed_forward=1536, context=8192),
}
LETTERS = [bytes([code]) for code in range(ord("a"), ord("z") + 1)]
VOCABULARY = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256)), "▁".encode(), *LETTERS]


def write_model(path: Path, size: str, seed: int = SEED) -> int:
    """Writes a model of ``size`` (a key of ``SHAPES``); returns its bytes. Another seed is another model of that size.

    Raises:
        RefusedError: the Python packages gguf and numpy are not there.
    """
    try:
        import gguf  # noqa: PLC0415 - only who writes a model needs them
        import numpy  # noqa: PLC0415
    except ImportError as error:
        raise RefusedError("lab.model_needs", f"a random model needs the Python package {error.name}, not there now.",
                           hint="pip install gguf numpy, or import a GGUF file that you have") from None
    shape = SHAPES[size]
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _describe(gguf, writer, shape, size)
    random = numpy.random.default_rng(seed)

    def noise(*dimensions: int) -> Any:
        return (random.standard_normal(dimensions) * 0.05).astype(numpy.float32)

    ones = numpy.ones(shape.hidden, numpy.float32)
    narrow = shape.hidden // shape.heads * shape.key_value_heads
    writer.add_tensor("token_embd.weight", noise(len(VOCABULARY), shape.hidden))
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", noise(len(VOCABULARY), shape.hidden))
    for block in range(shape.layers):
        for name, values in (
            ("attn_norm", ones), ("ffn_norm", ones),
            ("attn_q", noise(shape.hidden, shape.hidden)), ("attn_k", noise(narrow, shape.hidden)),
            ("attn_v", noise(narrow, shape.hidden)), ("attn_output", noise(shape.hidden, shape.hidden)),
            ("ffn_gate", noise(shape.feed_forward, shape.hidden)), ("ffn_up", noise(shape.feed_forward, shape.hidden)),
            ("ffn_down", noise(shape.hidden, shape.feed_forward)),
        ):
            writer.add_tensor(f"blk.{block}.{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path.stat().st_size


def _describe(gguf: Any, writer: Any, shape: Shape, size: str) -> None:
    """The metadata that llama.cpp wants of a llama: dimensions, a byte vocabulary, a chat template."""
    writer.add_name(f"opsctl-random-{size}")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([0.0] * len(VOCABULARY))
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256,
                            *[kinds.NORMAL] * (1 + len(LETTERS))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
