"""Lays weights of layers that share their input one after the other, so that one product serves them all.

Each layer keeps its parameters, which are now parts of a larger tensor: what changes them in place, as merging a LoRA
does, changes the joined product, and state dicts, counts of parameters and memory stay what they were. For networks
that are on their device for good: weights that come and go are laid out anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .blocks.parts import FirstOfJoined

# Names of sibling layers that get the same input, in attention of diffusers: picture's, then text's.
_OF_SELF = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
_OF_CROSS = (("to_k", "to_v"),)


def join_products(network: torch.nn.Module) -> int:
    """Join what attention with a fused processor asks of its input, in place; return how many products there are now.

    Raises what the device raises when memory runs out, and leaves every layer whole.
    """
    joined = 0
    for attention in network.modules():
        processor = attention.__dict__.get("processor")
        if processor is None or not type(processor).__name__.startswith("Fused"):
            continue
        for names in _OF_CROSS if vars(attention).get("is_cross_attention") else _OF_SELF:
            layers = [attention._modules.get(name) for name in names]
            if _alike(layers):
                join_layers([layer for layer in layers if layer is not None])
                joined += 1
    return joined


def _alike(layers: Sequence[torch.nn.Module | None]) -> bool:
    """Say whether these are plain layers of one input, not joined yet."""
    if not all(type(layer) is torch.nn.Linear for layer in layers):
        return False
    kinds = {
        (layer.in_features, layer.bias is None, layer.weight.dtype, layer.weight.device)
        for layer in layers
        if isinstance(layer, torch.nn.Linear)
    }
    return len(kinds) == 1


def join_layers(layers: Sequence[torch.nn.Module]) -> None:
    """Lay the weights, and the biases, of linear layers one after the other, in place."""
    parts: dict[str, torch.Tensor] = {}
    for name in ("weight", "bias"):
        own = [layer._parameters[name] for layer in layers]
        given = [parameter for parameter in own if parameter is not None]
        if not given:
            continue
        whole = torch.cat([parameter.data for parameter in given])
        for parameter, part in zip(given, whole.split([len(parameter) for parameter in given]), strict=True):
            parameter.data = part
        parts[name] = whole
    first = layers[0]
    first.__class__ = FirstOfJoined
    # Not registered, as they are the layers' own; parameters all the same, whose sizes compilers take as they are.
    for name in ("weight", "bias"):
        whole = parts.get(name)
        vars(first)[f"joined_{name}"] = None if whole is None else torch.nn.Parameter(whole, requires_grad=False)
    if parts["weight"].is_cuda:
        # The separate weights' memory is of other sizes than what comes next, and would stay beside it.
        torch.cuda.empty_cache()
