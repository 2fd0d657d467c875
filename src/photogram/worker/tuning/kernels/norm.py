"""Residual sum, normalization and modulation in one Triton kernel: a program for each token, its width in registers.

Imported only where Triton is. See `reference.py` for what is computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .reference import Modulation, Norm


@triton.jit
def _chain(
    x, branch, branch_weight, gate, total, out, weight, bias, scale, shift,
    tokens, width,
    x_row, x_batch, branch_row, branch_batch, gate_batch, scale_batch, shift_batch,
    eps, branch_eps,
    ADDS: tl.constexpr, NORMS_BRANCH: tl.constexpr, GATES: tl.constexpr, NORMS: tl.constexpr, IS_RMS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SCALES: tl.constexpr, SHIFTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + sample * x_batch + token * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(branch + sample * branch_batch + token * branch_row + column, mask=inside, other=0.0)
        added = added.to(tl.float32)
        if NORMS_BRANCH:
            added *= tl.rsqrt(tl.sum(added * added, 0) / width + branch_eps)
            added *= tl.load(branch_weight + column, mask=inside, other=0.0).to(tl.float32)
        if GATES:
            added *= tl.load(gate + sample * gate_batch + column, mask=inside, other=0.0).to(tl.float32)
        # What is normalized is the sum as it is kept.
        value = (value + added).to(total.dtype.element_ty)
        tl.store(total + row * width + column, value, mask=inside)
        value = value.to(tl.float32)
    if NORMS:
        if not IS_RMS:
            value = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
        value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps)
        if HAS_WEIGHT:
            value *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        if SCALES:
            value *= 1.0 + tl.load(scale + sample * scale_batch + column, mask=inside, other=0.0).to(tl.float32)
        if SHIFTS:
            value += tl.load(shift + sample * shift_batch + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


def norm_modulate(x_BSD: torch.Tensor, norm: Norm, modulation: Modulation | None) -> torch.Tensor:
    return _launch(x_BSD, None, None, norm, modulation, None)[1]


def add_gated(
    x_BSD: torch.Tensor, branch_BSD: torch.Tensor, gate_BD: torch.Tensor | None, branch_norm: Norm | None
) -> torch.Tensor:
    return _launch(x_BSD, branch_BSD, gate_BD, None, None, branch_norm)[0]


def add_gated_norm_modulate(
    x_BSD: torch.Tensor,
    branch_BSD: torch.Tensor,
    gate_BD: torch.Tensor | None,
    norm: Norm,
    modulation: Modulation | None,
    branch_norm: Norm | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(x_BSD, branch_BSD, gate_BD, norm, modulation, branch_norm)


def _launch(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    norm: Norm | None,
    modulation: Modulation | None,
    branch_norm: Norm | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum and what is made of it; one that is not asked for is `x` itself."""
    x = _rows_dense(x)
    branch = x if branch is None else _rows_dense(branch)
    samples, tokens, width = x.shape
    adds, norms = branch is not x, norm is not None
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if adds else x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if norms else x
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    scale, shift = (None, None) if modulation is None else (_dense(modulation.scale), _dense(modulation.shift))
    gate = _dense(gate)
    branch_weight = None if branch_norm is None else branch_norm.weight
    assert branch_norm is None or (branch_norm.is_rms and branch_weight is not None and branch_norm.bias is None)
    block = triton.next_power_of_2(width)
    _chain[(samples * tokens,)](
        x, branch, _or(branch_weight, x), _or(gate, x), total, out,
        _or(weight, x), _or(bias, x), _or(scale, x), _or(shift, x),
        tokens, width,
        x.stride(1), x.stride(0), branch.stride(1), branch.stride(0),
        _batch_stride(gate), _batch_stride(scale), _batch_stride(shift),
        0.0 if norm is None else norm.eps, 0.0 if branch_norm is None else branch_norm.eps,
        ADDS=adds, NORMS_BRANCH=branch_norm is not None, GATES=gate is not None, NORMS=norms,
        IS_RMS=norm is not None and norm.is_rms,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, SCALES=scale is not None, SHIFTS=shift is not None,
        BLOCK=block, num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip
    return total, out


def _rows_dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(vectors: torch.Tensor | None) -> torch.Tensor | None:
    return vectors if vectors is None or vectors.stride(-1) == 1 else vectors.contiguous()


def _batch_stride(vectors: torch.Tensor | None) -> int:
    """One vector for all samples is read again for each."""
    return 0 if vectors is None or vectors.shape[0] == 1 else vectors.stride(0)


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel's pointer must be of some tensor, also where it is not read."""
    return other if tensor is None else tensor
