"""What each chain computes, in plain torch.

Shapes: B batch, S tokens, D width, H heads, W width of a head. Vectors of modulation are (B or 1, D), of any strides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Activation = Literal["silu", "gelu", "gelu_tanh"]
FP8_MAX = 448.0
"""The largest number of e4m3."""
SMALLEST_ROW = 1e-12
"""What a row's largest value counts as at least, so that a row of zeros has a scale."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalization over the last axis: of layers, or of roots of mean squares; then weight and bias (D,)."""

    eps: float
    is_rms: bool = False
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Modulation:
    """What follows a normalization: times one and `scale`, plus `shift` where there is one."""

    scale: torch.Tensor
    shift: torch.Tensor | None = None


def norm_modulate(x_BSD: torch.Tensor, norm: Norm, modulation: Modulation | None) -> torch.Tensor:
    """Return the normalized and modulated tokens (B, S, D)."""
    return _normalized(x_BSD.float(), norm, modulation).to(x_BSD.dtype)


def add_gated(
    x_BSD: torch.Tensor, branch_BSD: torch.Tensor, gate_BD: torch.Tensor | None, branch_norm: Norm | None
) -> torch.Tensor:
    """Return `x + gate * branch`; without a gate, `x + branch`. With a `branch_norm`, of roots of mean squares and with
    a weight, the branch is normalized first."""
    return _sum(x_BSD, branch_BSD, gate_BD, branch_norm).to(x_BSD.dtype)


def add_gated_norm_modulate(
    x_BSD: torch.Tensor,
    branch_BSD: torch.Tensor,
    gate_BD: torch.Tensor | None,
    norm: Norm,
    modulation: Modulation | None,
    branch_norm: Norm | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of `add_gated`, and it normalized and modulated."""
    total = _sum(x_BSD, branch_BSD, gate_BD, branch_norm).to(x_BSD.dtype)
    return total, norm_modulate(total, norm, modulation)


def norm_rotate(
    x_BSHW: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out_BSHW: torch.Tensor,
) -> None:
    """Normalize queries or keys by roots of mean squares, turn each pair of neighbours by its angle, and write them.

    A `weight` of (W,) normalizes each head by itself, one of (H * W,) all heads together; None: not at all.
    `cos` and `sin` are (S, W / 2) or (B, S, W / 2). `out_BSHW` may be a part of a larger tensor.
    """
    x = x_BSHW.float()
    if weight is not None:
        across = weight.numel() != x.shape[-1]
        mean = x.square().mean((-2, -1) if across else -1, keepdim=True)
        x = x * torch.rsqrt(mean + eps) * weight.float().view(x.shape[-2:] if across else x.shape[-1:])
    cos, sin = (table[..., None, :].float() for table in (cos, sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    out_BSHW.copy_(turned.flatten(-2))


def rms_silu(x_BCTHW: torch.Tensor, gamma_C: torch.Tensor, scale: float, out_BCTHW: torch.Tensor) -> None:
    """Write SiLU of each place's channels, divided by their length, times `scale` and gamma.

    `out_BCTHW` may be some frames of a larger tensor.
    """
    shape = (1, -1, *(1,) * (x_BCTHW.dim() - 2))
    out_BCTHW.copy_(F.silu(F.normalize(x_BCTHW.float(), dim=1) * scale * gamma_C.float().view(shape)))


def gated(x_SD: torch.Tensor, value_SD: torch.Tensor, kind: Activation) -> torch.Tensor:
    """Return the activation of `x` times `value`."""
    x = x_SD.float()
    activated = F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    return (activated * value_SD.float()).to(x_SD.dtype)


def linear_gelu(x_SD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the tanh form of GELU of a linear layer."""
    return F.gelu(F.linear(x_SD, weight, bias), approximate="tanh")


def quantize_rows(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows (M, K) in e4m3, each over its largest absolute value, and the scales (M, 1) in fp32 to take back."""
    x = x_MK.float()
    scales = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_ROW) / FP8_MAX
    # A quotient may be rounded to more than the largest number, which in e4m3 is none.
    return (x / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


def _sum(
    x_BSD: torch.Tensor, branch_BSD: torch.Tensor, gate_BD: torch.Tensor | None, branch_norm: Norm | None
) -> torch.Tensor:
    branch = branch_BSD.float()
    if branch_norm is not None:
        branch = _normalized(branch, branch_norm, None)
    return x_BSD.float() + (branch if gate_BD is None else branch * gate_BD.float()[:, None])


def _normalized(x: torch.Tensor, norm: Norm, modulation: Modulation | None) -> torch.Tensor:
    if norm.is_rms:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    else:
        x = F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    if norm.weight is not None:
        x = x * norm.weight.float()
    if norm.bias is not None:
        x = x + norm.bias.float()
    if modulation is not None:
        x = x * (1 + modulation.scale.float()[:, None])
        if modulation.shift is not None:
            x = x + modulation.shift.float()[:, None]
    return x
