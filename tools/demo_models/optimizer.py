"""Muon for the weight matrices, Adam for the rest, and a running average of all of them."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn


class Muon:
    """Orthogonalised momentum on matrices (convolutions flattened), batched by shape; AdamW on the others.

    Muon's update has the RMS of an Adam update, so that one learning rate serves both.
    """

    def __init__(
        self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], *, beta: float, weight_decay: float
    ) -> None:
        self._groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in matrices:
            self._groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self._momentum = {
            shape: torch.zeros(len(group), shape[0], math.prod(shape[1:]), device=group[0].device)
            for shape, group in self._groups.items()
        }
        device = others[0].device
        self._rate, self._adam_rate = torch.zeros((), device=device), torch.zeros((), device=device)
        self._adam = torch.optim.AdamW(
            list(others), lr=self._adam_rate, betas=(0.9, 0.98), weight_decay=0.0, eps=1e-10, fused=True,
            capturable=device.type == "cuda",
        )  # fmt: skip
        self._beta, self._weight_decay = beta, weight_decay
        self.parameters = [*matrices, *others]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient  # of fixed address, so that CUDA graphs may write them
        self._num_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def zero_gradients(self) -> None:
        torch._foreach_zero_(self.gradients)

    def step(self, lr: float, adam_lr: float | None = None) -> None:
        """Apply the gradients and zero them; on a GPU recorded as a CUDA graph after some steps."""
        self._rate.fill_(lr)
        self._adam_rate.fill_(lr if adam_lr is None else adam_lr)
        self._num_steps += 1
        if self._graph is not None:
            self._graph.replay()
            return
        self._update()
        if self._num_steps == 3 and self._rate.is_cuda:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self._update()
            self._graph = graph

    @torch.no_grad()
    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self._adam.step()
        for shape, parameters in self._groups.items():
            gradient = torch.stack([p.grad.flatten(1) for p in parameters if p.grad is not None])
            momentum = self._momentum[shape]
            momentum.lerp_(gradient, 1 - self._beta)
            update = _orthogonalise(gradient.lerp(momentum, self._beta)).float()
            update *= self._rate * (-0.2 * math.sqrt(max(shape[0], math.prod(shape[1:]))))
            torch._foreach_mul_(parameters, 1 - self._rate * self._weight_decay)
            torch._foreach_add_(parameters, [u.view(shape) for u in update.unbind(0)])
        self.zero_gradients()


def _orthogonalise(update: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly, by five Newton-Schulz steps (N, rows, columns)."""
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.mT if tall else x


class WeightAverage:
    """An exponential moving average of modules' weights, fp32."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        self._average = [p.detach().clone().float() for p in self._parameters]
        self._count = 0

    @torch.no_grad()
    def update(self, decay: float) -> None:
        self._count += 1
        decay = min(decay, (1 + self._count) / (10 + self._count))
        torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the modules' weights with the averages; twice gives them back."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)
