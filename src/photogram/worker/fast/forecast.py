"""Forecasts a denoiser's answer from its last ones: a polynomial in the solver's time through the newest points.

That is what multistep solvers do with what they are given, so a forecast step costs about as much accuracy as a step
of twice the length. How good forecasts are is measured, not assumed: the answer to a call that was run is compared with
what would have been forecast for it, and the remainder of interpolation says how the error grows with the distance,
    f(t) - p(t) = c (t - t_1) ... (t - t_n),
with c taken from that measurement. Cf. TaylorSeer (arXiv 2503.06923), which extrapolates features of every layer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..layout import NotStackable


class History:
    """The newest answers of one kind of call, with the solver's times, and how well the last was foreseen."""

    def __init__(self, num_points: int) -> None:
        self._answers: deque[Any] = deque(maxlen=num_points)
        self._steps: deque[int] = deque(maxlen=num_points)
        self._error: torch.Tensor | None = None  # relative, of a forecast of the newest answer from those before it
        self._measured_at: tuple[tuple[int, ...], int] = ((), 0)  # from which steps, of which

    @property
    def is_measured(self) -> bool:
        """Whether an answer was compared with what would have been forecast for it."""
        return self._error is not None

    def note(self, step: int, answer: Any, times: Sequence[float]) -> None:
        """Remember the answer to a call that was run in this step; no wait for the device. `times`, falling, may be
        empty while they are not known. Raises NotStackable for an answer of no known form."""
        if len(self._steps) == self._steps.maxlen and times:
            self._error = _relative_error(self.forecast(step, times), answer)
            self._measured_at = tuple(self._steps), step
        self._answers.append(copied(answer))
        self._steps.append(step)

    def forecast(self, step: int, times: Sequence[float]) -> Any:
        """Return what the answer in this step should be, in the form and precision of the ones before."""
        weights = _weights([times[known] for known in self._steps], times[step])

        def sum_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            total = torch.zeros_like(tensors[0], dtype=torch.float32)
            for tensor, weight in zip(tensors, weights, strict=True):
                total.add_(tensor, alpha=weight)
            return total.to(tensors[0].dtype)

        return _mapped(list(self._answers), sum_of)

    def expected_error(self, step: int, times: Sequence[float]) -> torch.Tensor:
        """Return the relative error to be expected of a forecast of this step, 0-dim, on the answers' device."""
        assert self._error is not None
        known, measured = self._measured_at
        growth = _distance([times[point] for point in self._steps], times[step]) / _distance(
            [times[point] for point in known], times[measured]
        )
        return self._error * growth


def copied(answer: Any) -> Any:
    """Return an answer of its own: pipelines may write into what they get, and a pass's result holds all its rows.

    Raises NotStackable for an answer of no known form.
    """
    return _mapped([answer], lambda tensors: tensors[0].clone())


def _weights(points: Sequence[float], time: float) -> list[float]:
    """Lagrange's: the polynomial through values at `points` is their sum with these weights at `time`."""
    return [
        math.prod((time - other) / (point - other) for j, other in enumerate(points) if j != i)
        for i, point in enumerate(points)
    ]


def _distance(points: Sequence[float], time: float) -> float:
    return math.prod(abs(time - point) for point in points)


def _relative_error(forecast: Any, answer: Any) -> torch.Tensor:
    """Root-mean-square difference over the answer's, of all tensors together."""
    pairs = list(zip(_tensors(forecast), _tensors(answer), strict=True))
    gap = sum((a.float() - b.float()).square().sum() for a, b in pairs)
    size = sum(b.float().square().sum() for _, b in pairs)
    return torch.as_tensor(gap).div(torch.as_tensor(size).clamp_min(1e-20)).sqrt()


def _tensors(answer: Any) -> Iterator[torch.Tensor]:
    if isinstance(answer, torch.Tensor):
        yield answer
    elif isinstance(answer, dict):
        for field in answer.values():
            yield from _tensors(field)
    elif isinstance(answer, list | tuple):
        for item in answer:
            yield from _tensors(item)


def _mapped(answers: Sequence[Any], function: Callable[[Sequence[torch.Tensor]], torch.Tensor]) -> Any:
    """Apply `function` to the tensors that several answers of one form have at the same place.

    Raises NotStackable for answers of no known form.
    """
    first = answers[0]
    if isinstance(first, torch.Tensor):
        return function(answers)
    if first is None:
        return None
    if isinstance(first, dict):  # a ModelOutput
        return type(first)(**{name: _mapped([answer[name] for answer in answers], function) for name in first})
    if isinstance(first, list | tuple):
        return type(first)(_mapped(list(items), function) for items in zip(*answers, strict=True))
    raise NotStackable(f"an answer of type {type(first).__name__}")
