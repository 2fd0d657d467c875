"""Wan's transformer (also of 14B, and of image-to-video): one token stream, cross-attention to the text."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock

from ..kernels.ops import add_gated, add_gated_norm_modulate, norm_modulate
from ..kernels.reference import Modulation, Norm
from .parts import Rotation, layer_norm, products


class FusedWanProcessor(WanAttnProcessor):
    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if attn.add_k_proj is not None or attn.fused_projections or attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if encoder_hidden_states is None:
            query, key, value = products(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        else:
            query = attn.to_q(hidden_states)
            key, value = products(encoder_hidden_states, attn.to_k, attn.to_v)
        if rotary_emb is None:
            query, key = (
                norm_modulate(x, Norm(eps=norm.eps, is_rms=True, weight=norm.weight))
                for x, norm in ((query, attn.norm_q), (key, attn.norm_k))
            )
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            cos, sin = rotary_emb  # (1, S, 1, W), each angle twice
            rotation = Rotation.of_repeated(cos[0, :, 0], sin[0, :, 0])
            query, key = rotation.turned(query, attn.norm_q), rotation.turned(key, attn.norm_k)
        # Of several ranks each has its share of the clip's tokens and all of the text's.
        parallel = self._parallel_config if encoder_hidden_states is None else None
        attended = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=parallel
        )  # fmt: skip
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3)))


class FusedWanBlock(WanTransformerBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        # A timestep for each token, or no normalization before the cross-attention.
        if temb.ndim == 4 or not isinstance(self.norm2, torch.nn.LayerNorm):
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        shift, scale, gate, c_shift, c_scale, c_gate = (self.scale_shift_table + temb.float()).unbind(1)

        normed = norm_modulate(hidden_states, layer_norm(self.norm1), Modulation(scale, shift))
        branch = self.attn1(normed, None, None, rotary_emb)
        hidden_states, normed = add_gated_norm_modulate(hidden_states, branch, gate, layer_norm(self.norm2))
        branch = self.attn2(normed, encoder_hidden_states, None, None)
        hidden_states, normed = add_gated_norm_modulate(
            hidden_states, branch, None, layer_norm(self.norm3), Modulation(c_scale, c_shift)
        )
        return add_gated(hidden_states, self.ffn(normed), c_gate)
