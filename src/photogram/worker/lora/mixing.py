"""Applies LoRAs beside the base weights, another set for each job's rows of one batch.

Of each layer, the factors of all jobs stand in one bank, ranks padded with zeros to the largest, so that a layer costs
two batched products whatever the number of LoRAs: (J, S, in) @ (J, in, r) @ (J, r, out) added to the layer's output.
J jobs, S rows times tokens of a job, r largest rank.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .changes import Difference, LowRank
from .sets import ModuleLoras, Segments

_BANKS_KEPT = 2


class NotMixable(Exception):
    """A pass with LoRAs of several jobs cannot be made right at one layer (None: it is not known at which)."""

    def __init__(self, layer: str | None, reason: str) -> None:
        super().__init__(reason)
        self.layer = layer


@dataclass(frozen=True, slots=True)
class _LayerBank:
    down: torch.Tensor | None  # (J, in, r)
    up: torch.Tensor | None  # (J, r, out)
    bias: torch.Tensor | None  # (J, 1, out)


Bank = dict[str, _LayerBank]
"""By the layer's name."""


class Mixer:
    """Adds each job's low-rank products to the outputs of one module's linear layers while a pass runs."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._banks: OrderedDict[tuple[Any, ...], Bank] = OrderedDict()

    def takes_hooks(self) -> bool:
        """Say whether anything can be applied: a compiled module would be compiled again for every combination."""
        return not any(is_compiled(part) for part in self._module.modules())

    def obstacles(self, loras: ModuleLoras) -> list[str]:
        """Return the parameters whose changes are no low-rank products of linear layers that are called as such."""
        return [name for name, changes in loras.changes.items() if not self._is_plain(name, [c for c, _ in changes])]

    def _is_plain(self, name: str, changes: Sequence[Any]) -> bool:
        layer, _, parameter = name.rpartition(".")
        owner, parent = self._module.get_submodule(layer), self._module.get_submodule(layer.rpartition(".")[0])
        # Attention of torch itself reads its projections' weights without calling them.
        if not isinstance(owner, torch.nn.Linear) or isinstance(parent, torch.nn.MultiheadAttention):
            return False
        if parameter == "bias":
            return all(isinstance(change, Difference) for change in changes)
        return all(isinstance(change, LowRank) and change.magnitude is None for change in changes)

    @contextmanager
    def applied(self, segments: Segments) -> Iterator[None]:
        """Apply the LoRAs of `segments` to the calls made inside. Raises NotMixable from within such a call."""
        bank = self._bank(segments)
        num_rows = [count for _, count in segments]
        hooks = [
            self._module.get_submodule(layer).register_forward_hook(_adder(layer, part, num_rows))
            for layer, part in bank.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def forget(self) -> None:
        """Free the banks' memory."""
        self._banks.clear()

    def _bank(self, segments: Segments) -> Bank:
        key = tuple(loras.key for loras, _ in segments)
        bank = self._banks.get(key)
        if bank is None:
            while len(self._banks) >= _BANKS_KEPT:
                self._banks.popitem(last=False)
            layers = dict.fromkeys(name.rpartition(".")[0] for loras, _ in segments for name in loras.changes)
            jobs = [loras for loras, _ in segments]
            bank = {layer: self._layer_bank(layer, jobs) for layer in layers}
        self._banks[key] = bank
        self._banks.move_to_end(key)
        return bank

    def _layer_bank(self, layer: str, jobs: Sequence[ModuleLoras]) -> _LayerBank:
        """Put the factors of one layer side by side, strengths and scales in the second, in the layer's precision."""
        weight = self._module.get_submodule(layer).get_parameter("weight")
        outputs, inputs = weight.shape
        like = {"dtype": weight.dtype, "device": self._device}
        factors = [self._factors(loras, f"{layer}.weight", outputs, inputs) for loras in jobs]
        rank = max(down.shape[0] for down, _ in factors)
        down_bank = up_bank = bias_bank = None
        if rank:
            down_bank = torch.zeros(len(jobs), inputs, rank, **like)
            up_bank = torch.zeros(len(jobs), rank, outputs, **like)
            for job, (down, up) in enumerate(factors):
                down_bank[job, :, : down.shape[0]] = down.T
                up_bank[job, : up.shape[1]] = up.T
        biases = [loras.changes.get(f"{layer}.bias", ()) for loras in jobs]
        if any(biases):
            total = torch.zeros(len(jobs), 1, outputs, device=self._device)
            for job, changes in enumerate(biases):
                for change, strength in changes:
                    change.add_to(total[job, 0], strength)
            bias_bank = total.to(weight.dtype)
        return _LayerBank(down_bank, up_bank, bias_bank)

    def _factors(self, loras: ModuleLoras, name: str, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one job's (r, in) and (out, r) in fp32, its LoRAs joined along the rank."""
        downs, ups = [torch.zeros(0, inputs, device=self._device)], [torch.zeros(outputs, 0, device=self._device)]
        for change, strength in loras.changes.get(name, ()):
            assert isinstance(change, LowRank)
            downs.append(change.down.to(self._device, torch.float32, non_blocking=True))
            ups.append(change.up.to(self._device, torch.float32, non_blocking=True) * (change.scale * strength))
        return torch.cat(downs), torch.cat(ups, dim=1)


def is_compiled(module: torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)


def _adder(layer: str, bank: _LayerBank, num_rows: Sequence[int]) -> Callable[..., torch.Tensor]:
    """Return the forward hook of one layer."""
    total = sum(num_rows)
    spread = None if len(set(num_rows)) == 1 else [job for job, count in enumerate(num_rows) for _ in range(count)]
    num_parts = len(num_rows) if spread is None else total

    def of_rows(factor: torch.Tensor) -> torch.Tensor:
        return factor if spread is None else factor[spread]

    def add(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        inputs = args[0]
        if len(num_rows) > 1:
            # (rows * k, S, D): rows outermost. Of two axes, anything but one vector a row could be packed tokens.
            fits = inputs.shape[0] % total == 0 if inputs.dim() > 2 else inputs.shape[0] == total
            if inputs.dim() < 2 or not fits:
                raise NotMixable(layer, f"{layer} sees {tuple(inputs.shape)} for {total} rows")
        result = output.reshape(num_parts, -1, output.shape[-1])
        if bank.down is not None and bank.up is not None:
            hidden = torch.bmm(inputs.reshape(num_parts, -1, inputs.shape[-1]).to(bank.down.dtype), of_rows(bank.down))
            up = of_rows(bank.up)
            if result.dtype == up.dtype == hidden.dtype:
                result = torch.baddbmm(result, hidden, up)
            else:
                result = result + torch.bmm(hidden, up).to(result.dtype)
        if bank.bias is not None:
            result = result + of_rows(bank.bias).to(result.dtype)
        return result.view(output.shape)

    return add
