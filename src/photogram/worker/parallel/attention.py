"""Attention over a sequence whose tokens lie on several ranks: Ulysses inside, ring around it.

Shapes: B batch, S tokens (of one rank where nothing else is said), H heads, D head width, U and R the two degrees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .lengths import Lengths
from .mesh import Mesh


@dataclass(frozen=True, slots=True)
class Shares:
    """What attention needs to know of the ranks; kept where diffusers keeps its own parallel configuration."""

    mesh: Mesh
    lengths: Lengths


def attend(
    q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, mask: torch.Tensor | None,
    scale: float | None, shares: Shares,
) -> torch.Tensor:  # fmt: skip
    """Return this rank's rows of the attention of all ranks' tokens to all ranks' tokens, (B, S, H, D).

    `mask` tells of this rank's keys, (B, S), (B, 1, 1, S) or (B, H, 1, S), boolean or additive. Raises ValueError for a
    mask that differs from query to query, which cannot be told from one rank's part.
    """
    mesh = shares.mesh
    q_lengths = shares.lengths.of(q_BSHD.shape[1])
    k_lengths = shares.lengths.of(k_BSHD.shape[1])
    bias_BHS = None if mask is None else _of_own_heads(shares.lengths.gather(_as_bias(mask, q_BSHD.dtype), 2), mesh)
    in_group = _members(mesh.ring_index, mesh)
    q, k, v = (
        _heads_for_tokens(x, [lengths[rank] for rank in in_group], mesh)
        for x, lengths in ((q_BSHD, q_lengths), (k_BSHD, k_lengths), (v_BSHD, k_lengths))
    )
    if mesh.degrees.ring == 1:
        bias = None if bias_BHS is None else bias_BHS[:, :, None, :]
        out = F.scaled_dot_product_attention(*(_heads_first(x) for x in (q, k, v)), attn_mask=bias, scale=scale)
        out = out.transpose(1, 2)
    else:
        out = _around_the_ring(q, k, v, bias_BHS, k_lengths, scale, mesh)
    return _tokens_for_heads(out, [q_lengths[rank] for rank in in_group], mesh)


def _of_own_heads(bias_BHS: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The part that concerns the heads this rank attends with."""
    if bias_BHS.shape[1] == 1:
        return bias_BHS
    return bias_BHS.chunk(mesh.degrees.ulysses, dim=1)[mesh.ulysses_index]


def _members(ring_index: int, mesh: Mesh) -> range:
    """Ranks of the Ulysses group at a place of the ring."""
    return range(ring_index * mesh.degrees.ulysses, (ring_index + 1) * mesh.degrees.ulysses)


# --- Ulysses ------------------------------------------------------------------------------------------------------


def _heads_for_tokens(x_BSHD: torch.Tensor, lengths: list[int], mesh: Mesh) -> torch.Tensor:
    """Give away all heads but this rank's share and get them of the whole group's tokens: (B, S of all, H / U, D)."""
    U = mesh.degrees.ulysses
    if U == 1:
        return x_BSHD
    B, S, H, D = x_BSHD.shape
    mine = x_BSHD.reshape(B, S, U, H // U, D).permute(2, 1, 0, 3, 4).reshape(U * S, B, H // U, D).contiguous()
    theirs = mine.new_empty(sum(lengths), B, H // U, D)
    dist.all_to_all_single(theirs, mine, lengths, [S] * U, group=mesh.ulysses)
    return theirs.transpose(0, 1)


def _tokens_for_heads(x_BShD: torch.Tensor, lengths: list[int], mesh: Mesh) -> torch.Tensor:
    """The way back: (B, S of all, H / U, D) to this rank's tokens with all heads."""
    U = mesh.degrees.ulysses
    if U == 1:
        return x_BShD
    B, _, h, D = x_BShD.shape
    S = lengths[mesh.ulysses_index]
    mine = x_BShD.transpose(0, 1).contiguous()
    theirs = mine.new_empty(U * S, B, h, D)
    dist.all_to_all_single(theirs, mine, [S] * U, lengths, group=mesh.ulysses)
    return theirs.reshape(U, S, B, h, D).permute(2, 1, 0, 3, 4).reshape(B, S, U * h, D)


# --- ring ---------------------------------------------------------------------------------------------------------


def _around_the_ring(
    q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, bias_BHS: torch.Tensor | None,
    lengths: tuple[int, ...], scale: float | None, mesh: Mesh,
) -> torch.Tensor:  # fmt: skip
    """Attend to one group's keys after the other while the next ones are on their way, (B, S, H, D).

    The parts are joined by the logarithms of their softmax's sums (FlashAttention, arXiv:2205.14135), in fp32.
    """
    R = mesh.degrees.ring
    totals = [sum(lengths[rank] for rank in _members(index, mesh)) for index in range(R)]
    starts = [sum(totals[:index]) for index in range(R)]
    query = _heads_first(q_BSHD)
    here = torch.stack((k_BSHD, v_BSHD)).contiguous()  # (2, B, S, H, D)
    out, lse = None, None
    for turn in range(R):
        place = (mesh.ring_index - turn) % R  # whose keys these are
        arriving, transfers = None, []
        if turn < R - 1:
            _, B, _, H, D = here.shape
            arriving = here.new_empty(2, B, totals[(place - 1) % R], H, D)
            transfers = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, here, mesh.ring_rank(mesh.ring_index + 1), mesh.ring),
                    dist.P2POp(dist.irecv, arriving, mesh.ring_rank(mesh.ring_index - 1), mesh.ring),
                ]
            )
        bias = None if bias_BHS is None else bias_BHS[:, :, starts[place] : starts[place] + totals[place]]
        part, part_lse = _attention_with_lse(query, _heads_first(here[0]), _heads_first(here[1]), bias, scale)
        if out is None or lse is None:
            out, lse = part.float(), part_lse
        else:
            joint = torch.logaddexp(lse, part_lse)
            out = out * (lse - joint).exp().unsqueeze(-1) + part.float() * (part_lse - joint).exp().unsqueeze(-1)
            lse = joint
        for transfer in transfers:
            transfer.wait()
        if arriving is not None:
            here = arriving
    assert out is not None
    return out.to(q_BSHD.dtype).transpose(1, 2)


def _attention_with_lse(
    q_BHSD: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, bias_BHS: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the logarithm of its softmax's sums: (B, H, S, D) and, in fp32, (B, H, S)."""
    bias = None
    if bias_BHS is not None:
        B, H, S, _ = q_BHSD.shape
        bias = bias_BHS[:, :, None, :].expand(B, H, S, -1)
    if q_BHSD.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHSD, k_BHSD, v_BHSD, attn_mask=bias, scale=scale
        )
    elif bias is None and q_BHSD.dtype in (torch.bfloat16, torch.float16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q_BHSD, k_BHSD, v_BHSD, scale=scale)
    else:
        if bias is not None:
            bias = bias.contiguous()
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BHSD, k_BHSD, v_BHSD, bias, compute_log_sumexp=True, scale=scale
        )
    return out, lse[..., : q_BHSD.shape[2]].float()


def _heads_first(x_BSHD: torch.Tensor) -> torch.Tensor:
    return x_BSHD.transpose(1, 2).contiguous()


# --- masks --------------------------------------------------------------------------------------------------------


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of keys as something to add to the scores, (B, H, S); H is 1 where all heads have the same."""
    if mask.dim() == 2:
        mask = mask[:, None]
    elif mask.dim() == 4 and mask.shape[2] == 1:
        mask = mask[:, :, 0]
    else:
        raise ValueError(f"attention mask of shape {tuple(mask.shape)}: only masks of keys can be split over ranks")
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return mask.to(dtype)
