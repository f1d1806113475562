"""Writes a random model as a directory of safetensors, as vLLM serves it: a llama of noise, a tokenizer of bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from opsctl.errors import RefusedError
from opsctl.lab.model import SEED, Shape

# Heads of 64: the smallest that every attention kernel of every engine takes. 17 MB, answers at once.
SHAPE = Shape(layers=2, hidden=256, heads=4, key_value_heads=2, feed_forward=512, context=2048)
SPECIAL = ("<unk>", "<s>", "</s>")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_model_directory(directory: Path, shape: Shape = SHAPE) -> None:
    """Writes config, tokenizer and weights of ``shape`` into a new directory; the same bytes every time.

    Raises:
        RefusedError: the Python package numpy is not there.
    """
    try:
        import numpy  # noqa: PLC0415 - only who writes a model needs it
    except ImportError:
        raise RefusedError("lab.model_needs", "a random model needs the Python package numpy, not there now.",
                           hint="pip install numpy, or import a model that you have") from None
    directory.mkdir(parents=True)
    vocabulary = {text: number for number, text in enumerate((*SPECIAL, *_byte_letters()))}
    for name, content in (("config.json", _config(shape, len(vocabulary))), ("tokenizer.json", _tokenizer(vocabulary)),
                          ("tokenizer_config.json", _tokenizer_config(shape))):
        (directory / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    random = numpy.random.default_rng(SEED)
    tensors = {}
    for name, dimensions in _tensors(shape, len(vocabulary)).items():
        values = numpy.ones(dimensions) if len(dimensions) == 1 else random.standard_normal(dimensions) * 0.05
        tensors[name] = (dimensions, values.astype(numpy.float32).tobytes())
    _write_safetensors(directory / "model.safetensors", tensors)


def _write_safetensors(path: Path, tensors: dict[str, tuple[tuple[int, ...], bytes]]) -> None:
    """The format's README: 8 bytes of length, a JSON header, then tensors without gap."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dimensions, content) in tensors.items():
        header[name] = {"dtype": "F32", "shape": dimensions, "data_offsets": (end, end + len(content))}
        end += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, content in tensors.values():
            file.write(content)


def _tensors(shape: Shape, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and dimensions as transformers' Llama has them."""
    narrow = shape.hidden // shape.heads * shape.key_value_heads
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        for name, dimensions in (
            ("input_layernorm", (shape.hidden,)), ("post_attention_layernorm", (shape.hidden,)),
            ("self_attn.q_proj", (shape.hidden, shape.hidden)), ("self_attn.k_proj", (narrow, shape.hidden)),
            ("self_attn.v_proj", (narrow, shape.hidden)), ("self_attn.o_proj", (shape.hidden, shape.hidden)),
            ("mlp.gate_proj", (shape.feed_forward, shape.hidden)), ("mlp.up_proj", (shape.feed_forward, shape.hidden)),
            ("mlp.down_proj", (shape.hidden, shape.feed_forward)),
        ):
            tensors[f"model.layers.{layer}.{name}.weight"] = dimensions
    return {**tensors, "model.norm.weight": (shape.hidden,), "lm_head.weight": (vocabulary, shape.hidden)}


def _config(shape: Shape, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "hidden_size": shape.hidden, "intermediate_size": shape.feed_forward, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.hidden // shape.heads, "max_position_embeddings": shape.context, "vocab_size": vocabulary,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    }


def _byte_letters() -> list[str]:
    """GPT-2's alphabet: a printable character for each of the 256 bytes, in the order of the bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _tokenizer(vocabulary: dict[str, int]) -> dict[str, Any]:
    """A tokenizer that knows bytes and no merges: one token a byte."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for number, text in enumerate(SPECIAL)],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": SPECIAL[0], "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
                  "merges": []},
    }


def _tokenizer_config(shape: Shape) -> dict[str, Any]:
    unknown, begin, end = SPECIAL
    return {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": unknown, "bos_token": begin, "eos_token": end,
            "pad_token": end, "model_max_length": shape.context, "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE}
