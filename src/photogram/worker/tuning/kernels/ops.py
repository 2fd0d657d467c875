"""The chains as blocks call them: Triton's on a GPU, plain torch elsewhere. `reference.py` says what each computes."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

from . import opaque, reference
from .reference import Activation, Modulation, Norm


def can_fuse(device: torch.device) -> bool:
    """Say whether Triton's kernels run on the device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def norm_modulate(x_BSD: torch.Tensor, norm: Norm, modulation: Modulation | None = None) -> torch.Tensor:
    if x_BSD.is_cuda:
        return _chains("norm").norm_modulate(x_BSD, norm, modulation)
    return reference.norm_modulate(x_BSD, norm, modulation)


def add_gated(
    x_BSD: torch.Tensor,
    branch_BSD: torch.Tensor,
    gate_BD: torch.Tensor | None = None,
    branch_norm: Norm | None = None,
) -> torch.Tensor:
    chains = _chains("norm") if x_BSD.is_cuda else reference
    return chains.add_gated(x_BSD, branch_BSD, gate_BD, branch_norm)


def add_gated_norm_modulate(
    x_BSD: torch.Tensor,
    branch_BSD: torch.Tensor,
    gate_BD: torch.Tensor | None,
    norm: Norm,
    modulation: Modulation | None = None,
    branch_norm: Norm | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    chains = _chains("norm") if x_BSD.is_cuda else reference
    return chains.add_gated_norm_modulate(x_BSD, branch_BSD, gate_BD, norm, modulation, branch_norm)


def norm_rotate(
    x_BSHW: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out_BSHW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `out_BSHW`, or a tensor of its own, with what is computed of `x_BSHW` in it."""
    out = torch.empty(x_BSHW.shape, dtype=x_BSHW.dtype, device=x_BSHW.device) if out_BSHW is None else out_BSHW
    if x_BSHW.is_cuda:
        _chains("rope").norm_rotate(x_BSHW, weight, eps, cos, sin, out)
    else:
        reference.norm_rotate(x_BSHW, weight, eps, cos, sin, out)
    return out


def rms_silu(
    x_BCTHW: torch.Tensor, gamma_C: torch.Tensor, scale: float, out_BCTHW: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `out_BCTHW`, or a tensor of its own, with what is computed of `x_BCTHW` in it."""
    out = torch.empty_like(x_BCTHW) if out_BCTHW is None else out_BCTHW
    if x_BCTHW.is_cuda and _places_follow(x_BCTHW) and _places_follow(out):
        _chains("activation").rms_silu(x_BCTHW, gamma_C, scale, out)
    else:
        reference.rms_silu(x_BCTHW, gamma_C, scale, out)
    return out


def _places_follow(x_BCTHW: torch.Tensor) -> bool:
    """Say whether each sample has its channels last, and its frames one after the other."""
    return x_BCTHW.dim() == 5 and x_BCTHW[:1].is_contiguous(memory_format=torch.channels_last_3d)


def gated(x: torch.Tensor, value: torch.Tensor, kind: Activation) -> torch.Tensor:
    """Return the activation of `x` times `value`, both (..., D), which may be parts of one product."""
    rows = (x.flatten(0, -2), value.flatten(0, -2))
    result = _chains("activation").gated(*rows, kind) if x.is_cuda else reference.gated(*rows, kind)
    return result.view(x.shape)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the tanh form of GELU of a linear layer, on a GPU within the matrix product."""
    rows = x.flatten(0, -2)
    if not x.is_cuda:
        result = reference.linear_gelu(rows, weight, bias)
    elif torch.compiler.is_compiling():
        result = opaque.linear_gelu(rows, weight, bias)
    else:
        result = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    return result.view(*x.shape[:-1], -1)


def quantize_rows(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Not for compiled code."""
    if can_fuse(x_MK.device):
        return importlib.import_module(".quantize", __package__).quantize_rows(x_MK)
    return reference.quantize_rows(x_MK)


def _chains(name: str) -> ModuleType:
    """Return the module that launches Triton's kernels or, to be compiled, the operators that do."""
    if torch.compiler.is_compiling():
        return opaque
    return importlib.import_module(f".{name}", __package__)
