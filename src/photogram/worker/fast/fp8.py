"""Linear layers in fp8: eight bits for every number of a product, a scale for every row of each of its factors.

The layers' own weights stay as they are, so that exact jobs are exact; beside each lies a copy in e4m3, each output's
row over its largest absolute value, and inputs are brought to the same form, token by token, as they come. Rows of a
batch do not know of each other, so that stacking changes nothing but rounding. On a GPU the products are torch's
(`_scaled_mm`, Ada Lovelace and later); a CPU has none, and multiplies the same fp8 numbers in fp32.

Of activations M rows of tokens, K inputs, N outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from ...core.errors import ConfigError
from ..tuning.kernels.ops import quantize_rows

if TYPE_CHECKING:
    from ..modules import BigModule

logger = logging.getLogger(__name__)

# `_scaled_mm` wants multiples of this; layers that are narrower than the second cost more to prepare than they save.
_MULTIPLE, _MIN_WIDTH = 16, 32

# Of these few rows go in, and a whole picture hangs on what comes out: modulations, times, norms.
_KEPT_WORDS = ("norm", "mod", "emb")


class Fp8Linears:
    """The linear layers of one denoiser that can compute in fp8, which they do inside `applied`."""

    def __init__(self, network: torch.nn.Module, device: torch.device) -> None:
        """Copies the weights at once. Raises ConfigError where the device cannot multiply in fp8."""
        check_device(device)
        self._layers = linear_layers(network)
        self._weights = [_Weight(layer) for layer in self._layers.values()]
        self._of: Hashable = ()  # what was merged into the weights of which these are copies
        self._is_on = False
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None  # an input, and it in fp8
        for layer, weight in zip(self._layers.values(), self._weights, strict=True):
            layer.forward = partial(self._forward, layer.forward, weight)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_bytes(self) -> int:
        """What the copies take."""
        return sum(weight.num_bytes for weight in self._weights)

    @contextmanager
    def applied(self, merged: Hashable) -> Iterator[None]:
        """Compute in fp8 inside. `merged` says what the weights are: where it has changed they are copied anew."""
        if merged != self._of:
            for weight in self._weights:
                weight.copy()
            self._of = merged
        self._is_on = True
        try:
            yield
        finally:
            self._is_on, self._last = False, None

    def _forward(
        self, real: Callable[[torch.Tensor], torch.Tensor], weight: _Weight, inputs: torch.Tensor
    ) -> torch.Tensor:
        if not self._is_on:
            return real(inputs)
        # Queries, keys and values are made of one input.
        if self._last is None or self._last[0] is not inputs:
            self._last = inputs, quantize_rows(inputs.reshape(-1, inputs.shape[-1]))
        return weight.product(*self._last[1], inputs.dtype).view(*inputs.shape[:-1], -1)


class _Weight:
    """One layer's weight in fp8."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        self._layer = layer
        self._rows_NK, self._scales_N1 = quantize_rows(layer.weight.detach())

    @property
    def num_bytes(self) -> int:
        return self._rows_NK.nbytes + self._scales_N1.nbytes

    def copy(self) -> None:
        rows, scales = quantize_rows(self._layer.weight.detach())
        self._rows_NK.copy_(rows)
        self._scales_N1.copy_(scales)

    def product(self, rows_MK: torch.Tensor, scales_M1: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the layer's output (M, N) for inputs in fp8."""
        bias = self._layer.bias
        if not rows_MK.is_cuda:
            product = (rows_MK.float() * scales_M1) @ (self._rows_NK.float() * self._scales_N1).T
            return (product if bias is None else product + bias.float()).to(dtype)
        product = torch._scaled_mm(
            rows_MK,
            self._rows_NK.T,
            scale_a=scales_M1,
            scale_b=self._scales_N1.T,
            bias=None if bias is None else bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,  # the only one there is with a scale for each row
            use_fast_accum=True,
        )
        return product.to(dtype)


def copy_to_fp8(modules: Mapping[str, BigModule], away: Collection[str], device: torch.device) -> list[str]:
    """Lay copies in fp8 beside the weights of the denoisers' linear layers, and say so in a line for each.

    Raises ConfigError where a denoiser is among those `away`, which are on the device for their calls only.
    """
    done: list[str] = []
    for name, module in modules.items():
        if module.is_denoiser:
            if name in away:
                raise ConfigError(f"--fp8-linears: there is no room to keep '{name}' on {device}.")
            module.fp8 = Fp8Linears(module.module, device)
            size = f"{module.fp8.num_bytes / 1e9:.2f} GB more"
            done.append(f"{name}: {module.fp8.num_layers} linear layers also in fp8, {size}")
            logger.info("%s", done[-1])
    return done


def check_device(device: torch.device) -> None:
    """Raise ConfigError where there are no products in fp8."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"--fp8-linears: {name} cannot multiply in fp8 (Ada Lovelace, Hopper and later can).")


def linear_layers(network: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the layers that are worth it and can bear it, by name: wide ones within the network's blocks."""
    return {name: layer for name, layer in network.named_modules() if _is_eligible(network, name, layer)}


def _is_eligible(network: torch.nn.Module, name: str, layer: torch.nn.Module) -> bool:
    if type(layer) is not torch.nn.Linear:
        return False
    sides = layer.weight.shape
    parts = name.split(".")
    # Attention of torch itself reads its projections' weights without calling them.
    is_read = isinstance(network.get_submodule(name.rpartition(".")[0]), torch.nn.MultiheadAttention)
    return (
        min(sides) >= _MIN_WIDTH
        and all(side % _MULTIPLE == 0 for side in sides)
        and any(part.isdecimal() for part in parts)
        and not any(word in part for part in parts for word in _KEPT_WORDS)
        and not is_read
    )
