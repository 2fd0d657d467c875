"""Normalization of queries and keys, and their rotation, in one Triton kernel: a program for each token, all its heads.

Imported only where Triton is. See `reference.py` for what is computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _norm_rotate(
    x, weight, cos, sin, out,
    tokens, heads, width,
    x_batch, x_row, x_head, out_batch, out_row, out_head, table_batch, table_row, table_pair,
    eps,
    NORMS: tl.constexpr, ACROSS_HEADS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (column < width)
    place = x + sample * x_batch + token * x_row + head * x_head + column
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        if ACROSS_HEADS:
            value *= tl.rsqrt(tl.sum(tl.sum(value * value, 1), 0) / (heads * width) + eps)
            value *= tl.load(weight + head * width + column, mask=inside, other=0.0).to(tl.float32)
        else:
            value *= tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
            value *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, (HEADS, WIDTH // 2, 2)))
    pair = tl.arange(0, WIDTH // 2)
    angle = sample * table_batch + token * table_row + pair * table_pair
    known = pair < width // 2
    cosine = tl.load(cos + angle, mask=known, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + angle, mask=known, other=0.0).to(tl.float32)[None, :]
    turned = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (HEADS, WIDTH))
    place = out + sample * out_batch + token * out_row + head * out_head + column
    tl.store(place, turned.to(out.dtype.element_ty), mask=inside)


def norm_rotate(
    x_BSHW: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out_BSHW: torch.Tensor,
) -> None:
    x = x_BSHW if x_BSHW.stride(-1) == 1 else x_BSHW.contiguous()
    assert out_BSHW.stride(-1) == 1
    assert cos.stride() == sin.stride()
    samples, tokens, heads, width = x.shape
    block_heads, block_width = triton.next_power_of_2(heads), triton.next_power_of_2(width)
    _norm_rotate[(samples * tokens,)](
        x, x if weight is None else weight, cos, sin, out_BSHW,
        tokens, heads, width,
        x.stride(0), x.stride(1), x.stride(2), out_BSHW.stride(0), out_BSHW.stride(1), out_BSHW.stride(2),
        cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0, cos.stride(-2), cos.stride(-1),
        eps,
        NORMS=weight is not None, ACROSS_HEADS=weight is not None and weight.numel() != width,
        HEADS=block_heads, WIDTH=block_width, num_warps=min(16, max(4, block_heads * block_width // 512)),
    )  # fmt: skip
