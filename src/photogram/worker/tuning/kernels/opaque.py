"""The chains as operators that a compiler calls and does not look into.

Traced, a Triton kernel's launch would see sizes as symbols, and a kernel's width must be a number. Only compiled code
calls these: an operator costs some ten microseconds of the CPU that a plain launch does not.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from . import reference
from .reference import Activation, Modulation, Norm


def norm_modulate(x_BSD: torch.Tensor, norm: Norm, modulation: Modulation | None) -> torch.Tensor:
    return _norm_modulate(x_BSD, *_flat(norm, modulation))


def add_gated(
    x_BSD: torch.Tensor, branch_BSD: torch.Tensor, gate_BD: torch.Tensor | None, branch_norm: Norm | None
) -> torch.Tensor:
    return _add_gated(x_BSD, branch_BSD, gate_BD, *_flat_branch(branch_norm))


def add_gated_norm_modulate(
    x_BSD: torch.Tensor,
    branch_BSD: torch.Tensor,
    gate_BD: torch.Tensor | None,
    norm: Norm,
    modulation: Modulation | None,
    branch_norm: Norm | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    branch = _flat_branch(branch_norm)
    return _add_gated_norm_modulate(x_BSD, branch_BSD, gate_BD, *branch, *_flat(norm, modulation))


def norm_rotate(
    x_BSHW: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out_BSHW: torch.Tensor,
) -> None:
    _norm_rotate(x_BSHW, weight, eps, cos, sin, out_BSHW)


def rms_silu(x_BCTHW: torch.Tensor, gamma_C: torch.Tensor, scale: float, out_BCTHW: torch.Tensor) -> None:
    _rms_silu(x_BCTHW, gamma_C, scale, out_BCTHW)


def gated(x_SD: torch.Tensor, value_SD: torch.Tensor, kind: Activation) -> torch.Tensor:
    return _gated(x_SD, value_SD, kind)


def linear_gelu(x_SD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compilers would take the activation out of the product again, to be a pass over memory of its own."""
    return _linear_gelu(x_SD, weight, bias)


# --- the operators: an operator's arguments are tensors and numbers --------------------------------------------------


@torch.library.custom_op("photogram::norm_modulate", mutates_args=())
def _norm_modulate(
    x: torch.Tensor,
    eps: float,
    is_rms: bool,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> torch.Tensor:
    return _of(x, "norm").norm_modulate(x, *_structured(eps, is_rms, weight, bias, scale, shift))


@_norm_modulate.register_fake
def _(x, eps, is_rms, weight, bias, scale, shift):  # noqa: ANN001, ANN202
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("photogram::add_gated", mutates_args=())
def _add_gated(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    branch_eps: float,
    branch_weight: torch.Tensor | None,
) -> torch.Tensor:
    return _of(x, "norm").add_gated(x, branch, gate, _structured_branch(branch_eps, branch_weight))


@_add_gated.register_fake
def _(x, branch, gate, branch_eps, branch_weight):  # noqa: ANN001, ANN202
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("photogram::add_gated_norm_modulate", mutates_args=())
def _add_gated_norm_modulate(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    branch_eps: float,
    branch_weight: torch.Tensor | None,
    eps: float,
    is_rms: bool,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    chain = _structured(eps, is_rms, weight, bias, scale, shift)
    branch_norm = _structured_branch(branch_eps, branch_weight)
    return _of(x, "norm").add_gated_norm_modulate(x, branch, gate, *chain, branch_norm)


@_add_gated_norm_modulate.register_fake
def _(x, branch, gate, branch_eps, branch_weight, eps, is_rms, weight, bias, scale, shift):  # noqa: ANN001, ANN202
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return total, out


@torch.library.custom_op("photogram::norm_rotate", mutates_args={"out"})
def _norm_rotate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out: torch.Tensor,
) -> None:
    _of(x, "rope").norm_rotate(x, weight, eps, cos, sin, out)


@torch.library.custom_op("photogram::rms_silu", mutates_args={"out"})
def _rms_silu(x: torch.Tensor, gamma: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    _of(x, "activation").rms_silu(x, gamma, scale, out)


@torch.library.custom_op("photogram::gated", mutates_args=())
def _gated(x: torch.Tensor, value: torch.Tensor, kind: str) -> torch.Tensor:
    return _of(x, "activation").gated(x, value, kind)


@_gated.register_fake
def _(x, value, kind):  # noqa: ANN001, ANN202
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("photogram::linear_gelu", mutates_args=())
def _linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return reference.linear_gelu(x, weight, bias)


@_linear_gelu.register_fake
def _(x, weight, bias):  # noqa: ANN001, ANN202
    return torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)


def _flat(
    norm: Norm, modulation: Modulation | None
) -> tuple[float, bool, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    scale, shift = (None, None) if modulation is None else (modulation.scale, modulation.shift)
    return norm.eps, norm.is_rms, norm.weight, norm.bias, scale, shift


def _structured(
    eps: float,
    is_rms: bool,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[Norm, Modulation | None]:
    modulation = None if scale is None else Modulation(scale, shift)
    return Norm(eps=eps, is_rms=is_rms, weight=weight, bias=bias), modulation


def _flat_branch(norm: Norm | None) -> tuple[float, torch.Tensor | None]:
    return (0.0, None) if norm is None else (norm.eps, norm.weight)


def _structured_branch(eps: float, weight: torch.Tensor | None) -> Norm | None:
    return None if weight is None else Norm(eps=eps, is_rms=True, weight=weight)


def _of(x: torch.Tensor, name: str) -> ModuleType:
    """Return Triton's chains for a tensor on a GPU, else those in plain torch."""
    return importlib.import_module(f".{name}", __package__) if x.is_cuda else reference
