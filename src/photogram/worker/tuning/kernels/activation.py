"""Activations in one Triton kernel with what stands before them: a normalization over channels, or a gate.

Imported only where Triton is. See `reference.py` for what is computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .reference import Activation

_ELEMENTS = 4096  # of one program
_COLUMNS = 1024


@triton.jit
def _rms_silu(
    x, gamma, out, places, channels, x_sample, out_sample, scale, PLACES: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (place < places) & (channel < channels)
    where = place * channels + channel
    value = tl.load(x + sample * x_sample + where, mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(value * value, 1))
    value = value / tl.maximum(length, 1e-12)[:, None] * scale
    value *= tl.load(gamma + channel, mask=channel < channels, other=0.0).to(tl.float32)
    tl.store(out + sample * out_sample + where, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=inside)


def rms_silu(x_BCTHW: torch.Tensor, gamma_C: torch.Tensor, scale: float, out_BCTHW: torch.Tensor) -> None:
    """Both tensors with channels last, of every sample's places one after the other."""
    samples, channels, frames, height, width = x_BCTHW.shape
    places = frames * height * width
    block = triton.next_power_of_2(channels)
    at_once = max(1, _ELEMENTS // block)
    _rms_silu[(triton.cdiv(places, at_once), samples)](
        x_BCTHW, gamma_C, out_BCTHW, places, channels, x_BCTHW.stride(0), out_BCTHW.stride(0), scale,
        PLACES=at_once, CHANNELS=block, num_warps=8,
    )  # fmt: skip


@triton.jit
def _gated(x, value, out, width, x_row, value_row, out_row, KIND: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    gate = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if KIND == "silu":
        gate *= tl.sigmoid(gate)
    elif KIND == "gelu":
        gate *= 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # the tanh form: (1 + tanh(u)) / 2 is the sigmoid of 2u
        gate *= tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    gate *= tl.load(value + row * value_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + column, gate.to(out.dtype.element_ty), mask=inside)


def gated(x_SD: torch.Tensor, value_SD: torch.Tensor, kind: Activation) -> torch.Tensor:
    x, value = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (x_SD, value_SD))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, width = x.shape
    _gated[(tokens, triton.cdiv(width, _COLUMNS))](
        x, value, out, width, x.stride(0), value.stride(0), out.stride(0), KIND=kind, COLUMNS=_COLUMNS, num_warps=4
    )
    return out
