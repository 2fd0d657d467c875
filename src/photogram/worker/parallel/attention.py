"""Attention over a sequence whose tokens lie on several ranks: Ulysses inside, ring around it.

Shapes: B batch, S tokens (of one rank where nothing else is said), H heads, D head width, U and R the two degrees.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from .lengths import Lengths
from .mesh import Mesh

_HALVES = (torch.bfloat16, torch.float16)

# Of a rank's queries. Below that an exchange takes about as long as it takes to launch another one.
LEAST_BYTES_IN_PARTS = 32_000_000

# Operators take numbers, no objects: compiled code names its ranks by one, as torch's own collectives do their groups.
_numbers = itertools.count()
_numbered: weakref.WeakValueDictionary[int, Shares] = weakref.WeakValueDictionary()


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Shares:
    """What attention needs to know of the ranks; kept where diffusers keeps its own parallel configuration."""

    mesh: Mesh
    lengths: Lengths
    number: int = field(default_factory=_numbers.__next__, init=False)

    def __post_init__(self) -> None:
        _numbered[self.number] = self


def attend(
    q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, mask: torch.Tensor | None,
    scale: float | None, shares: Shares,
) -> torch.Tensor:  # fmt: skip
    """Return this rank's rows of the attention of all ranks' tokens to all ranks' tokens, (B, S, H, D).

    `mask` tells of this rank's keys, (B, S), (B, 1, 1, S) or (B, H, 1, S), boolean or additive. Raises ValueError for a
    mask that differs from query to query, which cannot be told from one rank's part. Compiled, it is one operator.
    """
    if torch.compiler.is_compiling():
        return _attend_as_operator(q_BSHD, k_BSHD, v_BSHD, mask, scale, shares.number)
    return _attend(q_BSHD, k_BSHD, v_BSHD, mask, scale, shares)


# A compiler may not look into it: lengths are asked of other ranks, and collectives are no part of a graph.
@torch.library.custom_op("photogram::attend_over_ranks", mutates_args=())
def _attend_as_operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None, shares: int
) -> torch.Tensor:
    return _attend(q, k, v, mask, scale, _numbered[shares]).contiguous()


@_attend_as_operator.register_fake
def _(q, k, v, mask, scale, shares):  # noqa: ANN001, ANN202
    return q.new_empty(q.shape)


def _attend(
    q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, mask: torch.Tensor | None,
    scale: float | None, shares: Shares,
) -> torch.Tensor:  # fmt: skip
    mesh = shares.mesh
    q_lengths = shares.lengths.of(q_BSHD.shape[1])
    k_lengths = shares.lengths.of(k_BSHD.shape[1])
    bias_BHS = None if mask is None else _of_own_heads(shares.lengths.gather(_as_bias(mask, q_BSHD.dtype), 2), mesh)
    in_group = _members(mesh.ring_index, mesh)
    queries, keys = ([lengths[rank] for rank in in_group] for lengths in (q_lengths, k_lengths))
    num_parts = _num_parts(q_BSHD, max(q_lengths), mesh)
    # All are on their way at once, one behind the other: the first part attends while the next one travels.
    parts = [_heads_sent(q_BSHD, k_BSHD, v_BSHD, queries, keys, (part, num_parts), mesh) for part in range(num_parts)]
    returning = []
    for part, arrived in enumerate(parts):
        q, k, v = arrived()
        if mesh.degrees.ring == 1:
            bias = None if bias_BHS is None else _heads_of_part(bias_BHS, part, num_parts)[:, :, None, :]
            out = F.scaled_dot_product_attention(*(_heads_first(x) for x in (q, k, v)), attn_mask=bias, scale=scale)
            out = out.transpose(1, 2)
        else:
            out = _around_the_ring(q, k, v, bias_BHS, k_lengths, scale, mesh)
        returning.append(_tokens_sent(out, queries, mesh))
    return _joined(returning, q_BSHD.shape)


def _num_parts(q_BSHD: torch.Tensor, longest: int, mesh: Mesh) -> int:
    """Return in how many parts the heads of a rank are exchanged: on all ranks the same, so by the `longest` share."""
    own_heads = q_BSHD.shape[2] // mesh.degrees.ulysses
    is_large = q_BSHD.nbytes // q_BSHD.shape[1] * longest >= LEAST_BYTES_IN_PARTS
    return 2 if mesh.degrees.ulysses > 1 and mesh.degrees.ring == 1 and is_large and own_heads % 2 == 0 else 1


def _heads_of_part(bias_BHS: torch.Tensor, part: int, num_parts: int) -> torch.Tensor:
    return bias_BHS if bias_BHS.shape[1] == 1 else bias_BHS.chunk(num_parts, dim=1)[part]


def _of_own_heads(bias_BHS: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The part that concerns the heads this rank attends with."""
    if bias_BHS.shape[1] == 1:
        return bias_BHS
    return bias_BHS.chunk(mesh.degrees.ulysses, dim=1)[mesh.ulysses_index]


def _members(ring_index: int, mesh: Mesh) -> range:
    """Ranks of the Ulysses group at a place of the ring."""
    return range(ring_index * mesh.degrees.ulysses, (ring_index + 1) * mesh.degrees.ulysses)


# --- Ulysses ------------------------------------------------------------------------------------------------------


def _heads_sent(
    q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, queries: list[int], keys: list[int],
    part: tuple[int, int], mesh: Mesh,
) -> Callable[[], tuple[torch.Tensor, ...]]:  # fmt: skip
    """Begin to exchange queries, keys and values, in one piece where they have the same tokens; what is returned waits
    for them. `part`: which one, and of how many."""
    if queries == keys:
        return _heads_for_tokens((q_BSHD, k_BSHD, v_BSHD), keys, part, mesh)
    q = _heads_for_tokens((q_BSHD,), queries, part, mesh)
    k_v = _heads_for_tokens((k_BSHD, v_BSHD), keys, part, mesh)
    return lambda: q() + k_v()


def _heads_for_tokens(
    tensors_BSHD: tuple[torch.Tensor, ...], lengths: list[int], part: tuple[int, int], mesh: Mesh
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Give away all heads but this rank's share of each tensor and get them of the whole group's tokens: for each
    (B, S of all, h, D), h heads being a part of H / U. The tensors are of one shape and travel together."""
    U = mesh.degrees.ulysses
    if U == 1:
        return lambda: tensors_BSHD
    B, S, _, D = tensors_BSHD[0].shape
    index, num_parts = part
    by_rank = [x.reshape(B, S, U, num_parts, -1, D)[:, :, :, index].permute(2, 1, 0, 3, 4) for x in tensors_BSHD]
    mine = torch.stack(by_rank, dim=2)  # (U, S, tensors, B, h, D)
    theirs = mine.new_empty(sum(lengths), *mine.shape[2:])
    work = dist.all_to_all_single(
        theirs, mine.flatten(0, 1), lengths, [S] * U, group=mesh.ulysses, async_op=True
    )  # fmt: skip

    def arrived() -> tuple[torch.Tensor, ...]:
        work.wait()
        return tuple(x.transpose(0, 1) for x in theirs.unbind(1))

    return arrived


def _tokens_sent(x_BShD: torch.Tensor, lengths: list[int], mesh: Mesh) -> Callable[[], torch.Tensor]:
    """Begin the way back: (B, S of all, h, D) to this rank's tokens with these heads of all, (U, S, B, h, D)."""
    U = mesh.degrees.ulysses
    mine = x_BShD.transpose(0, 1).contiguous()
    if U == 1:
        return lambda: mine[None]
    S = lengths[mesh.ulysses_index]
    theirs = mine.new_empty(U * S, *mine.shape[1:])
    work = dist.all_to_all_single(theirs, mine, [S] * U, lengths, group=mesh.ulysses, async_op=True)

    def arrived() -> torch.Tensor:
        work.wait()
        return theirs.unflatten(0, (U, S))

    return arrived


def _joined(parts_USBhD: Sequence[Callable[[], torch.Tensor]], shape: torch.Size) -> torch.Tensor:
    """Return all parts' heads in their order, (B, S, H, D)."""
    if len(parts_USBhD) == 1:
        return parts_USBhD[0]().permute(2, 1, 0, 3, 4).reshape(shape)
    together: torch.Tensor | None = None
    for index, arrived in enumerate(parts_USBhD):
        part = arrived()
        U, S, B, h, D = part.shape
        if together is None:
            together = part.new_empty(B, S, U, len(parts_USBhD), h, D)
        together[:, :, :, index] = part.permute(2, 1, 0, 3, 4)
    assert together is not None
    return together.reshape(shape)


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
            out = torch.lerp(out, part.float(), (part_lse - lse).sigmoid().unsqueeze(-1))
            lse = torch.logaddexp(lse, part_lse)
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
    elif bias is None and _takes_cudnn(q_BHSD):
        # Of other layouts its logarithms are not to be relied on (diffusers' own note on this operator).
        own = (x.contiguous() for x in (q_BHSD, k_BHSD, v_BHSD))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*own, None, True, scale=scale)
        lse = lse.reshape(q_BHSD.shape[:3])
    elif bias is None and q_BHSD.dtype in _HALVES:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q_BHSD, k_BHSD, v_BHSD, scale=scale)
    else:
        if bias is not None:
            bias = bias.contiguous()
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BHSD, k_BHSD, v_BHSD, bias, compute_log_sumexp=True, scale=scale
        )
    return out, lse[..., : q_BHSD.shape[2]].float()


def _takes_cudnn(q_BHSD: torch.Tensor) -> bool:
    """Say whether a call of torch's attention would try cuDNN's kernels first, and these can do it."""
    order = _cur_sdpa_kernel_backends(with_priority=True)
    is_first = bool(order) and order[0] == SDPBackend.CUDNN_ATTENTION
    width = q_BHSD.shape[3]
    return is_first and q_BHSD.dtype in _HALVES and width % 8 == 0 and width <= 128


def _heads_first(x_BSHD: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D). Of one row the layout is that of a packed projection of queries, keys and values, which every
    kernel reads as it is."""
    x_BHSD = x_BSHD.transpose(1, 2)
    return x_BHSD if x_BHSD.shape[0] == 1 else x_BHSD.contiguous()


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
