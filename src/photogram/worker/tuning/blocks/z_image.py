"""Z-Image's transformer: one stream, normalized before each branch and after it."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import (
    FeedForward,
    ZImageTransformerBlock,
    ZSingleStreamAttnProcessor,
)

from ..kernels.ops import add_gated, add_gated_norm_modulate, gated, norm_modulate
from ..kernels.reference import Modulation
from .parts import Rotation, products, rms_norm


class FusedZImageProcessor(ZSingleStreamAttnProcessor):
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if freqs_cis is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        rotation = Rotation.of_complex(freqs_cis)
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)) for part in products(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        )
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        attended = dispatch_attention_fn(
            rotation.turned(query, attn.norm_q),
            rotation.turned(key, attn.norm_k),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2, 3)
        for layer in attn.to_out:
            attended = layer(attended)
        return attended


class FusedZImageFeedForward(FeedForward):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(gated(self.w1(x), self.w3(x), "silu"))


class FusedZImageBlock(ZImageTransformerBlock):
    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor,
        freqs_cis: torch.Tensor,
        adaln_input: torch.Tensor | None = None,
        noise_mask: torch.Tensor | None = None,
        adaln_noisy: torch.Tensor | None = None,
        adaln_clean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # A mask tells the tokens of reference pictures apart, which have a modulation of their own.
        if noise_mask is not None:
            return super().forward(x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)
        gate = gate_mlp = before = before_mlp = None
        if self.modulation:
            scale, gate, scale_mlp, gate_mlp = self.adaLN_modulation(adaln_input).chunk(4, dim=1)
            gate, gate_mlp = gate.tanh(), gate_mlp.tanh()
            before, before_mlp = Modulation(scale), Modulation(scale_mlp)
        branch = self.attention(
            norm_modulate(x, rms_norm(self.attention_norm1), before), attention_mask=attn_mask, freqs_cis=freqs_cis
        )
        x, normed = add_gated_norm_modulate(
            x, branch, gate, rms_norm(self.ffn_norm1), before_mlp, branch_norm=rms_norm(self.attention_norm2)
        )
        return add_gated(x, self.feed_forward(normed), gate_mlp, branch_norm=rms_norm(self.ffn_norm2))
