"""One loaded LoRA: its changes by module and parameter, checked against the model it is for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.utils.other import get_pattern_key

from ...core.lora_file import MAX_RANK
from .changes import Change, Changes, Difference, Hadamard, Kronecker, LowRank, Replacement
from .conversion import convert
from .names import LayerNames
from .reading import LoraFile, Stamp, refused

_versions = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """A LoRA in memory. `version` is new for every loading, so that two states of one file are never mistaken."""

    nickname: str
    path: str
    stamp: Stamp
    changes: Mapping[str, Changes]  # by module
    size_bytes: int
    version: int = field(default_factory=lambda: next(_versions))

    @property
    def rank(self) -> int:
        return max((change.rank for part in self.changes.values() for change in part.values()), default=0)

    def num_layers(self) -> dict[str, int]:
        return {module: count_layers(part) for module, part in self.changes.items()}


def count_layers(changes: Changes) -> int:
    """Count layers: a weight and its bias are one."""
    return len({name.rpartition(".")[0] for name in changes})


def build(nickname: str, path: str, file: LoraFile, pipeline: DiffusionPipeline, names: LayerNames) -> Adapter:
    """Make an adapter of a file's content. Raises RequestError naming what does not fit the model."""
    parts = convert(file.tensors, pipeline, names, path)
    changes: dict[str, dict[str, Change]] = {}
    for (module, layer), tensors in parts.items():
        owner = pipeline.components[module].get_submodule(layer)
        where = f"LoRA '{path}': {module}.{layer}"
        scale = _Scale(_settings_of(module, file.settings), layer, tensors.pop("alpha", None))
        for parameter, change in _changes(tensors, scale, where).items():
            _check(owner, parameter, change, f"{where}.{parameter}")
            changes.setdefault(module, {})[f"{layer}.{parameter}"] = change
    size_bytes = sum(tensor.nbytes for tensor in file.tensors.values())
    return Adapter(nickname=nickname, path=path, stamp=file.stamp, changes=changes, size_bytes=size_bytes)


def _settings_of(module: str, settings: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    return settings.get(module) or settings.get("", {})


@dataclass(frozen=True, slots=True)
class _Scale:
    """How much a layer's product counts: alpha over rank, by the layer's own alpha or by the file's settings."""

    settings: Mapping[str, Any]
    layer: str
    alpha: torch.Tensor | None

    def __call__(self, rank: int) -> float:
        alpha = float(self.alpha) if self.alpha is not None else self._configured(rank)
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _configured(self, rank: int) -> float:
        pattern = self.settings.get("alpha_pattern") or {}
        value = pattern.get(get_pattern_key(pattern.keys(), self.layer), self.settings.get("lora_alpha"))
        return float(rank if value is None else value)


def _changes(tensors: dict[str, torch.Tensor], scale: _Scale, where: str) -> dict[str, Change]:
    """Return the changes of one layer's parameters from their parts."""
    try:
        found = _from_parts(tensors, scale)
    except KeyError as error:
        raise refused(f"{where}: its part {error} is missing.") from None
    if tensors:
        raise refused(f"{where}: parts that do not belong together: {', '.join(sorted(tensors))}.")
    if not found:
        raise refused(f"{where}: an alpha and nothing else.")
    return found


def _from_parts(tensors: dict[str, torch.Tensor], scale: _Scale) -> dict[str, Change]:
    found: dict[str, Change] = {}
    if "down" in tensors:
        down, up = tensors.pop("down").flatten(1), tensors.pop("up").flatten(1)
        magnitude = tensors.pop("magnitude", None)
        if magnitude is not None:
            magnitude = magnitude.flatten()
        found["weight"] = LowRank(down=down, up=up, scale=scale(down.shape[0]), magnitude=magnitude)
        if "up_bias" in tensors:
            found["bias"] = Difference(difference=tensors.pop("up_bias"), scale=scale(down.shape[0]))
    elif any(part.startswith("lokr_") for part in tensors):
        left, right = _factor(tensors, "lokr_w1"), _factor(tensors, "lokr_w2")
        ranks = [factor[1].shape[0] for factor in (right, left) if len(factor) == 2]
        # LyCORIS scales only what is a product; whole factors hold their scale.
        found["weight"] = Kronecker(left=left, right=right, scale=scale(ranks[0]) if ranks else 1.0)
    elif any(part.startswith("hada_") for part in tensors):
        first, second = _factor(tensors, "hada_w1"), _factor(tensors, "hada_w2")
        found["weight"] = Hadamard(
            first=(first[0], first[1]), second=(second[0], second[1]), scale=scale(first[1].shape[0])
        )
    elif "difference" in tensors:
        found["weight"] = Difference(difference=tensors.pop("difference"))
    if "bias_difference" in tensors:
        found["bias"] = Difference(difference=tensors.pop("bias_difference"))
    for parameter in ("weight", "bias"):
        if f"whole_{parameter}" in tensors:
            found[parameter] = Replacement(value=tensors.pop(f"whole_{parameter}"))
    return found


def _factor(tensors: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, ...]:
    if name in tensors:
        return (tensors.pop(name),)
    return tensors.pop(f"{name}_a"), tensors.pop(f"{name}_b")


def _check(owner: torch.nn.Module, parameter: str, change: Change, where: str) -> None:
    weight = dict(owner.named_parameters(recurse=False)).get(parameter)
    if weight is None:
        raise refused(f"{where}: the layer has no {parameter} in this model.")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise refused(f"{where}: the layer is quantized ({weight.dtype}), its weights cannot be changed exactly.")
    if change.rank > MAX_RANK:
        raise refused(f"{where}: rank {change.rank} is over the limit of {MAX_RANK}.")
    is_conv = isinstance(owner, torch.nn.modules.conv._ConvNd)
    if (is_conv and owner.groups != 1) or (change.rank and not is_conv and not isinstance(owner, torch.nn.Linear)):
        raise refused(f"{where}: layers of type {type(owner).__name__} with these settings are not supported.")
    if not change.fits(weight):
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in change.tensors())
        raise refused(f"{where}: made for another model ({shapes} for a weight of {tuple(weight.shape)}).")
