"""LoRA files made on the spot for tiny models, in the spelling of each trainer."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch

Tensors = dict[str, torch.Tensor]


class Maker:
    """Random tensors for keys; the same ones for the same seed."""

    def __init__(self, seed: int = 0) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def draw(self, *shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random) * scale

    def pair(self, down: str, up: str, shape: tuple[int, ...], rank: int) -> Tensors:
        """Factors for a weight of this shape; of a convolution the first has the kernel."""
        ones = (1,) * (len(shape) - 2)
        return {down: self.draw(rank, *shape[1:]), up: self.draw(shape[0], rank, *ones)}


def linears(module: torch.nn.Module, *words: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the linear layers whose name has one of the words; of all without words."""
    return {
        name: tuple(layer.weight.shape)
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and (not words or any(word in name for word in words))
    }


def diffusers_file(path: Path, module: str, layers: Mapping[str, tuple[int, ...]], *, rank: int, seed: int = 0) -> Path:
    """Write a plain diffusers file and return its path."""
    maker, tensors = Maker(seed), {}
    for name, shape in layers.items():
        tensors |= maker.pair(f"{module}.{name}.lora_A.weight", f"{module}.{name}.lora_B.weight", shape, rank)
    safetensors.torch.save_file(tensors, path)
    return path


def spelled(
    maker: Maker, keys: Iterable[tuple[str, tuple[int, ...]]], *, ends: tuple[str, str], rank: int, alpha: float | None
) -> Tensors:
    """Factors, and an alpha where given, for each (beginning of the keys, shape of the weight)."""
    tensors: Tensors = {}
    for key, shape in keys:
        tensors |= maker.pair(f"{key}.{ends[0]}", f"{key}.{ends[1]}", shape, rank)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")

Format = Callable[[Maker], Tensors]
