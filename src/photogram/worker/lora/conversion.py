"""Every known LoRA format, turned into tensors by module, layer and part of the change.

Files that use the model's own layer names are read as they are; all others go through diffusers' converters. A
converter that leaves out a tensor is found out, and the file refused: nothing is dropped in silence. The one file that
touches diffusers' private LoRA code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    convert_state_dict,
    convert_unet_state_dict_to_peft,
)
from torch.utils._pytree import tree_leaves

from .names import LayerNames, split
from .reading import refused

Layer = tuple[str, str]
"""(module, layer): ``("transformer", "blocks.0.attn1.to_q")``."""

Parts = dict[Layer, dict[str, torch.Tensor]]
"""The tensors of each layer by part: down, up, alpha, magnitude, lokr_w1 ..."""


def lora_modules(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    """Return the components that LoRAs can change, the main denoiser first; none for a pipeline without support."""
    if not isinstance(pipeline, LoraBaseMixin):
        return ()
    known = [*type(pipeline)._lora_loadable_modules, "transformer_2"]
    present = [name for name in dict.fromkeys(known) if isinstance(pipeline.components.get(name), torch.nn.Module)]
    return tuple(present) if present and present[0] in ("transformer", "unet") else ()


def convert(tensors: Mapping[str, torch.Tensor], pipeline: DiffusionPipeline, names: LayerNames, path: str) -> Parts:
    """Return a file's tensors by layer and part. Raises RequestError naming what cannot be placed."""
    own, foreign = _by_layer(tensors, names)
    if not foreign:
        return own
    try:
        converted, dropped = _through_diffusers(tensors, pipeline)
    except Exception as error:  # converters raise whatever their string handling raises
        named = _some(foreign)
        raise refused(
            f"LoRA '{path}': not made for this model ({type(pipeline).__name__}), or in a format that is not known:"
            f" {named} ({type(error).__name__}: {' '.join(str(error).split())[:160]})."
        ) from None
    if dropped:
        raise refused(f"LoRA '{path}': these parts are not supported for this model: {_some(dropped)}.")
    parts, foreign = _by_layer(converted, names)
    if foreign:
        raise refused(f"LoRA '{path}': these layers are not in this model: {_some(foreign)}.")
    return parts


def _by_layer(tensors: Mapping[str, torch.Tensor], names: LayerNames) -> tuple[Parts, list[str]]:
    """Sort tensors by the layers they are for; the second result names the keys that fit none."""
    parts: Parts = {}
    foreign: list[str] = []
    for key, tensor in tensors.items():
        place = split(key)
        layer = names.find(place[0]) if place is not None else None
        if layer is None and key.endswith((".weight", ".bias")) and "norm" in key:
            # A FLUX control LoRA brings norms as whole parameters, under the model's own names.
            owner, _, parameter = key.rpartition(".")
            layer, place = names.find(owner), (owner, f"whole_{parameter}")
        if layer is None or place is None:
            foreign.append(key)
            continue
        known = parts.setdefault(layer, {})
        if place[1] in known:
            raise refused(f"LoRA: two tensors for '{place[1]}' of {'.'.join(layer)}.")
        known[place[1]] = tensor
    return parts, foreign


def _through_diffusers(
    tensors: Mapping[str, torch.Tensor], pipeline: DiffusionPipeline
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Convert with the pipeline's own converter; also tell which of the tensors did not come out of it."""
    used: set[str] = set()
    traced: dict[str, Any] = {key: _Traced.of(tensor, key, used) for key, tensor in tensors.items()}
    denoiser = pipeline.components.get("unet")
    hints = {} if denoiser is None else {"unet_config": denoiser.config}
    result = type(pipeline).lora_state_dict(traced, **hints, **_return_alphas(pipeline))
    state, alphas = result[:2] if isinstance(result, tuple) else (result, None)
    converted: dict[str, torch.Tensor] = {}
    renamed: dict[str, str] = {}
    for module, part in _by_module(state).items():
        by_new_name = _to_peft(module, part)
        converted |= {f"{module}.{key}": tensor for key, tensor in by_new_name.items()}
        renamed |= {f"{module}.{old}": f"{module}.{new}" for old, new in zip(part, by_new_name, strict=True)}
    for key, alpha in (alphas or {}).items():
        value = alpha if isinstance(alpha, torch.Tensor) else torch.tensor(float(alpha))
        converted[_alpha_key(key, renamed)] = value
    for tensor in converted.values():
        if isinstance(tensor, _Traced):
            used |= tensor.sources
    dropped = [key for key, tensor in tensors.items() if key not in used and tensor.any()]
    return {key: tensor.as_subclass(torch.Tensor) for key, tensor in converted.items()}, dropped


def _return_alphas(pipeline: DiffusionPipeline) -> dict[str, bool]:
    """Some converters tell alphas only when asked."""
    names = type(pipeline).lora_state_dict.__code__.co_varnames
    return {"return_alphas": True} if "return_alphas" in names else {}


def _by_module(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        module, _, rest = key.partition(".")
        modules.setdefault(module, {})[rest] = tensor
    return modules


def _to_peft(module: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Bring the older names of layers and parts to today's, as diffusers does when it loads."""
    if any(".lora_A" in key or ".lokr_" in key or ".hada_" in key for key in state):
        return state
    if module.startswith("text_encoder"):
        return convert_state_dict(convert_state_dict(state, DIFFUSERS_OLD_TO_PEFT), DIFFUSERS_TO_PEFT)
    return convert_unet_state_dict_to_peft(state)


def _alpha_key(key: str, renamed: Mapping[str, str]) -> str:
    """Return an alpha's key under its layer's name of today. Old keys are those of the layer's tensor, and more."""
    old = key.removesuffix(".alpha")
    for end in ("", ".lora.down.weight", ".lora_linear_layer.down.weight", ".lora_A.weight"):
        place = split(renamed.get(old + end, ""))
        if place is not None:
            return f"{place[0]}.alpha"
    return key


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


class _Traced(torch.Tensor):
    """A tensor that knows which of the file's tensors it was made of."""

    sources: frozenset[str]
    used: set[str]

    @staticmethod
    def of(tensor: torch.Tensor, key: str, used: set[str]) -> _Traced:
        traced = tensor.as_subclass(_Traced)
        traced.sources, traced.used = frozenset((key,)), used
        return traced

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, _Traced)]
        sources = frozenset().union(*(leaf.sources for leaf in given if hasattr(leaf, "sources")))
        if func is torch.Tensor.item:
            # An alpha, on its way into a scale; other tensors are read so only to see whether they are zero.
            given[0].used.update(source for source in sources if source.endswith("alpha"))
        for leaf in tree_leaves(result):
            if isinstance(leaf, _Traced) and given:
                leaf.sources, leaf.used = sources, given[0].used
        return result
