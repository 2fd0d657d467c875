"""Watches one job's own solver: how far it is, and what picture it is heading for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from .fast.shortcuts import Moment
from .latent_source import LatentSource


class SolverWatch:
    """Counts the steps of a pipeline's solver, takes its estimate of the result where one is wanted, and lets the run
    begin at a given picture or clip, and keep what is outside a mask, where there is a `source`.

    Without a source a watched run gives the same bits as an unwatched one. `later_steps` are those of the runs that the
    watch is to `follow` after this one.
    """

    def __init__(self, pipeline: DiffusionPipeline, num_estimates: int = 0, later_steps: int = 0) -> None:
        self.steps_done = 0
        self.num_steps = 0
        self.estimate: torch.Tensor | None = None  # x0 at the last step for which one was wanted
        self.source: LatentSource | None = None
        self._num_estimates = num_estimates
        self._later_steps = later_steps
        self._wanted: frozenset[int] = frozenset()
        self._index = 0  # of the next timestep
        self._begin = 0
        self._noise: torch.Tensor | None = None
        self._times: Sequence[float] | None = ()  # of the steps that are drawn; None where they do not fall
        self._answers: list[Any] = []  # of the denoiser in the first step, where that one is skipped
        self._num_given = 0
        self.follow(pipeline)

    def follow(self, pipeline: DiffusionPipeline) -> None:
        """Watch this pipeline's solver from now on, and go on counting."""
        self._solver: SchedulerMixin | None = pipeline.components.get("scheduler")
        if self._solver is not None:
            self._real_step = self._solver.step
            self._solver.step = self._step  # on the job's own copy

    @property
    def position(self) -> int:
        """How often the solver was called, skipped steps included: calls at one position belong to one step."""
        return self._index

    @property
    def moment(self) -> Moment | None:
        """Which step is under way; None where that is not known, or where it is one that is skipped."""
        if self._times is None or self.steps_done >= len(self._times) > 0:
            return None
        may_be_skipped = self.source is not None and self.source.strength is not None and self._index == 0
        return None if may_be_skipped or self._index < self._begin else Moment(self.steps_done, self._times)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if self._index == 0:
            given = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
            self._begin_run(given["timestep"], given["sample"])
        self._index += 1
        if self._index <= self._begin:
            return self._skip(kwargs.get("return_dict", True))
        if self.steps_done + 1 in self._wanted:
            result, self.estimate = self._step_with_estimate(*args, **kwargs)
        else:
            result = self._real_step(*args, **kwargs)
        self.steps_done += 1
        if self.source is not None and self.source.mask is not None:
            return self._keep(result, kwargs.get("return_dict", True))
        return result

    # --- a run from a source

    def skipped_answer(self) -> tuple[bool, Any]:
        """Return whether the pending denoiser call belongs to a skipped step, and what to answer it with.

        What the denoiser says there is thrown away. The first step's calls are run all the same, to have answers of
        the right form; later ones are given those.
        """
        if not 0 < self._index < self._begin:
            return False, None
        answer = self._answers[self._num_given % len(self._answers)]
        self._num_given += 1
        return True, answer

    def note_answer(self, answer: Any) -> None:
        """Keep what the denoiser answered in a step that will be skipped."""
        if self._index == 0 and self.source is not None and self.source.strength is not None:
            self._answers.append(answer)

    def _begin_run(self, timestep: Any, sample: torch.Tensor) -> None:
        if self.source is not None:
            self._begin = self.source.first_step(self._solver)
            self._noise = sample / _initial_scale(self._solver)
        times = self._solver.timesteps[_position(self._solver, timestep) + self._begin :].tolist()
        # Solvers that ask twice at one time count that as two steps.
        self._times = times if all(before > after for before, after in pairwise(times)) else None
        self.num_steps = len(times) + self._later_steps
        self._wanted = spread(self.num_steps, self._num_estimates)

    def _skip(self, as_dict: bool) -> Any:
        """Answer a step before the first with the noise; the last of them with what the first one starts from."""
        if self._index < self._begin:
            return StepResult.of(self._noise, as_dict)
        self._answers.clear()
        self._solver.set_begin_index(self._begin)
        self._solver._step_index = None  # else it goes on counting from the pipeline's own first timestep
        return StepResult.of(self.source.noised(self._solver, self._begin, self._noise), as_dict)

    def _keep(self, result: Any, as_dict: bool) -> Any:
        source = self.source.noised(self._solver, self._index, self._noise)
        kept = self.source.kept(result[0], source)
        if self.estimate is not None:
            self.estimate = self.source.kept(self.estimate, self.source.latents)
        return StepResult.of(kept, as_dict)

    # --- estimates

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


def _position(solver: SchedulerMixin, timestep: Any) -> int:
    """Index of the timestep that a run begins with: not the first where it begins in the middle (strength)."""
    found = (solver.timesteps == timestep).nonzero()
    return int(found[0]) if len(found) else 0


def _initial_scale(solver: SchedulerMixin) -> Any:
    """What pipelines multiply their first noise by: more than 1 in variance-exploding schedules."""
    return 1.0 if callable(getattr(type(solver), "scale_noise", None)) else solver.init_noise_sigma


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
    """Makes a pipeline's solver answer every step with one given estimate, and nothing else.

    A copy that the pipeline takes of its solver steps what is drawn beside the picture, a clip's sound, of which there
    is no estimate: it leaves its samples as they are.
    """

    def __init__(self, pipeline: DiffusionPipeline, estimate: torch.Tensor) -> None:
        self._estimate: torch.Tensor | None = estimate
        pipeline.components["scheduler"].step = self._step

    def __deepcopy__(self, memo: dict[int, Any]) -> EstimateSolver:
        copied = copy.copy(self)
        copied._estimate = None
        return copied

    def _step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        return StepResult.of(sample if self._estimate is None else self._estimate, return_dict)


class StepResult(tuple[torch.Tensor]):
    """A solver's output of which only the next sample is known. Pipelines read `.prev_sample` or the first entry."""

    @classmethod
    def of(cls, sample: torch.Tensor, as_dict: bool) -> StepResult | tuple[torch.Tensor]:
        return cls((sample,)) if as_dict else (sample,)

    @property
    def prev_sample(self) -> torch.Tensor:
        return self[0]
