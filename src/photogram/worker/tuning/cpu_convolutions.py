"""3D convolutions on a CPU by oneDNN, which is several times faster than torch's own where torch does not choose it.

For one clip of moderate size torch takes a kernel of its own (`slow_conv3d`): the choice counts batch, channels, frames
and height, and small VAEs stay below its limit.
"""

from __future__ import annotations

from types import MethodType

import torch


def use_onednn(network: torch.nn.Module) -> int:
    """Let oneDNN compute the network's 3D convolutions, in place; return how many."""
    if not torch.backends.mkldnn.is_available():
        return 0
    parts = [part for part in network.modules() if isinstance(part, torch.nn.Conv3d) and _is_plain(part)]
    for part in parts:
        part._conv_forward = MethodType(_by_onednn, part)  # what `Conv3d.forward`, and every subclass, ends in
    return len(parts)


def _is_plain(part: torch.nn.Conv3d) -> bool:
    return part.padding_mode == "zeros" and not isinstance(part.padding, str)


def _by_onednn(
    part: torch.nn.Conv3d, x_BCTHW: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if x_BCTHW.dtype != torch.float32:  # of other types not every processor has the instructions
        return torch.nn.Conv3d._conv_forward(part, x_BCTHW, weight, bias)
    return torch.ops.aten.mkldnn_convolution(
        x_BCTHW, weight, bias, part.padding, part.stride, part.dilation, part.groups
    )
