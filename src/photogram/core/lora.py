"""What the worker tells of LoRAs: which it has loaded, and where each one is applied.

A *LoRA* here is one file of low-rank changes (or another kind that diffusers and peft convert); a *module* is a
network of the pipeline by its component's name: ``transformer``, ``transformer_2``, ``unet``, ``text_encoder``.
"""

from __future__ import annotations

import msgspec


class AppliedLora(msgspec.Struct, frozen=True, kw_only=True):
    """One LoRA of the active set on one module."""

    nickname: str
    path: str
    strength: float
    merged: bool
    num_lora_layers_with_weights: int


class LoadedLora(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA in the worker's memory. `num_layers` counts the layers it changes, by the module they belong to."""

    nickname: str
    path: str
    size_bytes: int
    rank: int  # the largest; 0 where the kind has none
    num_layers: dict[str, int]


class LoraState(msgspec.Struct, frozen=True, kw_only=True):
    """`active`: by module, in the order of merging; a LoRA that fits no module of its target is in none of them."""

    active: dict[str, tuple[AppliedLora, ...]] = {}
    loaded: tuple[LoadedLora, ...] = ()
