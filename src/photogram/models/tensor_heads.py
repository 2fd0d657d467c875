"""What a safetensors file holds and where in it, from its head; no weight is read.

A file begins with the length of its head (8 bytes, little endian) and the head itself: JSON with each tensor's dtype,
shape and bytes after the head (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..core.errors import ConfigError

STORED_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by the format's names."""

_MOST_HEAD_BYTES = 100_000_000


class Stored(NamedTuple):
    """One tensor in a file: its dtype in the format's words, its shape, and its bytes from `begin` on."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    @property
    def count(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


def read_head(file: Path) -> dict[str, Stored]:
    """Return the tensors of a file by name. Raises ConfigError where it is no safetensors file."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= _MOST_HEAD_BYTES:
                raise ValueError("no head")
            head = json.loads(stream.read(length))
        found: dict[str, Stored] = {}
        for name, entry in head.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = Stored(entry["dtype"], tuple(map(int, entry["shape"])), 8 + length + begin, end - begin)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"'{file.name}' of '{file.parent.name}' cannot be loaded: it is no safetensors file ({error})."
        ) from None
