"""What an adapter does to one parameter of the model: the layout that every format is converted to.

All kinds are applied in fp32, in the order of merging; the sum is rounded to the model's precision once.
W (out, in) or, of a convolution, (out, in, *kernel); r rank; D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Change(ABC):
    """A change of one parameter. `add_to` works in place on an fp32 copy, on the copy's device."""

    @abstractmethod
    def add_to(self, weight: torch.Tensor, strength: float) -> None: ...

    def tensors(self) -> Iterator[torch.Tensor]:
        """Give the tensors it is made of."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                yield value

    @property
    def rank(self) -> int:
        return 0

    @property
    def does_nothing_at_zero(self) -> bool:
        """Whether strength 0 leaves the weight as it is."""
        return True

    @abstractmethod
    def fits(self, weight: torch.Tensor) -> bool:
        """Say whether the shapes are those of this weight."""


def _on(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return tensor.to(weight.device, torch.float32, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank(Change):
    """W + strength * scale * up @ down, and with a `magnitude` (DoRA) each row then scaled to that length.

    down (r, in * kernel), up (out, r), magnitude (out,). DoRA: Liu et al. 2024, as peft computes it.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    def add_to(self, weight: torch.Tensor, strength: float) -> None:
        flat = weight.view(weight.shape[0], -1)
        flat.addmm_(_on(self.up, weight), _on(self.down, weight), alpha=self.scale * strength)
        if self.magnitude is not None:
            flat.mul_((_on(self.magnitude, weight) / flat.norm(dim=1)).unsqueeze(1))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def does_nothing_at_zero(self) -> bool:
        return self.magnitude is None

    def fits(self, weight: torch.Tensor) -> bool:
        # Of the shape alone: a weight that waits in host memory cannot be looked into from another thread.
        outputs, inputs = weight.shape[0], weight.shape[1:].numel() if weight.dim() > 1 else 0
        has_magnitude = self.magnitude is None or self.magnitude.shape == (outputs,)
        return self.down.shape[1] == inputs and self.up.shape == (outputs, self.rank) and has_magnitude


@dataclass(frozen=True, slots=True, kw_only=True)
class Kronecker(Change):
    """LoKr: W + strength * scale * (left kron right), each factor whole or itself a product of two."""

    left: tuple[torch.Tensor, ...]
    right: tuple[torch.Tensor, ...]
    scale: float

    def add_to(self, weight: torch.Tensor, strength: float) -> None:
        left, right = (_product([_on(part, weight) for part in factor]) for factor in (self.left, self.right))
        while left.dim() < right.dim():  # a convolution's kernel is in the right factor
            left = left.unsqueeze(-1)
        weight.add_(torch.kron(left, right.contiguous()).reshape(weight.shape), alpha=self.scale * strength)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (*self.left, *self.right)

    @property
    def rank(self) -> int:
        return max((factor[0].shape[1] for factor in (self.left, self.right) if len(factor) == 2), default=0)

    def fits(self, weight: torch.Tensor) -> bool:
        left, right = _product_shape(self.left), _product_shape(self.right)
        if left is None or right is None or len(left) != 2 or left[0] * right[0] != weight.shape[0]:
            return False
        return left[0] * left[1] * right.numel() == weight.numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hadamard(Change):
    """LoHa: W + strength * scale * (first * second), elementwise, each a product of two factors."""

    first: tuple[torch.Tensor, ...]
    second: tuple[torch.Tensor, ...]
    scale: float

    def add_to(self, weight: torch.Tensor, strength: float) -> None:
        first, second = (_product([_on(part, weight) for part in pair]) for pair in (self.first, self.second))
        weight.add_((first * second).reshape(weight.shape), alpha=self.scale * strength)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (*self.first, *self.second)

    @property
    def rank(self) -> int:
        return self.first[0].shape[1]

    def fits(self, weight: torch.Tensor) -> bool:
        shapes = {_product_shape(self.first), _product_shape(self.second)}
        (shape,) = shapes if len(shapes) == 1 else (None,)
        return shape is not None and shape[0] == weight.shape[0] and shape.numel() == weight.numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference(Change):
    """W + strength * scale * difference, of the parameter's own shape: biases, and layers given whole."""

    difference: torch.Tensor
    scale: float = 1.0

    def add_to(self, weight: torch.Tensor, strength: float) -> None:
        weight.add_(_on(self.difference, weight), alpha=self.scale * strength)

    def fits(self, weight: torch.Tensor) -> bool:
        return self.difference.shape == weight.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement(Change):
    """W + strength * (value - W): the norms that a FLUX control LoRA brings along."""

    value: torch.Tensor

    def add_to(self, weight: torch.Tensor, strength: float) -> None:
        weight.lerp_(_on(self.value, weight), strength)

    def fits(self, weight: torch.Tensor) -> bool:
        return self.value.shape == weight.shape


Changes = Mapping[str, Change]
"""By the name of the parameter, as the module's `named_parameters` gives it."""


def _product(factors: list[torch.Tensor]) -> torch.Tensor:
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1].flatten(1)


def _product_shape(factors: tuple[torch.Tensor, ...]) -> torch.Size | None:
    """Shape of a factor, None where its two parts do not fit each other."""
    if len(factors) == 1:
        return factors[0].shape if factors[0].dim() >= 2 else None
    a, b = factors
    if a.dim() != 2 or b.dim() < 2 or a.shape[1] != b.shape[0]:
        return None
    return torch.Size((a.shape[0], b[0].numel()))
