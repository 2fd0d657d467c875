"""The runs of pipelines that a job is made of: one, or two with an enlargement of the latents between them.

The two are diffusers' and the makers' recipe for LTX-2 (https://huggingface.co/docs/diffusers/api/pipelines/ltx2,
"Two-stages Generation"): a clip of half the sides is drawn to latents, a network doubles these, and they are noised
again and refined in a few steps without guidance. The latents of the sound go through both. Each run is a plain call of
the job's pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.ltx2.utils import STAGE_2_DISTILLED_SIGMA_VALUES
from msgspec.structs import replace

from ..core.request import GenerateRequest
from ..models.two_stages import SCALE
from ..models.uses import Route
from .arguments import call_arguments
from .loading import ServedPipeline

REFINING_STEPS = len(STAGE_2_DISTILLED_SIGMA_VALUES)

_REFINING_SOLVER: Mapping[str, Any] = MappingProxyType({"use_dynamic_shifting": False, "shift_terminal": None})
"""The noise levels of the second stage are meant as they are, whatever the number of tokens."""

_REFINING: Mapping[str, Any] = MappingProxyType(
    {
        "sigmas": STAGE_2_DISTILLED_SIGMA_VALUES,
        "timesteps": None,
        "noise_scale": STAGE_2_DISTILLED_SIGMA_VALUES[0],
        # None of LTX-2's ways to guide: the steps are made for a denoiser that is distilled.
        "audio_guidance_scale": 1.0,
        "stg_scale": 0.0,
        "audio_stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_modality_scale": 1.0,
        "guidance_rescale": 0.0,
        "audio_guidance_rescale": 0.0,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One run of a job's pipeline. `request` has the size, the steps and the guidance of this run."""

    request: GenerateRequest
    pipeline: DiffusionPipeline
    arguments: Mapping[str, Any]
    served: ServedPipeline
    solver_settings: Mapping[str, Any]
    noise_state: torch.Tensor | None  # of the generator, before it has drawn anything in this run

    def another_pipeline(self) -> DiffusionPipeline:
        """Return one like this stage's, with fields and a solver of its own, to be run beside it."""
        return self.served.for_job(self.request, self.solver_settings)

    def same_arguments(self) -> dict[str, Any]:
        """Return the arguments with which the same call can be made once more, and draws the same noise."""
        if self.noise_state is None:
            return dict(self.arguments)
        generator = torch.Generator("cpu")
        generator.set_state(self.noise_state)
        return {**self.arguments, "generator": generator}


def only_stage(served: ServedPipeline, route: Route, request: GenerateRequest) -> Stage:
    """Return the run of a job that is made in one."""
    return _stage(served, route, request)


def first_stage(served: ServedPipeline, route: Route, request: GenerateRequest) -> Stage:
    """Return the run at half the sides; it gives pixels, where its call is not made for latents."""
    return _stage(served, route, replace(request, width=request.width // SCALE, height=request.height // SCALE))


def second_stage(
    route: Route, request: GenerateRequest, first: Stage, latents: torch.Tensor, sound: torch.Tensor
) -> Stage:
    """Return the run that refines `latents` (B, C, T, H, W) and `sound` (B, C, L, M) at the size of `request`.

    The random numbers go on where the first stage has left them.
    """
    refined = replace(
        request, num_inference_steps=REFINING_STEPS, guidance_scale=1.0, extra=request.extra | dict(_REFINING)
    )
    given = {"latents": latents, "audio_latents": sound, "generator": first.arguments["generator"]}
    return _stage(first.served, route, refined, _REFINING_SOLVER, given)


def _stage(
    served: ServedPipeline,
    route: Route,
    request: GenerateRequest,
    solver_settings: Mapping[str, Any] = MappingProxyType({}),
    given: Mapping[str, Any] = MappingProxyType({}),
) -> Stage:
    pipeline = served.for_job(request, solver_settings)
    arguments = {**call_arguments(pipeline, route, request, served.card), **given}
    generator = arguments.get("generator")
    return Stage(
        request=request,
        pipeline=pipeline,
        arguments=arguments,
        served=served,
        solver_settings=solver_settings,
        noise_state=None if generator is None else generator.get_state(),
    )
