"""Step caches over several ranks: whether a step is skipped is decided on whole sequences, so that all ranks agree.

diffusers' first-block cache compares what its first block adds with what it added a step ago. A rank sees its own
tokens only; ranks that decided by them would differ, and wait for each other for ever.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from diffusers.hooks import HookRegistry
from diffusers.hooks.first_block_cache import FBCHeadBlockHook

from .lengths import Lengths
from .mesh import Mesh


def agree(denoiser: torch.nn.Module, mesh: Mesh, lengths: Lengths) -> None:
    """Make this rank decide as the others of its CFG group do. After the cache was enabled, on every rank alike."""
    for hook in _head_hooks(denoiser):
        hook._should_compute_remaining_blocks = partial(_should_compute, hook, mesh, lengths)


def context_name(denoiser: torch.nn.Module) -> str | None:
    """Return the name of the cache context that is set; None without one, or without a cache."""
    for hook in _head_hooks(denoiser):
        context = hook.state_manager._context
        if context is not None:
            name: str = context.name
            return name
    return None


def _head_hooks(denoiser: torch.nn.Module) -> list[FBCHeadBlockHook]:
    registries = [getattr(module, "_diffusers_hook", None) for module in denoiser.modules()]
    return [
        hook
        for registry in registries
        if isinstance(registry, HookRegistry)
        for hook in registry.hooks.values()
        if isinstance(hook, FBCHeadBlockHook)
    ]


def _should_compute(hook: FBCHeadBlockHook, mesh: Mesh, lengths: Lengths, residual: torch.Tensor) -> bool:
    """Say whether the other blocks must run: diffusers' own rule on the sums of all ranks' tokens."""
    before = hook.state_manager.get_state().head_block_residual
    if before is None:
        return True
    sums = torch.stack([(residual - before).abs().sum(dtype=torch.float32), before.abs().sum(dtype=torch.float32)])
    dist.all_reduce(sums, group=mesh.everyone)
    change, size = sums.tolist()
    computes = size == 0 or change / size > hook.threshold
    lengths.fork(computes)
    return computes
