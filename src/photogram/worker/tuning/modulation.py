"""The table of Qwen-Image's modulation: what its blocks make of a timestep, kept for the calls to come.

Two layers of every block make shift, scale and gate of the timestep alone. A third of the network's weights is there,
read at every call for one product with a vector. The jobs of one schedule ask for the same timesteps again, and both
halves of a guided step for the same one; so each timestep's vectors are computed once, by the layers themselves and for
one row, and looked up from then on. The last timesteps asked for are kept.

A call's own timesteps say which rows it needs, and are read from the device for it: a few bytes, once the call's launch
is all that is left to do. The blocks are given the rows among the call's arguments, so that a call that was given none
computes what it needs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel

from .blocks.qwen import MODULATION_ROWS, FusedQwenBlock

# More than two schedules of 50 steps; 0.57 GB of Qwen-Image's.
NUM_TIMESTEPS = 128

_OTHERS_OF_TIMESTEP = ("guidance", "additional_t_cond")


class ModulationTable:
    """The vectors of one network's blocks by timestep, on its device."""

    def __init__(self, network: QwenImageTransformer2DModel, num_timesteps: int = NUM_TIMESTEPS) -> None:
        self._network = network
        self._blocks = [block for block in network.transformer_blocks if isinstance(block, FusedQwenBlock)]
        layer = self._blocks[0].img_mod[1]
        self._table = torch.empty(
            (len(self._blocks), num_timesteps, 2 * layer.out_features),
            dtype=layer.weight.dtype,
            device=layer.weight.device,
        )
        for block, vectors in zip(self._blocks, self._table, strict=True):
            # No part of its state; a parameter, whose sizes compilers take as they are.
            vars(block)["modulations"] = torch.nn.Parameter(vectors, requires_grad=False)
        self._numbers = torch.arange(num_timesteps, device=layer.weight.device)
        self._rows: OrderedDict[Hashable, int] = OrderedDict()  # by timestep and weights, the oldest first
        self._free = list(range(num_timesteps))

    @property
    def num_bytes(self) -> int:
        return self._table.nbytes

    @staticmethod
    def depends_on(layers: frozenset[str]) -> bool:
        """Say whether changes of these layers change what is in the table."""
        return any(".img_mod." in layer or ".txt_mod." in layer or "time_text_embed." in layer for layer in layers)

    def looked_up(self, kwargs: Mapping[str, Any], weights: Hashable) -> dict[str, Any]:
        """Return a call's arguments with the rows that its timesteps have in the table, filled where they were not.

        `weights` tells apart what the network's weights were; they must be as they are to be for the call. A call whose
        modulation depends on more than timesteps is returned as it is.
        """
        timestep, hidden_states = kwargs.get("timestep"), kwargs.get("hidden_states")
        has_others = any(kwargs.get(name) is not None for name in _OTHERS_OF_TIMESTEP)
        if timestep is None or hidden_states is None or has_others or kwargs.get("attention_kwargs"):
            return dict(kwargs)
        timesteps = timestep.to(hidden_states.dtype)
        keys = [(value, weights) for value in timesteps.tolist()]
        if len(set(keys)) > len(self._numbers):
            return dict(kwargs)
        for key in self._rows.keys() & set(keys):
            self._rows.move_to_end(key)  # so that none of the call's own makes room for another
        rows = [self._row(key, timesteps[i : i + 1], hidden_states) for i, key in enumerate(keys)]
        return {**kwargs, "attention_kwargs": {MODULATION_ROWS: self._on_device(rows)}}

    def _row(self, key: Hashable, timestep: torch.Tensor, hidden_states: torch.Tensor) -> int:
        row = self._rows.get(key)
        if row is None:
            if not self._free:
                self._free.append(self._rows.popitem(last=False)[1])
            row = self._free[-1]
            embedding = self._network.time_text_embed(timestep, hidden_states)
            for block, vectors in zip(self._blocks, self._table, strict=True):
                torch.cat((block.img_mod(embedding)[0], block.txt_mod(embedding)[0]), out=vectors[row])
            self._rows[key] = self._free.pop()
        return row

    def _on_device(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.cat([self._numbers[row : row + 1] for row in rows])


def modulation_table(network: torch.nn.Module) -> ModulationTable | None:
    """Return a table for a network whose blocks were fused, None where there is nothing to look up."""
    if type(network) is not QwenImageTransformer2DModel or network.config.zero_cond_t:
        return None
    if network.dtype == torch.float16 or not all(type(b) is FusedQwenBlock for b in network.transformer_blocks):
        return None
    return ModulationTable(network)
