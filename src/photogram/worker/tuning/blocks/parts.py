"""What blocks of several families are made of.

Shapes: B batch, S tokens, D width, H heads, W width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU

from ..kernels.ops import norm_rotate
from ..kernels.reference import Norm


def layer_norm(norm: torch.nn.LayerNorm) -> Norm:
    return Norm(eps=norm.eps, weight=norm.weight, bias=norm.bias)


def linear_gelu(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return the tanh form of GELU of a linear layer, on a GPU within the matrix product."""
    # A hook is a LoRA beside the weights, which adds to the product before the activation.
    if not x.is_cuda or linear.bias is None or linear._forward_hooks:
        return F.gelu(linear(x), approximate="tanh")
    rows = torch._addmm_activation(linear.bias, x.reshape(-1, x.shape[-1]), linear.weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], -1)


class FusedGelu(GELU):
    """The first layer of a feed-forward network, with its activation."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.approximate != "tanh":
            return super().forward(hidden_states)
        return linear_gelu(self.proj, hidden_states)


class Rotation:
    """Angles by which neighbouring pairs are turned, as the kernels read them: (S, W / 2) or (B, S, W / 2)."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self.cos = cos
        self.sin = sin

    @classmethod
    def of_complex(cls, turns: torch.Tensor) -> Rotation:
        parts = torch.view_as_real(turns)
        return cls(parts[..., 0], parts[..., 1])

    @classmethod
    def of_repeated(cls, cos_SW: torch.Tensor, sin_SW: torch.Tensor) -> Rotation:
        """Of tables that hold each angle twice."""
        return cls(cos_SW[:, 0::2], sin_SW[:, 0::2])

    def part(self, tokens: slice) -> Rotation:
        return Rotation(self.cos[..., tokens, :], self.sin[..., tokens, :])

    def turned(
        self, x_BSHW: torch.Tensor, norm: torch.nn.Module | None, out_BSHW: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalize queries or keys and turn them."""
        if norm is None:
            return norm_rotate(x_BSHW, None, 0.0, self.cos, self.sin, out_BSHW)
        return norm_rotate(x_BSHW, norm.weight, norm.eps, self.cos, self.sin, out_BSHW)


def joined(first_BSHW: torch.Tensor, second_BSHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return room for two streams of tokens side by side, and its two parts."""
    samples, tokens, heads, width = first_BSHW.shape
    both = torch.empty(
        samples,
        tokens + second_BSHW.shape[1],
        heads,
        width,
        dtype=first_BSHW.dtype,
        device=first_BSHW.device,
    )
    return both, both[:, :tokens], both[:, tokens:]
