"""What blocks of several families are made of.

Shapes: B batch, S tokens, D width, H heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.normalization import RMSNorm

from ..kernels import ops
from ..kernels.ops import norm_rotate
from ..kernels.reference import Norm


def layer_norm(norm: torch.nn.LayerNorm) -> Norm:
    return Norm(eps=norm.eps, weight=norm.weight, bias=norm.bias)


def rms_norm(norm: RMSNorm) -> Norm:
    return Norm(eps=norm.eps, is_rms=True, weight=norm.weight, bias=norm.bias)


def is_called_only(linear: torch.nn.Module) -> bool:
    """Say whether a layer is nothing but its weights. A hook is a LoRA beside them, which changes the product."""
    return type(linear) in (torch.nn.Linear, FirstOfJoined) and not linear._forward_hooks


class FirstOfJoined(torch.nn.Linear):
    """A layer whose weights begin those of all layers that share its input."""

    joined_weight: torch.Tensor
    joined_bias: torch.Tensor | None


def products(x: torch.Tensor, *layers: torch.nn.Linear) -> tuple[torch.Tensor, ...]:
    """Return the results of layers that share an input, parts of one where their weights are joined."""
    first = _joined(layers)
    if first is None:
        return tuple(layer(x) for layer in layers)
    return F.linear(x, first.joined_weight, first.joined_bias).split([layer.out_features for layer in layers], dim=-1)


def products_of_both(
    text_BSD: torch.Tensor,
    picture_BSD: torch.Tensor,
    text_layers: Sequence[torch.nn.Linear],
    picture_layers: Sequence[torch.nn.Linear],
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], torch.Tensor]:
    """Return the results of each stream's layers, and those of the last layers as one, the text's tokens first.

    The two products of one sample are written side by side, so that there is nothing to join.
    """
    of_text, of_picture = _joined(text_layers), _joined(picture_layers)
    is_free = not torch.compiler.is_compiling() and not torch.is_grad_enabled() and len(text_BSD) == 1
    if of_text is None or of_picture is None or not is_free:
        texts, pictures = products(text_BSD, *text_layers), products(picture_BSD, *picture_layers)
        return texts, pictures, torch.cat((texts[-1], pictures[-1]), dim=1)
    tokens = text_BSD.shape[1]
    both = text_BSD.new_empty((1, tokens + picture_BSD.shape[1], len(of_text.joined_weight)))
    _write_product(text_BSD[0], of_text, both[0, :tokens])
    _write_product(picture_BSD[0], of_picture, both[0, tokens:])
    parts = both.split([layer.out_features for layer in text_layers], dim=-1)
    return [part[:, :tokens] for part in parts], [part[:, tokens:] for part in parts], parts[-1]


def _write_product(x_SD: torch.Tensor, first: FirstOfJoined, out_SD: torch.Tensor) -> None:
    weights = first.joined_weight.t()
    if first.joined_bias is None:
        torch.mm(x_SD, weights, out=out_SD)
    else:
        torch.addmm(first.joined_bias, x_SD, weights, out=out_SD)


def _joined(layers: Sequence[torch.nn.Linear]) -> FirstOfJoined | None:
    """Return the first of layers that are joined as they were, their weights where they were then."""
    first = layers[0]
    if not isinstance(first, FirstOfJoined) or not all(map(is_called_only, layers)):
        return None
    if len(first.joined_weight) != sum(layer.out_features for layer in layers):
        return None
    stands = torch.compiler.is_compiling() or first.weight.data_ptr() == first.joined_weight.data_ptr()
    return first if stands else None


def linear_gelu(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return the tanh form of GELU of a linear layer, on a GPU within the matrix product."""
    if linear.bias is None or not is_called_only(linear):
        return F.gelu(linear(x), approximate="tanh")
    return ops.linear_gelu(x, linear.weight, linear.bias)


def linear_of_joined(linear: torch.nn.Linear, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return a linear layer of two tensors side by side: two products, the second added to the first.

    Joining them would be two passes over both; this reads and writes the narrower result once more instead.
    """
    if not is_called_only(linear):
        return linear(torch.cat((first, second), dim=-1))
    width = first.shape[-1]
    weights, rows = linear.weight.t(), first.flatten(0, -2)
    if linear.bias is None:
        result = torch.mm(rows, weights[:width])
    else:
        result = torch.addmm(linear.bias, rows, weights[:width])
    return result.addmm_(second.flatten(0, -2), weights[width:]).view(*first.shape[:-1], -1)


class FusedGelu(GELU):
    """The first layer of a feed-forward network, with its activation."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.approximate != "tanh":
            return super().forward(hidden_states)
        return linear_gelu(self.proj, hidden_states)


class FusedGeglu(GEGLU):
    """The first layer of a gated feed-forward network, with its activation."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return ops.gated(gate, value, "gelu")


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


def side_by_side(first_BSD: torch.Tensor, second_BSD: torch.Tensor) -> torch.Tensor:
    """Return two streams of tokens as one: what they are parts of, where they lie so, else a copy."""
    if torch.compiler.is_compiling() or not _adjoin(first_BSD, second_BSD):
        return torch.cat((first_BSD, second_BSD), dim=1)
    samples, tokens, width = first_BSD.shape
    return first_BSD.as_strided((samples, tokens + second_BSD.shape[1], width), first_BSD.stride())


def _adjoin(first_BSD: torch.Tensor, second_BSD: torch.Tensor) -> bool:
    samples, tokens, row = first_BSD.shape[0], first_BSD.shape[1] + second_BSD.shape[1], first_BSD.stride(1)
    return (
        first_BSD.untyped_storage().data_ptr() == second_BSD.untyped_storage().data_ptr()
        and first_BSD.dtype == second_BSD.dtype
        and first_BSD.stride() == second_BSD.stride()
        and second_BSD.storage_offset() - first_BSD.storage_offset() == first_BSD.shape[1] * row
        and (samples == 1 or first_BSD.stride(0) == tokens * row)
    )
