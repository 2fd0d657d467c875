"""What is switched on by itself: of the settings that were left open, those with a figure that speaks for them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import msgspec
import torch

from ...core.worker_config import Tuning
from ...models.families import FASTER_WITH
from ..memory import free_bytes

logger = logging.getLogger(__name__)

# Memory that graphs may take, as a share of what is left beside the weights, at most.
GRAPHS_SHARE = 0.25
_SWITCHES = ("compile", "fused_kernels", "cuda_graphs")


def settled(
    wanted: Tuning, denoisers: Mapping[str, torch.nn.Module], device: torch.device, *, obstacle: str | None
) -> tuple[Tuning, tuple[str, ...]]:
    """Return the settings with nothing left open, and a line for each that was chosen here.

    Chosen is what `FASTER_WITH` has for all the denoisers, on a GPU; nothing where there is an `obstacle`, which says
    what it does not go together with. To be called once the weights are in their places: the room beside them counts.
    """
    open_ones = [name for name in _SWITCHES if getattr(wanted, name) is None]
    chosen = {} if device.type == "cpu" else _for_all(denoisers.values())
    lines: list[str] = []
    for name in open_ones:
        flag = f"--{name.replace('_', '-')}"
        if name in chosen and obstacle is not None:
            logger.info("%s is not chosen: it does not go together with %s", flag, obstacle)
        elif name == "cuda_graphs" and name in chosen and not _has_room(wanted, device):
            logger.info("%s is not chosen: there is too little memory beside the weights", flag)
        elif name in chosen:
            wanted = msgspec.structs.replace(wanted, **{name: True})
            lines.append(f"{flag} by itself: {chosen[name]}")
    return msgspec.structs.replace(wanted, **{name: bool(getattr(wanted, name)) for name in _SWITCHES}), tuple(lines)


def _for_all(denoisers: Collection[torch.nn.Module]) -> Mapping[str, str]:
    found = [FASTER_WITH.get(type(denoiser).__name__, {}) for denoiser in denoisers]
    return {name: found[0][name] for name in _SWITCHES if found and all(name in one for one in found)}


def _has_room(wanted: Tuning, device: torch.device) -> bool:
    left = free_bytes(device)
    return left is not None and wanted.cuda_graph_memory_bytes <= GRAPHS_SHARE * left
