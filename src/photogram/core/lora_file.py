"""LoRA files, judged by their header alone: safetensors, within bounds, and weights of a LoRA inside.

Reads the header and no tensor, so that a hostile file costs nothing; knows nothing of any model. The format: eight
bytes with the header's length (little-endian), that many bytes of JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from .errors import RequestError

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 65_536
MAX_NDIM = 8
MAX_RANK = 4096
SUFFIX = ".safetensors"

_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# What other things begin with, for an error that says what the file is.
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive (PyTorch's pickle format)"),
    (b"\x80", "a pickle"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves"),
    (b"<", "a web page"),
    (b"{", "JSON"),
)
# diffusers and PEFT, kohya, XLabs, LoHa, LoKr, full differences, DoRA, OFT: every format has one of these in its keys.
_WEIGHT_KEY = re.compile(r"lora|hada_w|lokr_w|\.diff(_b)?$|dora_scale|oft_", re.IGNORECASE)
_DOWN_KEY = re.compile(r"(?:lora_A|lora_down|lora\d*\.down|hada_w\d_b|lokr_w\d_b)(?:\.[\w-]+)*$")
"""The matrix whose first side is the rank."""


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor of a header; `data_offsets` are its first byte and the one after its last, behind the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class LoraHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a LoRA file says of itself. `rank` is its largest; 0 where no matrix has one."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    rank: int
    size_bytes: int


def open_lora(path: str | Path, *, shown: str, param: str | None) -> BinaryIO:
    """Open a regular file for reading; anything else (a folder, a pipe, a device) is refused without waiting for it.

    Raises RequestError, which names the file as `shown`.
    """
    try:
        # Opening a pipe would else wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RequestError(f"LoRA '{shown}' cannot be read: {reason}.", param=param, code="lora_not_found") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RequestError(f"LoRA '{shown}' is not a regular file.", param=param, code="invalid_lora")
    return os.fdopen(descriptor, "rb")


def read_header(file: BinaryIO, *, shown: str, max_bytes: int, param: str | None = None) -> LoraHeader:
    """Return the checked header of an open file; the file then stands at the first tensor.

    Raises RequestError with code ``invalid_lora`` and a sentence that names the file as `shown`.
    """
    try:
        return _read(file, max_bytes)
    except _Refused as refused:
        message = f"LoRA '{shown}' {refused}."
    except OSError as error:
        message = f"LoRA '{shown}' cannot be read: {error.strerror}."
    raise RequestError(message, param=param, code="invalid_lora")


class _Refused(Exception):
    """Why a file is none; the rest of a sentence that begins with its name."""


def _read(file: BinaryIO, max_bytes: int) -> LoraHeader:
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise _Refused(f"has {size} bytes; at most {max_bytes} are allowed (--max-lora-mb)")
    start = file.read(32)
    if start[8:9] != b"{":
        for signature, what in _OTHER_FORMATS:
            if start.startswith(signature):
                raise _Refused(f"is {what}; only safetensors files are loaded")
        raise _Refused("is no safetensors file")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _Refused(f"has a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if length > size - 8:
        raise _Refused(f"is cut off: its header has {length} bytes, the file {size}")
    file.seek(8)
    tensors, metadata = _parse(file.read(length))
    _check_layout(tensors, size - 8 - length)
    return LoraHeader(tensors=tensors, metadata=metadata, rank=_check_weights(tensors), size_bytes=size)


def _parse(header: bytes) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    try:
        # Not msgspec's decoder, which takes the last of two equal names in silence.
        entries = json.loads(header.decode(), object_pairs_hook=_without_repeats)
        metadata = msgspec.convert(entries.pop("__metadata__", {}) or {}, dict[str, str])
        if len(entries) > MAX_TENSORS:
            raise _Refused(f"has {len(entries)} tensors; at most {MAX_TENSORS} are allowed")
        "".join((*entries, *metadata, *metadata.values())).encode()  # refuses lone surrogates
        return msgspec.convert(entries, dict[str, TensorEntry]), metadata
    except (ValueError, RecursionError) as error:
        reason = re.sub(r"[^ -~]", "?", str(error)).rstrip(".")
        raise _Refused(f"has a header that cannot be read ({reason})") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise _Refused("names something twice in its header")
    return named


def _check_layout(tensors: dict[str, TensorEntry], data_bytes: int) -> None:
    """Hold each tensor's bytes to its shape, and all of them to the file: no gap, no overlap, nothing behind."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        item_bytes = _ITEM_BYTES.get(tensor.dtype)
        if item_bytes is None:
            raise _Refused(f"has a tensor {_shown(name)} of unknown type {_shown(tensor.dtype)}")
        if len(tensor.shape) > MAX_NDIM or any(side < 1 for side in tensor.shape):
            raise _Refused(f"has a tensor {_shown(name)} of shape {_shown(str(list(tensor.shape)))}")
        first, after = tensor.data_offsets
        if first != end or after - first != math.prod(tensor.shape) * item_bytes:
            raise _Refused(f"is damaged: the bytes of {_shown(name)} are not where its header says")
        end = after
    if end != data_bytes:
        what = "is cut off" if end > data_bytes else "has more bytes than its header says"
        raise _Refused(f"{what}: {end} bytes of tensors, {data_bytes} in the file")


def _check_weights(tensors: dict[str, TensorEntry]) -> int:
    """Return the largest rank. Raises _Refused for what is no LoRA, or none that would be loaded."""
    if not any(_WEIGHT_KEY.search(name) for name in tensors):
        holds = f"no LoRA weights (such as {_shown(next(iter(tensors)))})" if tensors else "nothing"
        raise _Refused(f"holds {holds}")
    rank = 0
    for name, tensor in tensors.items():
        # Whole numbers are fine for the odd scalar (alpha, a training step), not for weights.
        if tensor.dtype not in _FLOATS and math.prod(tensor.shape) > 1 and _WEIGHT_KEY.search(name):
            raise _Refused(f"has weights {_shown(name)} of type {tensor.dtype}; only floating-point ones are loaded")
        if len(tensor.shape) > 1 and _DOWN_KEY.search(name):
            if tensor.shape[0] > MAX_RANK:
                raise _Refused(f"has rank {tensor.shape[0]} ({_shown(name)}); at most {MAX_RANK} is allowed")
            rank = max(rank, tensor.shape[0])
    return rank


def _shown(name: str) -> str:
    """A name of the file's own, as an error may quote it."""
    text = re.sub(r"[^ -~]", "?", name)
    return f"'{text}'" if len(text) <= 100 else f"'{text[:97]}...'"
