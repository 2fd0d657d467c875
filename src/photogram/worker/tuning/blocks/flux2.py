"""FLUX.2's transformer: like FLUX.1's, with modulation that all blocks share and gated feed-forward networks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2Modulation,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2SingleTransformerBlock,
    Flux2SwiGLU,
    Flux2TransformerBlock,
)

from ..kernels.ops import add_gated, add_gated_norm_modulate, gated, norm_modulate
from ..kernels.reference import Modulation
from .flux import projected
from .parts import Rotation, layer_norm, linear_of_joined


class FusedFlux2Processor(Flux2AttnProcessor):
    def __call__(
        self,
        attn: Flux2Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if attn.fused_projections or image_rotary_emb is None or encoder_hidden_states is None:
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
        num_text = encoder_hidden_states.shape[1]
        text, picture = attended[:, :num_text], attended[:, num_text:]
        return attn.to_out[1](attn.to_out[0](picture)), attn.to_add_out(text)


class FusedFlux2ParallelProcessor(Flux2ParallelSelfAttnProcessor):
    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if image_rotary_emb is None:
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
        rotation = Rotation.of_repeated(*image_rotary_emb)
        together = attn.to_qkv_mlp_proj(hidden_states)
        qkv, wide = together.split([3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor], dim=-1)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in qkv.chunk(3, dim=-1))
        attended = dispatch_attention_fn(
            rotation.turned(query, attn.norm_q),
            rotation.turned(key, attn.norm_k),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return linear_of_joined(attn.to_out, attended.flatten(2, 3), attn.mlp_act_fn(wide))


class FusedFlux2SwiGLU(Flux2SwiGLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gated(*x.chunk(2, dim=-1), "silu")


def _vectors(modulation: torch.Tensor, sets: int) -> list[torch.Tensor]:
    """Return shift, scale and gate of each set, (B or 1, D)."""
    return [vector.reshape(-1, vector.shape[-1]) for one in Flux2Modulation.split(modulation, sets) for vector in one]


class FusedFlux2Block(Flux2TransformerBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb_mod_img: torch.Tensor,
        temb_mod_txt: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # With a vector for each token (of reference pictures), a cache or fp16's bounds.
        tokenwise = any(mod.ndim == 3 and mod.shape[1] > 1 for mod in (temb_mod_img, temb_mod_txt))
        if joint_attention_kwargs or tokenwise or hidden_states.dtype == torch.float16:
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                temb_mod_img,
                temb_mod_txt,
                image_rotary_emb,
                joint_attention_kwargs,
            )
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _vectors(temb_mod_img, 2)
        t_shift, t_scale, t_gate, t_shift_mlp, t_scale_mlp, t_gate_mlp = _vectors(temb_mod_txt, 2)
        picture, text = self.attn(
            hidden_states=norm_modulate(hidden_states, layer_norm(self.norm1), Modulation(scale, shift)),
            encoder_hidden_states=norm_modulate(
                encoder_hidden_states, layer_norm(self.norm1_context), Modulation(t_scale, t_shift)
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


class FusedFlux2SingleBlock(Flux2SingleTransformerBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        temb_mod: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        tokenwise = temb_mod.ndim == 3 and temb_mod.shape[1] > 1
        if (
            joint_attention_kwargs
            or tokenwise
            or encoder_hidden_states is not None
            or split_hidden_states
            or hidden_states.dtype == torch.float16
        ):
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                temb_mod,
                image_rotary_emb,
                joint_attention_kwargs,
                split_hidden_states,
                text_seq_len,
            )
        shift, scale, gate = _vectors(temb_mod, 1)
        normed = norm_modulate(hidden_states, layer_norm(self.norm), Modulation(scale, shift))
        branch = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        return add_gated(hidden_states, branch, gate)
