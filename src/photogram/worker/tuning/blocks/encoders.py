"""Text encoders: their normalizations and gated feed-forward networks, and T5's bias of positions.

Those of different families are alike but for their names. Their classes are not named here, as importing the code of
every encoder takes a second of a start; each part is mixed into the class it is found in.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from transformers.activations import NewGELUActivation, SiLUActivation

from ..kernels.ops import gated, norm_modulate
from ..kernels.reference import Norm


class FusedNorm(torch.nn.Module):
    """Division by the root of the mean square, in fp32, rounded, times a weight."""

    weight: torch.nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # A weight of another precision than the tokens' gives the result its own.
        if self.weight.dtype != hidden_states.dtype:
            return super().forward(hidden_states)
        rows = hidden_states.flatten(0, -2)[None]
        norm = Norm(eps=self.variance_epsilon, is_rms=True, weight=self.weight)
        return norm_modulate(rows, norm).view(hidden_states.shape)


class FusedT5FeedForward(torch.nn.Module):
    act: torch.nn.Module
    wi_0: torch.nn.Linear
    wi_1: torch.nn.Linear
    wo: torch.nn.Linear

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.act, NewGELUActivation):
            return super().forward(hidden_states)
        inner = gated(self.wi_0(hidden_states), self.wi_1(hidden_states), "gelu_tanh")
        return self.wo(inner.to(self.wo.weight.dtype))  # which is kept in fp32 where the rest is fp16


class FusedFeedForward(torch.nn.Module):
    act_fn: torch.nn.Module
    gate_proj: torch.nn.Linear
    up_proj: torch.nn.Linear
    down_proj: torch.nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.act_fn, SiLUActivation | torch.nn.SiLU):
            return super().forward(x)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), "silu"))


class BiasByDistance(torch.nn.Module):
    """A bias depends on the distance alone: looked up for each distance, not for each pair of tokens."""

    relative_attention_bias: torch.nn.Embedding

    def compute_bias(
        self, query_length: int, key_length: int, device: torch.device | None = None, past_seen_tokens: int = 0
    ) -> torch.Tensor:
        """Return the bias (1, H, queries, keys)."""
        table: Any = super()
        if past_seen_tokens:
            return table.compute_bias(query_length, key_length, device, past_seen_tokens)
        device = self.relative_attention_bias.weight.device if device is None else device
        distances = torch.arange(1 - query_length, key_length, device=device)
        of_distances = self.relative_attention_bias(self._buckets(distances))
        rows = of_distances.t().contiguous().unfold(1, key_length, 1)  # (H, queries, keys), the last query first
        return rows.flip(1)[None]

    def _buckets(self, distances: torch.Tensor) -> torch.Tensor:
        code: Any = self
        return code._relative_position_bucket(distances)


class T5BiasByDistance(BiasByDistance):
    is_decoder: bool
    relative_attention_num_buckets: int
    relative_attention_max_distance: int

    def _buckets(self, distances: torch.Tensor) -> torch.Tensor:
        code: Any = self
        return code._relative_position_bucket(
            distances,
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )


_PARTS: Mapping[str, type] = {
    "MistralMLP": FusedFeedForward,
    "MistralRMSNorm": FusedNorm,
    "Qwen2MLP": FusedFeedForward,
    "Qwen2_5_VLRMSNorm": FusedNorm,
    "Qwen3MLP": FusedFeedForward,
    "Qwen3RMSNorm": FusedNorm,
    "T5Attention": T5BiasByDistance,
    "T5DenseGatedActDense": FusedT5FeedForward,
    "T5LayerNorm": FusedNorm,
    "UMT5Attention": BiasByDistance,
    "UMT5DenseGatedActDense": FusedT5FeedForward,
    "UMT5LayerNorm": FusedNorm,
}


@functools.cache
def fused_class(kind: type) -> type | None:
    """Return what takes the place of a class of transformers, or None where there is nothing."""
    part = _PARTS.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None
    return None if part is None else type(f"Fused{kind.__name__}", (part, kind), {})
