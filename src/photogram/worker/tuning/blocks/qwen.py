"""Qwen-Image's transformer: blocks of two streams, text and picture."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformerBlock,
)

from ..kernels.ops import add_gated, add_gated_norm_modulate, norm_modulate
from ..kernels.reference import Modulation
from .parts import Rotation, joined, layer_norm, products_of_both

MODULATION_ROWS = "modulation_rows"
"""Among a call's `attention_kwargs`: the row of each sample in the blocks' tables of modulation."""


class FusedQwenProcessor(QwenDoubleStreamAttnProcessor2_0):
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if encoder_hidden_states is None or attention_mask is not None or image_rotary_emb is None:
            return super().__call__(
                attn,
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                attention_mask,
                image_rotary_emb,
            )
        width = attn.inner_dim // attn.heads
        num_text = encoder_hidden_states.shape[1]
        turns, text_turns = (Rotation.of_complex(table) for table in image_rotary_emb)
        texts, pictures, values = products_of_both(
            encoder_hidden_states,
            hidden_states,
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.to_q, attn.to_k, attn.to_v),
        )
        text_query, text_key, query, key, values = (
            part.unflatten(-1, (-1, width)) for part in (*texts[:2], *pictures[:2], values)
        )
        queries, first, second = joined(text_query, query)
        text_turns.turned(text_query, attn.norm_added_q, first)
        turns.turned(query, attn.norm_q, second)
        keys, first, second = joined(text_key, key)
        text_turns.turned(text_key, attn.norm_added_k, first)
        turns.turned(key, attn.norm_k, second)
        mask = None
        if encoder_hidden_states_mask is not None:
            seen = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            mask = torch.cat((encoder_hidden_states_mask, seen), dim=1)[:, None, None, :]
        attended = dispatch_attention_fn(
            queries,
            keys,
            values,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2, 3)
        picture = attn.to_out[0](attended[:, num_text:].contiguous())
        return attn.to_out[1](picture), attn.to_add_out(attended[:, :num_text].contiguous())


class FusedQwenBlock(QwenImageTransformerBlock):
    modulations: torch.Tensor
    """The block's part of a `ModulationTable`, where there is one: (rows, 12 D), the picture's vectors first."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: list[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = (joint_attention_kwargs or {}).get(MODULATION_ROWS)
        # An index tells the tokens of reference pictures apart, which have a modulation of their own.
        tokenwise = modulate_index is not None or self.zero_cond_t
        if rows is None and (joint_attention_kwargs or tokenwise or hidden_states.dtype == torch.float16):
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                temb,
                image_rotary_emb,
                joint_attention_kwargs,
                modulate_index,
            )
        if rows is None:
            of_picture, of_text = self.img_mod(temb), self.txt_mod(temb)
        else:
            of_picture, of_text = self.modulations.index_select(0, rows).chunk(2, dim=-1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = of_picture.chunk(6, dim=-1)
        t_shift, t_scale, t_gate, t_shift_mlp, t_scale_mlp, t_gate_mlp = of_text.chunk(6, dim=-1)
        picture, text = self.attn(
            hidden_states=norm_modulate(hidden_states, layer_norm(self.img_norm1), Modulation(scale, shift)),
            encoder_hidden_states=norm_modulate(
                encoder_hidden_states, layer_norm(self.txt_norm1), Modulation(t_scale, t_shift)
            ),
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
        )
        hidden_states, normed = add_gated_norm_modulate(
            hidden_states, picture, gate, layer_norm(self.img_norm2), Modulation(scale_mlp, shift_mlp)
        )
        hidden_states = add_gated(hidden_states, self.img_mlp(normed), gate_mlp)
        encoder_hidden_states, normed = add_gated_norm_modulate(
            encoder_hidden_states, text, t_gate, layer_norm(self.txt_norm2), Modulation(t_scale_mlp, t_shift_mlp)
        )
        return add_gated(encoder_hidden_states, self.txt_mlp(normed), t_gate_mlp), hidden_states
