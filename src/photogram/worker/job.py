"""One job in the worker: its fiber, its own pipeline, and what is noted of it while it runs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..core.messages import Phase
from ..core.quality_mode import RECIPES
from ..core.request import GenerateRequest
from ..core.stage_clock import StageClock
from .arguments import strength_of
from .digest import DigestMemo
from .fast.shortcuts import Shortcuts
from .fibers import Call, Fiber
from .guidance import Foresight, kind_of
from .latent_source import read_source
from .loading import ServedPipeline
from .lora.sets import JobLoras
from .solver_watch import EstimateSolver, SolverWatch
from .stacking import Stackable
from .stages import REFINING_STEPS, Stage, first_stage, only_stage, second_stage


@dataclass(slots=True, kw_only=True)
class Answers:
    """What big modules answered a job, as far as a replay of its pipeline's end needs it."""

    encoded: list[Any] = field(default_factory=list)  # in the order of the calls
    denoised: list[Any] = field(default_factory=list)  # of the step `denoised_step`
    denoised_step: int = 0

    def note(self, call: Call, answer: Any, step: int) -> None:
        if call.module.phase(call.method) == "encode":
            self.encoded.append(answer)
        elif call.module.is_denoiser:
            if step != self.denoised_step:
                self.denoised.clear()
                self.denoised_step = step
            self.denoised.append(answer)


class Job:
    """A request being drawn. The fiber is made at once and runs when the scheduler says so.

    `stage` is the run of a pipeline that the job is at; it changes once where the job is made in two.
    """

    def __init__(self, request: GenerateRequest, served: ServedPipeline, loras: JobLoras, arrived_at: float) -> None:
        self.request = request
        self.loras = loras
        self.arrived_at = arrived_at
        self.started_at: float | None = None
        self.phase: Phase = "queued"
        self.stages = StageClock()
        self.digest = DigestMemo()
        self.call: Call | None = None  # the pending one
        self.stackable: Stackable | None = None
        self.to_remember: list[tuple[Hashable, Any]] = []  # answers whose reading is not over
        self.fraction = 0.0
        self.reported: tuple[Phase, int] | None = None  # the phase and the steps done that the host was told of last
        self.calls_run = 0
        self.calls_shared = 0
        self.largest_batch = 1
        self.num_previews = 0
        self.foresight = Foresight(served.habits, kind_of(request))
        recipe = RECIPES[request.quality_mode]
        self.shortcuts = Shortcuts(recipe)
        self.answers = Answers() if request.partial_images else None
        self.route = served.route(request)
        self.in_two_stages = served.in_two_stages(request)
        self.stage: Stage = (first_stage if self.in_two_stages else only_stage)(served, self.route, request)
        later_steps = REFINING_STEPS if self.in_two_stages else 0
        self.expected_steps = request.num_inference_steps + later_steps
        self.watch = SolverWatch(self.stage.pipeline, num_estimates=request.partial_images, later_steps=later_steps)
        self.fiber = Fiber(self._run, loras, in_fp8=recipe is not None and recipe.in_fp8)

    @property
    def job_id(self) -> str:
        return self.request.job_id

    @property
    def num_steps(self) -> int:
        """Steps of all stages, as the solver has them or, before it has said so, as the request asks for them."""
        return self.watch.num_steps or self.expected_steps

    def _run(self) -> Any:
        """The fiber's code: the pipeline, after the source was encoded where the pipeline does not do it itself."""
        if self.route.begins_from_source or self.route.keeps_outside:
            strength = strength_of(self.request)
            self.watch.source = read_source(self.stage.pipeline, self.route, self.request, strength)
            if self.answers is not None:
                self.answers.encoded.clear()  # a replay begins with the pipeline
        if self.in_two_stages:
            latents, sound = self._draw(output_type="latent")
            self._refine(self.stage.served.enlarge(latents), sound)
        return self._draw()

    def _draw(self, **changes: Any) -> Any:
        return self.stage.pipeline(**{**self.stage.arguments, **changes})

    def _refine(self, latents: torch.Tensor, sound: torch.Tensor) -> None:
        """Go on to the second stage. What was noted of the first one's calls is not true of its own."""
        self.stage = second_stage(self.route, self.request, self.stage, latents, sound)
        self.watch.follow(self.stage.pipeline)
        self.foresight = Foresight(self.stage.served.habits, ("refining", kind_of(self.request)))
        self.shortcuts = Shortcuts(None)  # of so few steps none can be left out
        for module in self.stage.served.modules.values():
            module.forget(self.job_id)
        if self.answers is not None:
            self.answers.encoded.clear()


def replay(job: Job, estimate: torch.Tensor) -> Any:
    """Return what the pipeline of the job's present stage makes of `estimate` as its final latents.

    Runs the same pipeline call again with a solver that answers every step with the estimate and with every big
    call but the decoder's answered from what the job noted: unpacking, scaling and decoding are the pipeline's own.
    With the last estimate this is the final picture, bit for bit. Of a clip only what the first latent frame gives is
    decoded: a small part of the whole clip's cost.
    """
    pipeline, arguments = job.stage.another_pipeline(), job.stage.same_arguments()
    EstimateSolver(pipeline, estimate)
    fiber = Fiber(lambda: pipeline(**arguments), job.loras)
    num_encoded = num_denoised = 0
    outcome = fiber.resume()
    try:
        while isinstance(outcome, Call):
            call = outcome
            if call.module.is_denoiser:
                answer = job.answers.denoised[num_denoised % len(job.answers.denoised)]
                num_denoised += 1
            elif call.module.phase(call.method) == "decode":
                answer = call.module.run(_first_latent_frame(call) if job.request.num_frames else call, job.job_id)
            else:
                answer = job.answers.encoded[num_encoded]
                num_encoded += 1
            outcome = fiber.resume(answer)
    finally:
        fiber.close()
    return outcome.value


def _first_latent_frame(call: Call) -> Call:
    """The decoder's call with the first of the latent frames (B, C, T, H, W) alone; sound's have no such axis."""

    def first(value: Any) -> Any:
        return value[:, :, :1] if isinstance(value, torch.Tensor) and value.dim() == 5 else value

    return replace(
        call, args=tuple(map(first, call.args)), kwargs={name: first(value) for name, value in call.kwargs.items()}
    )
