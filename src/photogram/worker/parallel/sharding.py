"""Splits a denoiser's sequences over the ranks, through diffusers' private parallel interface.

Which arguments and results are split, and along which axis, is diffusers' own table (`_cp_plan` of each
transformer) or, for a family that has none, ours (`plans`). How they are split and how attention joins them is ours:
diffusers' own code refuses lengths that do not divide and has no attention with log-sum-exp on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from .attention import Shares, attend
from .plans import OWN_PLANS, Plan

_native_attention = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]


def plan_of(network: type) -> Plan | None:
    """Return how networks of a class are split, or None where nothing is known of it."""
    own = OWN_PLANS.get(network.__name__)
    if own is not None:
        return own
    edges = vars(network).get("_cp_plan")
    return None if edges is None else Plan(edges=edges)


def num_heads(config: Mapping[str, Any]) -> int | None:
    """Return the number of attention heads by a denoiser's configuration, where it says."""
    heads = config.get("num_attention_heads", config.get("n_heads"))
    return heads if isinstance(heads, int) else None


def shard(denoiser: torch.nn.Module, shares: Shares) -> None:
    """Make a denoiser run sharded from now on. To be called on every rank, after its blocks were replaced or compiled
    and before its methods are wrapped.

    `fitting` has seen to it that there is a plan and that its heads divide.
    """
    plan = plan_of(type(denoiser))
    assert plan is not None, type(denoiser).__name__
    _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE] = _attention
    for path, module in denoiser.named_modules():
        if plan.unordered in dict(module.named_children()):
            module._compiled_call_impl = None
        if path.split(".")[0] not in plan.whole:
            _split_attention(module, plan, shares)
    for path, entry in plan.edges.items():
        for module in _found(denoiser, path):
            hook = _Split(entry, shares) if isinstance(entry, dict) else _Gather(_outputs(entry), shares)
            _put_around(module, hook)


def _put_around(module: torch.nn.Module, hook: ModelHook) -> None:
    """Let a module's calls run within a hook.

    Around what is compiled, not within it: blocks at an edge then run the program that all others run, and lengths that
    differ from rank to rank are no part of it.
    """
    hook.initialize_hook(module)
    place = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
    real = getattr(module, place)

    @functools.wraps(real)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return hook.post_forward(module, real(*args, **kwargs))

    setattr(module, place, hooked)


def _split_attention(module: torch.nn.Module, plan: Plan, shares: Shares) -> None:
    """Make a module's attention, where it has one, attend to all ranks' tokens."""
    processor = vars(module).get("processor")
    own = plan.processors.get(type(processor))
    if own is not None:
        module.processor = own(shares)
    elif processor is not None and "_parallel_config" in dir(processor):
        processor._parallel_config = shares


def _found(model: torch.nn.Module, path: str) -> list[torch.nn.Module]:
    """The submodules at a plan's path."""
    found = [model]
    for name in path.split(".") if path else ():
        if name == "*":
            found = [child for one in found for child in one.children()]
        elif name == "-1":
            found = [list(one.children())[-1] for one in found]
        else:
            found = [one.get_submodule(name) for one in found]
    return found


def _outputs(entry: Any) -> list[Any]:
    return [entry] if isinstance(entry, ContextParallelOutput) else list(entry)


class _Split(ContextParallelSplitHook):
    def _prepare_cp_input(self, x: torch.Tensor, cp_input: ContextParallelInput) -> torch.Tensor:
        if cp_input.expected_dims is not None and x.dim() != cp_input.expected_dims:
            return x
        mesh = self.parallel_config.mesh
        length = x.shape[cp_input.split_dim]
        if length < mesh.size:
            raise ValueError(f"{length} tokens cannot be split over {mesh.size} ranks")
        return x.tensor_split(mesh.size, dim=cp_input.split_dim)[mesh.rank]


class _Gather(ContextParallelGatherHook):
    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        for index, entry in enumerate(self.metadata):
            if entry is not None:
                outputs[index] = self.parallel_config.lengths.gather(outputs[index], entry.gather_dim)
        return outputs[0] if isinstance(output, torch.Tensor) else tuple(outputs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Shares | None = None,
) -> torch.Tensor:
    """diffusers' native attention, or ours for tokens that are split over the ranks."""
    if _parallel_config is None:
        return _native_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
    if is_causal or enable_gqa or dropout_p:
        raise ValueError("causal, grouped or random attention cannot be split over ranks")
    return attend(query, key, value, attn_mask, scale, _parallel_config)
