"""How families are split that diffusers has no table for; what a plan says, `sharding` does.

Shapes: B batch, S tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0

from .attention import Shares, attend


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where a transformer's sequences are split and gathered, and whose attention must know of it."""

    edges: Mapping[str, Any]
    """By submodule (``*``: each of a list, ``-1``: its last), in diffusers' notation: what is split on the way in or
    out, and what is gathered."""
    whole: tuple[str, ...] = ()
    """Submodules that hold all of their tokens on every rank, too few to be worth splitting."""
    processors: Mapping[type, Callable[[Shares], Any]] = field(default_factory=dict)
    """Attention that does not go through diffusers' dispatch, by its class, and what takes its place."""
    unordered: str | None = None
    """A block's attention that does not depend on its other one. Blocks that have it are not compiled: a compiler would
    be free to order the two exchanges, and ranks whose shares differ might be compiled to different orders."""


class JointAttention:
    """Attention of Stable Diffusion 3: pictures and text in one sequence, or the picture's alone.

    As diffusers' `JointAttnProcessor2_0`, which calls torch's attention by itself. A rank's sequence is its share of
    the picture and then its share of the text; in which order keys come does not matter without a mask.
    """

    def __init__(self, shares: Shares) -> None:
        self._shares = shares

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the attention of the picture's tokens (B, S, H * D) and, where given, of the text's.

        Raises ValueError for a mask, which this family has none of.
        """
        if attention_mask is not None:
            raise ValueError("Stable Diffusion 3 attends without a mask")
        query, key, value = (
            _heads(layer(hidden_states), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )  # fmt: skip
        query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
        if encoder_hidden_states is not None:
            text_query, text_key, text_value = (
                _heads(layer(encoder_hidden_states), attn.heads)
                for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            query = torch.cat((query, _normed(attn.norm_added_q, text_query)), dim=1)
            key = torch.cat((key, _normed(attn.norm_added_k, text_key)), dim=1)
            value = torch.cat((value, text_value), dim=1)
        out = attend(query, key, value, None, None, self._shares).flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return attn.to_out[0](out)
        picture, text = out.tensor_split([hidden_states.shape[1]], dim=1)
        return attn.to_out[0](picture), text if attn.context_pre_only else attn.to_add_out(text)


class MaskedJointAttention:
    """Attention of HunyuanVideo 1.5: a clip and its texts, some of whose tokens are padding.

    As diffusers' `HunyuanVideo15AttnProcessor2_0`, but with a mask of keys in place of one of pairs, which would be the
    square of the sequence in size. They differ for padding alone, which nobody attends to.
    """

    def __init__(self, shares: Shares) -> None:
        self._shares = shares

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attention of the clip's tokens and of the texts', both (B, S, H * D).

        `attention_mask`, (B, S) and True for real tokens, tells of the texts; `image_rotary_emb` of the clip.
        """
        query, key, value = (
            _heads(layer(hidden_states), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )  # fmt: skip
        query = apply_rotary_emb(attn.norm_q(query), image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(attn.norm_k(key), image_rotary_emb, sequence_dim=1)
        text_query, text_key, text_value = (
            _heads(layer(encoder_hidden_states), attn.heads)
            for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        query = torch.cat((query, _normed(attn.norm_added_q, text_query)), dim=1)
        key = torch.cat((key, _normed(attn.norm_added_k, text_key)), dim=1)
        value = torch.cat((value, text_value), dim=1)
        mask = F.pad(attention_mask.bool(), (hidden_states.shape[1], 0), value=True)
        out = attend(query, key, value, mask, None, self._shares).flatten(2).to(query.dtype)
        clip, text = out.tensor_split([hidden_states.shape[1]], dim=1)
        return attn.to_out[0](clip), attn.to_add_out(text)


def _heads(x_BSW: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, S, H * D) to (B, S, H, D)."""
    return x_BSW.unflatten(2, (num_heads, -1))


def _normed(norm: torch.nn.Module | None, x_BSHD: torch.Tensor) -> torch.Tensor:
    return x_BSHD if norm is None else norm(x_BSHD)


def _split(dim: int, dims: int, *, result: bool = False) -> ContextParallelInput:
    """Split a tensor of `dims` axes along `dim`: an argument, or a module's result."""
    return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=result)


_GATHERED = ContextParallelOutput(gather_dim=1, expected_dims=3)

_Z_IMAGE_LAYER = {"attn_mask": _split(1, 2), "freqs_cis": _split(1, 3), "noise_mask": _split(1, 2)}

OWN_PLANS: Mapping[str, Plan] = {
    "SD3Transformer2DModel": Plan(
        # Split where tokens are made and not at the first block, which guidance by skipped layers may leave out.
        edges={
            "pos_embed": {0: _split(1, 3, result=True)},
            "context_embedder": {0: _split(1, 3, result=True)},
            "proj_out": _GATHERED,
        },
        processors={JointAttnProcessor2_0: JointAttention},
        unordered="attn2",
    ),
    "HunyuanVideo15Transformer3DModel": Plan(
        edges={
            "x_embedder": {0: _split(1, 3, result=True)},
            "rope": {0: _split(0, 2, result=True), 1: _split(0, 2, result=True)},
            "transformer_blocks.0": {"encoder_hidden_states": _split(1, 3)},
            "transformer_blocks.*": {"attention_mask": _split(1, 2)},
            "proj_out": _GATHERED,
        },
        whole=("context_embedder",),
        processors={HunyuanVideo15AttnProcessor2_0: MaskedJointAttention},
    ),
    "ZImageTransformer2DModel": Plan(
        # The picture's tokens are refined by themselves, then joined to the text's, sample by sample: whole again for
        # a moment.
        edges={
            "noise_refiner.0": {"x": _split(1, 3)},
            "noise_refiner.*": _Z_IMAGE_LAYER,
            "noise_refiner.-1": _GATHERED,
            "layers.0": {"x": _split(1, 3)},
            "layers.*": _Z_IMAGE_LAYER,
            "layers.-1": _GATHERED,
        },
        whole=("context_refiner", "siglip_refiner"),
    ),
}
"""By the transformer's class, where diffusers has none."""
