"""FLUX.1's transformer: blocks of two streams, text and picture, then blocks of both as one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from ..kernels.ops import add_gated, add_gated_norm_modulate, norm_modulate
from ..kernels.reference import Modulation
from .parts import Rotation, joined, layer_norm, linear_gelu, linear_of_joined, products, products_of_both, side_by_side


def projected(
    attn: Any, hidden_states: torch.Tensor, text: torch.Tensor | None, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values (B, S, H, W) of the text's tokens, where there are any, and the picture's."""
    of_picture = (attn.to_q, attn.to_k, attn.to_v)
    if text is None:
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in products(hidden_states, *of_picture))
        return rotation.turned(query, attn.norm_q), rotation.turned(key, attn.norm_k), value
    of_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    texts, pictures, values = products_of_both(text, hidden_states, of_text, of_picture)
    text_query, text_key, query, key, values = (
        part.unflatten(-1, (-1, attn.head_dim)) for part in (*texts[:2], *pictures[:2], values)
    )
    text_turns, turns = rotation.part(slice(0, text.shape[1])), rotation.part(slice(text.shape[1], None))
    queries, first, second = joined(text_query, query)
    text_turns.turned(text_query, attn.norm_added_q, first)
    turns.turned(query, attn.norm_q, second)
    keys, first, second = joined(text_key, key)
    text_turns.turned(text_key, attn.norm_added_k, first)
    turns.turned(key, attn.norm_k, second)
    return queries, keys, values


class FusedFluxProcessor(FluxAttnProcessor):
    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if attn.fused_projections or image_rotary_emb is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        rotation = Rotation.of_repeated(*image_rotary_emb)
        query, key, value = projected(attn, hidden_states, encoder_hidden_states, rotation)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        attended = attended.flatten(2, 3)
        if encoder_hidden_states is None:
            return attended
        num_text = encoder_hidden_states.shape[1]
        text, picture = attended[:, :num_text], attended[:, num_text:]
        return attn.to_out[1](attn.to_out[0](picture.contiguous())), attn.to_add_out(text.contiguous())


class FusedFluxBlock(FluxTransformerBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if joint_attention_kwargs or hidden_states.dtype == torch.float16:
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        of_picture, of_text = self.norm1, self.norm1_context
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = of_picture.linear(of_picture.silu(temb)).chunk(6, dim=1)
        t_shift, t_scale, t_gate, t_shift_mlp, t_scale_mlp, t_gate_mlp = of_text.linear(of_text.silu(temb)).chunk(
            6, dim=1
        )
        picture, text = self.attn(
            hidden_states=norm_modulate(hidden_states, layer_norm(of_picture.norm), Modulation(scale, shift)),
            encoder_hidden_states=norm_modulate(
                encoder_hidden_states, layer_norm(of_text.norm), Modulation(t_scale, t_shift)
            ),
            image_rotary_emb=image_rotary_emb,
        )
        hidden_states, normed = add_gated_norm_modulate(
            hidden_states, picture, gate, layer_norm(self.norm2), Modulation(scale_mlp, shift_mlp)
        )
        hidden_states = add_gated(hidden_states, self.ff(normed), gate_mlp)
        encoder_hidden_states, normed = add_gated_norm_modulate(
            encoder_hidden_states, text, t_gate, layer_norm(self.norm2_context), Modulation(t_scale_mlp, t_shift_mlp)
        )
        return add_gated(encoder_hidden_states, self.ff_context(normed), t_gate_mlp), hidden_states


class FusedFluxSingleBlock(FluxSingleTransformerBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if joint_attention_kwargs or hidden_states.dtype == torch.float16:
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        num_text = encoder_hidden_states.shape[1]
        both = side_by_side(encoder_hidden_states, hidden_states)
        shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
        normed = norm_modulate(both, layer_norm(self.norm.norm), Modulation(scale, shift))
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        branch = linear_of_joined(self.proj_out, attended, linear_gelu(self.proj_mlp, normed))
        both = add_gated(both, branch, gate)
        return both[:, :num_text], both[:, num_text:]
