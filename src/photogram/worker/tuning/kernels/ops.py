"""The chains as blocks call them: Triton's on a GPU, plain torch elsewhere. `reference.py` says what each computes."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

from . import opaque, reference
from .reference import Modulation, Norm


def can_fuse(device: torch.device) -> bool:
    """Say whether Triton's kernels run on the device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def norm_modulate(x_BSD: torch.Tensor, norm: Norm, modulation: Modulation | None = None) -> torch.Tensor:
    if x_BSD.is_cuda:
        return _chains("norm").norm_modulate(x_BSD, norm, modulation)
    return reference.norm_modulate(x_BSD, norm, modulation)


def add_gated(x_BSD: torch.Tensor, branch_BSD: torch.Tensor, gate_BD: torch.Tensor | None = None) -> torch.Tensor:
    if x_BSD.is_cuda:
        return _chains("norm").add_gated(x_BSD, branch_BSD, gate_BD)
    return reference.add_gated(x_BSD, branch_BSD, gate_BD)


def add_gated_norm_modulate(
    x_BSD: torch.Tensor,
    branch_BSD: torch.Tensor,
    gate_BD: torch.Tensor | None,
    norm: Norm,
    modulation: Modulation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if x_BSD.is_cuda:
        return _chains("norm").add_gated_norm_modulate(x_BSD, branch_BSD, gate_BD, norm, modulation)
    return reference.add_gated_norm_modulate(x_BSD, branch_BSD, gate_BD, norm, modulation)


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


def rms_silu(x_BCTHW: torch.Tensor, gamma_C: torch.Tensor, scale: float) -> torch.Tensor:
    if x_BCTHW.is_cuda and x_BCTHW.is_contiguous(memory_format=torch.channels_last_3d):
        return _chains("activation").rms_silu(x_BCTHW, gamma_C, scale)
    return reference.rms_silu(x_BCTHW, gamma_C, scale)


def _chains(name: str) -> ModuleType:
    """Return the module that launches Triton's kernels or, to be compiled, the operators that do."""
    if torch.compiler.is_compiling():
        return opaque
    return importlib.import_module(f".{name}", __package__)
