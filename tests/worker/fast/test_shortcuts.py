"""Calls that quality modes leave out, in real pipelines: what is answered instead, and what is never touched."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from diffusers import DiffusionPipeline

from families import FAMILIES
from photogram.core.messages import Preview
from photogram.core.quality_mode import RECIPES, Recipe
from photogram.core.request import GenerateRequest
from photogram.worker.fast.shortcuts import Shortcuts

from ..drawing import Studio, draw_alone, relative_error
from ..test_families_served import STACKED_TOLERANCE, requests_of

STEPS = 12
ALWAYS = 1e9  # a tolerance that every forecast meets
EVERY_SECOND = Recipe(first_steps=3, first_share=0.0, forecasts_in_a_row=1, tolerance=ALWAYS)
FORECAST = (3, 5, 7, 9)  # of twelve steps, by that recipe
NO_FORECASTS = replace(EVERY_SECOND, forecasts_in_a_row=0)


class RecipeStudio(Studio):
    """Draws every job with one recipe, and keeps what became of it."""

    recipe: Recipe | None = None

    def settle(self) -> None:
        super().settle()
        self.shortcuts = {job_id: Shortcuts(self.recipe) for job_id in self.worker.jobs}
        for job_id, job in self.worker.jobs.items():
            job.shortcuts = self.shortcuts[job_id]


def single(**changes: Any) -> GenerateRequest:
    """A job of one call a step."""
    return long(requests_of("flux-1")[0], negative_prompt=None, extra={}, **changes)


def long(request: GenerateRequest, **changes: Any) -> GenerateRequest:
    return msgspec.structs.replace(request, num_inference_steps=STEPS, **changes)


def replacing_calls(pipeline: DiffusionPipeline, answer: Callable[[int, Callable[[], Any]], Any]) -> None:
    """Let `answer` give what the denoiser says in each step, from the step and the real call."""
    real, step = pipeline.transformer.forward, -1

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step += 1
        return answer(step, lambda: real(*args, **kwargs))

    forward.__signature__ = inspect.signature(real)
    pipeline.transformer.forward = forward


def test_forecast_steps_continue_the_line_through_the_last_two_that_were_run(family_folder, tmp_path):
    request = single()
    studio = RecipeStudio(family_folder("flux-1"), tmp_path)
    studio.recipe = EVERY_SECOND
    drawn = studio.draw([request])["job-0"]
    assert len(studio.passes("transformer")) == STEPS - len(FORECAST)

    plain = DiffusionPipeline.from_pretrained(family_folder("flux-1"))
    known: list[tuple[float, torch.Tensor]] = []

    def answer(step: int, call: Callable[[], Any]) -> Any:
        time = float(plain.scheduler.timesteps[step])
        if step in FORECAST:
            (t0, y0), (t1, y1) = known[-2:]
            return (y1 + (y1 - y0) * (time - t1) / (t1 - t0),)
        known.append((time, call()[0]))
        return (known[-1][1],)

    replacing_calls(plain, answer)
    with torch.inference_mode():
        reference = draw_alone(plain, request)
    assert relative_error(drawn.latents, reference.latents) < STACKED_TOLERANCE


def test_a_step_is_run_where_its_forecast_is_not_expected_to_be_good(family_folder, tmp_path):
    request = single()
    studio = RecipeStudio(family_folder("flux-1"), tmp_path)
    exact = studio.draw([request])["job-0"]
    studio.recipe = replace(EVERY_SECOND, tolerance=0.0)
    drawn = studio.draw([request])["job-0"]
    assert len(studio.passes("transformer")) == STEPS
    assert torch.equal(drawn.latents, exact.latents)


@pytest.mark.parametrize("name", ["wan-2.1", "flux-2-klein"])
def test_without_guidance_in_the_last_steps_it_is_the_pipeline_whose_guidance_ends(name, family_folder, tmp_path):
    request = long(requests_of(name)[0], guidance_scale=4.0)
    studio = RecipeStudio(family_folder(name), tmp_path)
    studio.recipe = replace(NO_FORECASTS, guided=0.5)
    drawn = studio.draw([request])["job-0"]
    assert len(studio.passes("transformer")) == STEPS + STEPS // 2

    plain = DiffusionPipeline.from_pretrained(family_folder(name))

    def ending_guidance(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == STEPS // 2:
            plain._guidance_scale = 1.0
        return step(*args, **kwargs)

    num_steps = 0
    plain.scheduler = type(plain.scheduler).from_config(plain.scheduler.config)
    step, plain.scheduler.step = plain.scheduler.step, ending_guidance
    with torch.inference_mode():
        reference = draw_with_this_solver(plain, request)
    assert relative_error(drawn.latents, reference) < STACKED_TOLERANCE


def draw_with_this_solver(pipeline: DiffusionPipeline, request: GenerateRequest) -> torch.Tensor:
    """The latents that the decoder gets; `draw_alone` would take a fresh solver."""
    kept, kind = pipeline.scheduler, type(pipeline.scheduler)
    real = kind.from_config
    kind.from_config = classmethod(lambda cls, config, **more: kept)
    try:
        return draw_alone(pipeline, request).latents
    finally:
        kind.from_config = real


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if family.image != "required" and name != "wan-2.2"]
)
def test_modes_of_every_family_leave_calls_out_and_keep_to_the_step(name, family_folder, tmp_path):
    studio = RecipeStudio(family_folder(name), tmp_path)
    exact = studio.draw([long(requests_of(name)[0])])
    calls = len(studio.passes(*FAMILIES[name].denoisers))
    studio.recipe = EVERY_SECOND
    lossy = studio.draw([long(requests_of(name)[0])])
    assert lossy["job-0"].failure is None
    assert len(studio.passes(*FAMILIES[name].denoisers)) == calls * (STEPS - len(FORECAST)) // STEPS
    assert relative_error(lossy["job-0"].latents, exact["job-0"].latents) < 0.5


def test_jobs_of_all_modes_share_passes_and_an_exact_one_is_as_if_alone(family_folder, tmp_path):
    exact, high, fast = (
        long(request, quality_mode=mode) for request, mode in zip(requests_of("qwen-image"), RECIPES, strict=True)
    )
    studio = Studio(family_folder("qwen-image"), tmp_path)
    alone = studio.draw([exact])["job-0"]
    together = studio.draw([exact, high, fast])
    assert max(len(jobs) for jobs in studio.passes("transformer")) == 3
    assert relative_error(together["job-0"].latents, alone.latents) < STACKED_TOLERANCE
    num_calls = {job_id: sum(job_id in jobs for jobs in studio.passes("transformer")) for job_id in together}
    assert num_calls["job-0"] == 2 * STEPS
    assert num_calls["job-2"] < num_calls["job-0"]


def test_a_job_gets_the_same_beside_others_as_alone(family_folder, tmp_path):
    jobs = [long(request) for request in requests_of("flux-1")]
    studio = RecipeStudio(family_folder("flux-1"), tmp_path, max_batch_size=1)
    studio.recipe = EVERY_SECOND
    alone = studio.draw(jobs[:1])["job-0"]
    together = studio.draw(jobs)["job-0"]
    assert torch.equal(together.latents, alone.latents)


def test_a_second_denoiser_begins_with_steps_of_its_own(family_folder, tmp_path):
    request = long(requests_of("wan-2.2")[0])
    studio = RecipeStudio(family_folder("wan-2.2"), tmp_path)
    assert studio.draw([request])["job-0"].failure is None
    of_each = [len(studio.passes(name)) for name in FAMILIES["wan-2.2"].denoisers]
    studio.recipe = EVERY_SECOND
    assert studio.draw([request])["job-0"].failure is None
    fewer = [len(studio.passes(name)) for name in FAMILIES["wan-2.2"].denoisers]
    assert all(3 * 2 <= few <= many for few, many in zip(fewer, of_each, strict=True))
    assert sum(fewer) < sum(of_each)


def test_partial_pictures_come_where_their_step_was_forecast(family_folder, tmp_path):
    request = single(partial_images=3)
    studio = RecipeStudio(family_folder("flux-1"), tmp_path)
    studio.recipe = replace(EVERY_SECOND, forecasts_in_a_row=8)
    drawn = studio.draw([request])["job-0"]
    assert drawn.failure is None
    assert sum(isinstance(message, Preview) for message in studio.messages) == len(drawn.previews) == 3


def test_a_run_of_too_few_steps_is_exact(family_folder, tmp_path):
    request = requests_of("flux-1")[0]
    studio = Studio(family_folder("flux-1"), tmp_path)
    exact = studio.draw([request])["job-0"]
    fast = studio.draw([msgspec.structs.replace(request, quality_mode="fast")])["job-0"]
    assert torch.equal(fast.latents, exact.latents)
