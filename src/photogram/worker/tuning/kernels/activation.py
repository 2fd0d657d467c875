"""Normalization over channels and SiLU in one Triton kernel: a program for some places, all their channels.

Imported only where Triton is. See `reference.py` for what is computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ELEMENTS = 4096  # of one program


@triton.jit
def _rms_silu(x, gamma, out, places, channels, scale, PLACES: tl.constexpr, CHANNELS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (place < places) & (channel < channels)
    where = place * channels + channel
    value = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(value * value, 1))
    value = value / tl.maximum(length, 1e-12)[:, None] * scale
    value *= tl.load(gamma + channel, mask=channel < channels, other=0.0).to(tl.float32)
    tl.store(out + where, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=inside)


def rms_silu(x_BCTHW: torch.Tensor, gamma_C: torch.Tensor, scale: float) -> torch.Tensor:
    out = torch.empty_like(x_BCTHW)
    channels = x_BCTHW.shape[1]
    places = x_BCTHW.numel() // channels
    block = triton.next_power_of_2(channels)
    at_once = max(1, _ELEMENTS // block)
    _rms_silu[(triton.cdiv(places, at_once),)](
        x_BCTHW, gamma_C, out, places, channels, scale, PLACES=at_once, CHANNELS=block, num_warps=8
    )
    return out
