"""Remembers what text and image encoders answered, so that a prompt seen before does not wake them.

Kept are only the fields and layers that the pipeline read: the whole output of a language model holds its logits and
every layer's hidden state, 250 MB for 8 MB of embeddings in FLUX.2 klein. What was not kept and is read after all is
computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
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
        return sum(size_bytes(layer) for layer in tuple.__iter__(value))
    if isinstance(value, dict):
        return size_bytes(list(value.values()))
    if isinstance(value, list | tuple):
        return sum(size_bytes(item) for item in value)
    return 0


class Layers(tuple[Any, ...]):
    """A tuple of layers that notes which are read; a layer that is missing is asked for anew.

    Code below Python, such as `torch.stack`, reads the tuple itself, and nothing is noted. So where no reading was
    noted all are kept.
    """

    read: set[int]
    _missing: Callable[[int], Any]
    _asked_again: dict[int, Any]

    def __new__(cls, layers: Iterable[Any], missing: Callable[[int], Any]) -> Layers:
        made = super().__new__(cls, layers)
        made.read, made._missing, made._asked_again = set(), missing, {}
        return made

    def pruned(self) -> Layers:
        """Return the layers with None for those that nobody read."""
        if not self.read:
            return self
        layers = enumerate(super().__iter__())
        kept = Layers((layer if index in self.read else None for index, layer in layers), self._missing)
        kept.read = self.read
        return kept

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(index)
        self.read.add(position)
        layer = super().__getitem__(position)
        if layer is not None:
            return layer
        if position not in self._asked_again:
            self._asked_again[position] = self._missing(position)
        return self._asked_again[position]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


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
                self.fields[name] = Layers(value, self._missing_layer(name))

    def prune(self) -> PartialOutput:
        """Drop every field and layer that nobody read so far."""
        self.fields = {
            name: value.pruned() if isinstance(value, Layers) else value
            for name, value in self.fields.items()
            if name in self._read
        }
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
