"""Rows in fp8, each over its largest value, in one Triton kernel: a program for each row, its width in registers.

Imported only where Triton is. See `reference.py` for what is computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .reference import FP8_MAX, SMALLEST_ROW


@triton.jit
def _rows(x, out, scales, width, x_row, LIMIT: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST) / LIMIT
    tl.store(scales + row, scale)
    value = tl.minimum(tl.maximum(value / scale, -LIMIT), LIMIT)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


def quantize_rows(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_MK = x_MK if x_MK.stride(-1) == 1 else x_MK.contiguous()
    num_rows, width = x_MK.shape
    out = torch.empty(x_MK.shape, dtype=torch.float8_e4m3fn, device=x_MK.device)
    scales = torch.empty(num_rows, 1, dtype=torch.float32, device=x_MK.device)
    block = triton.next_power_of_2(width)
    _rows[(num_rows,)](
        x_MK, out, scales, width, x_MK.stride(0),
        LIMIT=FP8_MAX, SMALLEST=SMALLEST_ROW, BLOCK=block, num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip
    return out, scales
