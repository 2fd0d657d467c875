"""Watches one job's own solver: how far it is, and what picture it is heading for."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin


class SolverWatch:
    """Counts the steps of a pipeline's solver and takes its estimate of the result where one is wanted.

    A watched run gives the same bits as an unwatched one.
    """

    def __init__(self, pipeline: DiffusionPipeline, num_estimates: int = 0) -> None:
        self.steps_done = 0
        self.num_steps = 0
        self.estimate: torch.Tensor | None = None  # x0 at the last step for which one was wanted
        self._num_estimates = num_estimates
        self._wanted: frozenset[int] = frozenset()
        self._solver: SchedulerMixin | None = pipeline.components.get("scheduler")
        if self._solver is not None:
            self._real_step = self._solver.step
            self._solver.step = self._step  # on the job's own copy

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if not self.steps_done:
            self.num_steps = _steps_of(self._solver)
            self._wanted = spread(self.num_steps, self._num_estimates)
        if self.steps_done + 1 in self._wanted:
            result, self.estimate = self._step_with_estimate(*args, **kwargs)
        else:
            result = self._real_step(*args, **kwargs)
        self.steps_done += 1
        return result

    def take_estimate(self) -> torch.Tensor | None:
        """Return the newest estimate that was not taken yet."""
        estimate, self.estimate = self.estimate, None
        return estimate

    def _step_with_estimate(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, torch.Tensor | None]:
        as_dict = kwargs.pop("return_dict", True)
        output = self._real_step(model_output, timestep, sample, *args, return_dict=True, **kwargs)
        estimate = _estimate(self._solver, output, model_output, sample)
        return (output if as_dict else (output.prev_sample,)), estimate


def spread(num_steps: int, count: int) -> frozenset[int]:
    """Return the steps, counted from 1, after which `count` estimates are taken: evenly, none at the last."""
    return frozenset(round(num_steps * (i + 1) / (count + 1)) for i in range(count)) - {0, num_steps}


def _steps_of(solver: SchedulerMixin) -> int:
    """Number of calls of `step` in a run: fewer than the timesteps where it begins in the middle (strength)."""
    begin = solver.begin_index if isinstance(getattr(type(solver), "begin_index", None), property) else None
    return len(solver.timesteps) - (begin or 0)


def _estimate(
    solver: SchedulerMixin, output: Any, model_output: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor | None:
    """The solver's current estimate of x0, or None where it keeps none."""
    if isinstance(solver, FlowMatchEulerDiscreteScheduler):
        sigma = solver.sigmas[solver.step_index - 1].to(sample)
        return sample - sigma * model_output
    for name in ("pred_original_sample", "denoised"):  # LCM says denoised
        if name in output and output[name] is not None:
            return output[name]
    converted = vars(solver).get("model_outputs")
    predicts_x0 = solver.config.get("predict_x0", str(solver.config.get("algorithm_type", "")).endswith("++"))
    return converted[-1] if converted and predicts_x0 else None


class EstimateSolver:
    """Makes a pipeline's solver answer every step with one given estimate, and nothing else."""

    def __init__(self, pipeline: DiffusionPipeline, estimate: torch.Tensor) -> None:
        solver = pipeline.components["scheduler"]
        self._estimate = estimate
        solver.step = self._step

    def _step(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        # Pipelines read `.prev_sample` or the first entry; every solver's output has both.
        return _Step(self._estimate) if return_dict else (self._estimate,)


class _Step(tuple[torch.Tensor]):
    """A solver's output of which only the next sample is known."""

    def __new__(cls, sample: torch.Tensor) -> _Step:
        return super().__new__(cls, (sample,))

    @property
    def prev_sample(self) -> torch.Tensor:
        return self[0]
