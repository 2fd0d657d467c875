"""Remembers what text and image encoders answered, so that a prompt seen before does not wake them.

Kept are only the fields and layers that the pipeline read: the whole output of a language model holds its logits and
every layer's hidden state, 250 MB for 8 MB of embeddings in FLUX.2 klein. What was not kept and is read after all is
computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import ModelOutput

from .digest import DigestMemo, Unhashable, value_key
from .fibers import Call, Fiber

_REMEMBERED_METHODS = frozenset({"forward", "get_image_features", "get_text_features"})


class PromptCache:
    """Least recently used answers of encoders, bounded in bytes. 0 bytes: nothing is kept."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.size_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self._answers: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def key(self, call: Call) -> Hashable | None:
        """Return what identifies a call's answer: encoder and its LoRAs, method, every argument's value.

        None: not to be kept.
        """
        # `generate` may draw at random, and a VAE's `encode` answers with a distribution.
        if not self.capacity_bytes or not call.remembered or call.method not in _REMEMBERED_METHODS:
            return None
        try:
            arguments = call.module.signatures[call.method].bind(*call.args, **call.kwargs).arguments
            return (
                call.module.name,
                call.method,
                call.autocast,
                tuple(loras.key for loras, _ in call.loras),
                # A memo of its own: these tensors are new in every job.
                tuple((name, value_key(value, DigestMemo())) for name, value in arguments.items()),
            )
        except Unhashable:
            return None

    def get(self, key: Hashable) -> Any | None:
        """Return the remembered answer, or None."""
        found = self._answers.get(key)
        if found is None:
            self.num_misses += 1
            return None
        self._answers.move_to_end(key)
        self.num_hits += 1
        return found[0]

    def put(self, key: Hashable, answer: Any) -> None:
        """Keep what was read of an answer, and forget the oldest ones beyond the bound."""
        if isinstance(answer, PartialOutput):
            answer.prune()
        size = size_bytes(answer)
        if size > self.capacity_bytes or key in self._answers:
            return
        self._answers[key] = (answer, size)
        self.size_bytes += size
        while self.size_bytes > self.capacity_bytes:
            _, (_, freed) = self._answers.popitem(last=False)
            self.size_bytes -= freed


def readable(call: Call, answer: Any) -> Any:
    """Return an encoder's answer in a form that notes what the pipeline reads of it."""
    if not isinstance(answer, ModelOutput):
        return answer

    def recompute() -> dict[str, Any]:
        fiber = Fiber.current()
        again = replace(call, remembered=False)
        if fiber is None:
            return dict(call.module.run(again, "prompt-cache"))
        return dict(fiber.suspend(again))

    return PartialOutput(dict(answer), recompute)


def size_bytes(value: Any) -> int:
    """Return the bytes of all tensors in an answer; views count as what they show."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, PartialOutput):
        return size_bytes(list(value.fields.values()))
    if isinstance(value, Layers):
        return size_bytes(list(value.kept.values()))
    if isinstance(value, dict):
        return size_bytes(list(value.values()))
    if isinstance(value, list | tuple):
        return sum(size_bytes(item) for item in value)
    return 0


class Layers:
    """A tuple of layers of which some are kept; a layer that is missing is asked for anew."""

    def __init__(self, layers: dict[int, Any], length: int, missing: Callable[[int], Any]) -> None:
        self.kept = layers
        self.read: set[int] = set()
        self._length = length
        self._missing = missing

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(self._length)))
        position = index + self._length if index < 0 else index
        if not 0 <= position < self._length:
            raise IndexError(index)
        self.read.add(position)
        if position not in self.kept:
            self.kept[position] = self._missing(position)
        return self.kept[position]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self._length))


class PartialOutput:
    """An encoder's output that knows which of its fields were read, and after `prune` holds only those.

    Reads like the model output it stands for: by attribute, by name, by position.
    """

    def __init__(self, output: dict[str, Any], recompute: Callable[[], dict[str, Any]]) -> None:
        self.names = tuple(output)
        self.fields: dict[str, Any] = {}
        self._read: set[str] = set()
        self._recompute = recompute
        for name, value in output.items():
            self.fields[name] = value
            if isinstance(value, tuple) and value and all(isinstance(layer, torch.Tensor) for layer in value):
                self.fields[name] = Layers(dict(enumerate(value)), len(value), self._missing_layer(name))

    def prune(self) -> PartialOutput:
        """Drop every field and layer that nobody read so far."""
        self.fields = {name: value for name, value in self.fields.items() if name in self._read}
        for value in self.fields.values():
            if isinstance(value, Layers):
                value.kept = {index: layer for index, layer in value.kept.items() if index in value.read}
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.names:
            if name in _MODEL_OUTPUT_FIELDS:
                return None
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, slice):
            return tuple(self[name] for name in self.names[key])
        name = key if isinstance(key, str) else self.names[key]
        if name not in self.names:
            raise KeyError(name)
        self._read.add(name)
        if name not in self.fields:
            self.fields[name] = self._recompute()[name]
        return self.fields[name]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Any]:
        return (self[name] for name in self.names)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self)

    def _missing_layer(self, name: str) -> Callable[[int], Any]:
        return lambda index: self._recompute()[name][index]


# Fields that encoders' outputs have and may leave empty; a model output answers None for them.
_MODEL_OUTPUT_FIELDS = frozenset({"hidden_states", "attentions", "pooler_output", "past_key_values", "loss", "logits"})
