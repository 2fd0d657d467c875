"""Short fingerprints of arguments, so that equality costs one comparison of bytes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from PIL import Image


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """Fingerprint of dtype, shape and content. On a GPU this waits for the device."""
    plain = tensor.detach().contiguous().cpu()
    digest = hashlib.blake2b(f"{plain.dtype}{tuple(plain.shape)}".encode(), digest_size=16)
    digest.update(plain.view(torch.uint8).numpy() if plain.dim() else plain.reshape(1).view(torch.uint8).numpy())
    return digest.digest()


class DigestMemo:
    """Digests of one job's tensors, each taken once per object: a comparison on the GPU is a synchronisation.

    Holds the tensors it knows, so that an id is never met again under another object; forgets the oldest.
    """

    def __init__(self, capacity: int = 64) -> None:
        self._known: OrderedDict[tuple[int, int], tuple[torch.Tensor, bytes]] = OrderedDict()
        self._capacity = capacity

    def __call__(self, tensor: torch.Tensor, row: int | None = None) -> bytes:
        """Return the digest of the tensor, or of one of its rows along axis 0."""
        key = (id(tensor), -1 if row is None else row)
        known = self._known.get(key)
        if known is not None:
            return known[1]
        digest = tensor_digest(tensor if row is None else tensor[row])
        self._known[key] = (tensor, digest)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return digest


class Unhashable(Exception):
    """An argument of a kind whose value cannot be compared; the call is not stacked and not remembered."""


def value_key(value: Any, digest: DigestMemo) -> Any:
    """Return a hashable stand-in that is equal exactly when the values are.

    Raises Unhashable for objects of unknown kinds.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        return (type(value).__name__, value)
    if isinstance(value, torch.Tensor):
        return digest(value)
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, Image.Image):
        return (value.mode, value.size, value.tobytes())
    if isinstance(value, list | tuple):
        return (type(value).__name__, *(value_key(item, digest) for item in value))
    if isinstance(value, dict):
        return tuple((key, value_key(item, digest)) for key, item in value.items())
    raise Unhashable(type(value).__name__)
