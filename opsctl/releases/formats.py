"""Which files may be in a release. Weights are safetensors or GGUF; what runs code when it is loaded is refused.

Pickle is refused by name and by what the file begins with, under any name. Header checks are cheap and necessary, and
never enough: only the signed hashes tell that a body is whole.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import IO, Any

from opsctl.errors import RefusedError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
PICKLE_MAGIC = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04", re.DOTALL)  # a zip is what torch.save writes
TEXT_SUFFIXES = (".txt", ".md", ".jinja", ".jinja2", ".tiktoken", ".yaml", ".yml")
BINARY_SUFFIXES = (".model",)  # SentencePiece
TEXT_NAMES = ("LICENSE", "NOTICE", "README", "USE_POLICY")
ALLOWED = "json, txt, md, jinja, tiktoken, yaml, tokenizer.model, safetensors, gguf"
CONVERT = "convert it to safetensors or GGUF on a machine that may run its code, then import that"
SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes; the limit of the format's own library
GGUF_LIMIT = 1 << 24  # tensors, keys or array elements: far above what models have, far below what exhausts memory
GGUF_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type; gguf.md
GGUF_STRING, GGUF_ARRAY = 8, 9


class MalformedError(Exception):
    """A header that contradicts itself; the text says how."""


def check_name(path: str) -> None:
    """Raises RefusedError when a file of this name may not be in a release."""
    name = PurePosixPath(path).name
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise _pickle(path, f"{suffix} files are pickles, which run code when they are loaded")
    if suffix in (".py", ".pyc", ".so", ".sh", ".ipynb"):
        raise RefusedError("release.code", f"{path} is code, and a release carries none.",
                           hint="leave it out of the directory; models that need it are not served")
    known = suffix in (".json", ".safetensors", ".gguf", *TEXT_SUFFIXES, *BINARY_SUFFIXES)
    if not known and not name.upper().startswith(TEXT_NAMES):
        raise RefusedError("release.unknown_format", f"{path} is no file that a release may carry.",
                           hint=f"allowed are {ALLOWED}; leave it out of the directory")


def check_content(path: str, file: IO[bytes], size: int) -> None:
    """Looks into a file of ``size`` bytes; reads headers only, and JSON as a whole.

    Raises:
        RefusedError: a pickle under another name, or a header that cannot be right.
    """
    suffix = PurePosixPath(path).suffix.lower()
    head = file.read(4)
    file.seek(0)
    if size == 0:
        raise _malformed(path, "it is empty")
    try:
        if suffix == ".safetensors":
            _check_safetensors(file, size)
        elif suffix == ".gguf":
            _check_gguf(file, size)
        elif suffix == ".json":
            json.load(file)
    except MalformedError as error:
        if PICKLE_MAGIC.match(head):
            raise _pickle(path, "it begins as a pickle does") from None
        raise _malformed(path, str(error)) from None
    except (ValueError, RecursionError):
        if PICKLE_MAGIC.match(head):
            raise _pickle(path, "it begins as a pickle does") from None
        raise _malformed(path, "it is not JSON") from None
    # The first bytes of safetensors are a length and may look like anything; their header was checked above.
    if suffix not in (".safetensors", ".gguf") and PICKLE_MAGIC.match(head):
        raise _pickle(path, "it begins as a pickle does")


def check_index(paths: Sequence[str], index_path: str, index: Any) -> None:
    """A ``*.safetensors.index.json`` names shards that are there.

    Raises:
        RefusedError: one is missing.
    """
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict):
        raise _malformed(index_path, "it has no weight_map")
    folder = PurePosixPath(index_path).parent
    for shard in sorted(set(map(str, weights.values()))):
        if str(folder / shard) not in paths:
            raise RefusedError("release.incomplete", f"{index_path} names {shard}, which is not there.",
                               hint="the download is not complete: fetch the model again")


def _check_safetensors(file: IO[bytes], size: int) -> None:
    """The format's README: 8 bytes of length, a JSON header, then tensors without gap or overlap to the last byte."""
    if size < 8:
        raise MalformedError("it is shorter than a safetensors header")
    length = struct.unpack("<Q", file.read(8))[0]
    if length > SAFETENSORS_HEADER_LIMIT or 8 + length > size:
        raise MalformedError(f"its safetensors header says {length} bytes, the file has {size}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise MalformedError("its safetensors header is not JSON") from None
    if not isinstance(header, dict):
        raise MalformedError("its safetensors header is not a table")
    end = 0
    for begin, until in sorted(_offsets(entry) for name, entry in header.items() if name != "__metadata__"):
        if begin != end or until < begin:
            raise MalformedError("its tensors overlap or leave a gap")
        end = until
    if 8 + length + end != size:
        raise MalformedError(f"its tensors need {8 + length + end} bytes, the file has {size}")


def _offsets(entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, Mapping) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(isinstance(number, int) for number in offsets):
        raise MalformedError("a tensor in its header has no offsets")
    return offsets[0], offsets[1]


def _check_gguf(file: IO[bytes], size: int) -> None:
    """ggml's gguf.md: magic, version, counts, keys, tensor descriptions; every tensor begins inside the file."""
    if file.read(4) != b"GGUF":
        raise MalformedError("it does not begin with GGUF")
    version = _number(file, "<I")
    if version not in (2, 3):
        raise MalformedError(f"its GGUF version {version} is not 2 or 3")
    tensors, keys = _number(file, "<Q"), _number(file, "<Q")
    if tensors > GGUF_LIMIT or keys > GGUF_LIMIT:
        raise MalformedError(f"its header says {tensors} tensors and {keys} keys")
    alignment = 32
    for _ in range(keys):
        name = _text(file, size)
        kind = _number(file, "<I")
        if name == b"general.alignment" and kind == 4:
            alignment = _number(file, "<I") or 32
        else:
            _skip_value(file, kind, size)
    last = 0
    for _ in range(tensors):
        _text(file, size)
        _skip(file, 8 * _number(file, "<I"), size)
        _number(file, "<I")
        last = max(last, _number(file, "<Q"))
    start = -(-file.tell() // alignment) * alignment
    if tensors and start + last >= size:
        raise MalformedError(f"its last tensor begins at byte {start + last}, the file has {size}: it was cut off")


def _number(file: IO[bytes], layout: str) -> int:
    data = file.read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise MalformedError("it ends inside its header")
    value: int = struct.unpack(layout, data)[0]
    return value


def _text(file: IO[bytes], size: int) -> bytes:
    length = _number(file, "<Q")
    if length > size:
        raise MalformedError("a name in its header is longer than the file")
    return file.read(length)


def _skip(file: IO[bytes], count: int, size: int) -> None:
    if file.tell() + count > size:
        raise MalformedError("it ends inside its header")
    file.seek(count, 1)


def _skip_value(file: IO[bytes], kind: int, size: int) -> None:
    if kind in GGUF_SCALARS:
        _skip(file, GGUF_SCALARS[kind], size)
    elif kind == GGUF_STRING:
        _skip(file, _number(file, "<Q"), size)
    elif kind == GGUF_ARRAY:
        inner, count = _number(file, "<I"), _number(file, "<Q")
        if count > GGUF_LIMIT:
            raise MalformedError(f"a list in its header has {count} entries")
        if inner in GGUF_SCALARS:
            _skip(file, count * GGUF_SCALARS[inner], size)
        elif inner == GGUF_STRING:
            for _ in range(count):
                _skip(file, _number(file, "<Q"), size)
        else:
            raise MalformedError(f"a list in its header has entries of unknown type {inner}")
    else:
        raise MalformedError(f"a key in its header has the unknown type {kind}")


def _pickle(path: str, why: str) -> RefusedError:
    return RefusedError("release.pickle", f"{path} is refused: {why}.", hint=CONVERT)


def _malformed(path: str, why: str) -> RefusedError:
    return RefusedError("release.malformed", f"{path} is damaged: {why}.", hint="fetch the file again from its source")
