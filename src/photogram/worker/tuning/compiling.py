"""Compiles the parts of a denoiser that repeat: one compilation serves every layer of a kind, and every size.

Sizes are symbols from the first call on. Compiled for fixed sizes, each new size of picture and each number of jobs in
a batch would stop the server for the seconds of another compilation, and the bits of a result would depend on which
sizes came before it. Only one row and several rows are two programs; the warm-up makes both.

LoRAs are merged into weights in place, which compiled code reads as they are.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.fx.experimental._config as symbols

# What diffusers counts as a UNet's repeated parts leaves out its residual blocks: a third of a step's time.
_MORE_REPEATED = {"UNet2DConditionModel": ("ResnetBlock2D",)}

# Programs of one class of layers: by width, by one row or several, with a mask and without. torch gives up after 8.
MAX_PROGRAMS = 64


def compile_repeated(network: torch.nn.Module, **options: Any) -> list[torch.nn.Module]:
    """Let every repeated part of the network be compiled at its first call, and return these parts.

    `options` go to torch.compile. Nothing is compiled yet: what cannot be is found out by the first call.
    """
    # Equal sizes would share a symbol: as many tokens as the layer is wide, and the number of tokens stood fixed.
    symbols.use_duck_shape = False
    torch._dynamo.config.recompile_limit = max(MAX_PROGRAMS, torch._dynamo.config.recompile_limit)
    parts = repeated_parts(network)
    for part in parts:
        part.compile(dynamic=True, **options)
    return parts


def repeated_parts(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers that a network is made of: those its class names, else the entries of its lists of modules
    that have their like."""
    named = tuple(getattr(type(network), "_repeated_blocks", None) or ())
    if named:
        kinds = {*named, *_MORE_REPEATED.get(type(network).__name__, ())}
        return [part for part in network.modules() if kinds & {kind.__name__ for kind in type(part).__mro__}]
    entries = [
        entry for child in network.children() if isinstance(child, torch.nn.ModuleList) for entry in child.children()
    ]
    count = Counter(type(entry) for entry in entries)
    return [entry for entry in entries if count[type(entry)] > 1]
