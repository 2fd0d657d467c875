"""Weights of convolutions in the order in which GPUs multiply them."""

from __future__ import annotations

import torch

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def use_channels_last(network: torch.nn.Module) -> int:
    """Order the weights of 2D and 3D convolutions with channels last, in place; return how many were.

    The convolutions' results come in that order too, so that it holds from one to the next; values do not change.
    """
    changed = 0
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Conv3d):
            weight = part.weight
            weight.data = weight.data.contiguous(memory_format=_FORMATS[weight.dim()])
            changed += 1
    return changed
