"""LTX-2's two stages as one job, against diffusers' three pipelines called by hand as its documentation says."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LTX2ImageToVideoPipeline
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplePipeline
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.utils import STAGE_2_DISTILLED_SIGMA_VALUES
from PIL import Image

from families.ltx2 import add_upsampler
from photogram.core.messages import Failed, Finished, Progress
from photogram.core.request import GenerateRequest
from photogram.models.checkpoint import find_checkpoint
from photogram.models.two_stages import has_upsampler

from .drawing import Drawn, Studio, draw_alone, relative_error
from .test_families_served import STACKED_TOLERANCE, requests_of

REFINING_STEPS = 3


@pytest.fixture(scope="module")
def folder(family_folder, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("two-stages") / "tiny-ltx-2"
    shutil.copytree(family_folder("ltx-2"), made)
    add_upsampler(made)
    return made


@pytest.fixture(scope="module")
def studio(folder, tmp_path_factory) -> Studio:
    """One call at a time, so that bits can be compared."""
    return Studio(folder, tmp_path_factory.mktemp("frames"), max_batch_size=1)


def two_stage_requests(**changes: Any) -> list[GenerateRequest]:
    """Jobs of 128 x 64: two latents beside each other, one in the first stage."""
    made = requests_of("ltx-2", width=128, height=64)
    return [msgspec.structs.replace(request, extra=request.extra | {"two_stages": True}, **changes) for request in made]


def by_hand(
    folder: Path,
    request: GenerateRequest,
    image: Image.Image | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Drawn:
    """What diffusers' own pipelines give: half the size to latents, enlarged, refined."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device)
    if image is not None:
        pipeline = LTX2ImageToVideoPipeline(**pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    upsampler = LTX2LatentUpsamplerModel.from_pretrained(folder, subfolder="latent_upsampler", torch_dtype=dtype)
    upsampler.to(device)
    upsample = LTX2LatentUpsamplePipeline(vae=pipeline.vae, latent_upsampler=upsampler)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    extra = {name: value for name, value in request.extra.items() if name != "two_stages"}
    half = {"width": request.width // 2, "height": request.height // 2}
    picture = {} if image is None else {"image": image}
    first = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "num_frames": request.num_frames,
        "generator": generator,
    }
    latents, sound = pipeline(**extra | first | half | picture, output_type="latent", return_dict=False)
    enlarged = upsample(latents=latents, output_type="latent", return_dict=False)[0]
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, use_dynamic_shifting=False, shift_terminal=None
    )
    second = msgspec.structs.replace(request, num_inference_steps=REFINING_STEPS, guidance_scale=1.0, extra=extra)
    given = picture | {
        "latents": enlarged,
        "audio_latents": sound,
        "sigmas": STAGE_2_DISTILLED_SIGMA_VALUES,
        "noise_scale": STAGE_2_DISTILLED_SIGMA_VALUES[0],
        "generator": generator,
        "audio_guidance_scale": 1.0,
        "stg_scale": 0.0,
        "audio_stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_modality_scale": 1.0,
        "guidance_rescale": 0.0,
        "audio_guidance_rescale": 0.0,
    }
    return draw_alone(pipeline, second, given=given)


def sound_of(studio: Studio, job_id: str) -> np.ndarray:
    """Samples (samples, channels)."""
    block = next(one.sound for one in studio.messages if isinstance(one, Finished) and one.job_id == job_id)
    return np.fromfile(block.path, dtype=np.float32).reshape(block.shape)


def test_interleaved_jobs_give_the_bits_of_the_three_pipelines_called_by_hand(studio, folder):
    requests = two_stage_requests()
    drawn = studio.draw(requests)
    order = [jobs[0] for jobs in studio.passes("transformer")]
    assert order != sorted(order), "the jobs ran one after another, not interleaved"
    assert len(studio.passes("latent_upsampler")) == len(requests)
    for request in requests:
        alone = by_hand(folder, request)
        result = drawn[request.job_id]
        assert result.failure is None, result.failure
        assert result.frames.shape == (request.num_frames, 64, 128, 3)
        assert torch.equal(result.latents, alone.latents)
        assert (result.frames == alone.frames).all()
        assert np.array_equal(sound_of(studio, request.job_id), alone.sound)


def test_jobs_share_passes_in_both_stages(folder, tmp_path):
    requests = two_stage_requests(num_inference_steps=3)  # so that they come to the second stage together
    stacking = Studio(folder, tmp_path, max_batch_size=8)
    drawn = stacking.draw(requests)
    passes = [len(jobs) for jobs in stacking.passes("transformer")]
    assert passes[0] == len(requests), f"passes of {passes} jobs"
    assert passes[-1] > 1, f"passes of {passes} jobs"
    for request in requests:
        alone = by_hand(folder, request)
        assert relative_error(drawn[request.job_id].latents, alone.latents) < STACKED_TOLERANCE


def test_a_clip_that_begins_with_a_picture_is_refined_with_it(studio, folder, tmp_path):
    picture = Image.effect_mandelbrot((128, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    picture.save(tmp_path / "first.png")
    request = two_stage_requests(images=(str(tmp_path / "first.png"),), task="TI2V")[0]
    result = studio.draw([request])[request.job_id]
    assert result.failure is None, result.failure
    assert torch.equal(result.latents, by_hand(folder, request, picture).latents)


def test_ways_to_guide_are_those_of_the_first_stage_alone(studio, folder):
    guided = {"stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1], "modality_scale": 3.0}
    request = two_stage_requests()[0]
    request = msgspec.structs.replace(request, extra=request.extra | guided | {"guidance_rescale": 0.7})
    drawn = studio.draw([request])[request.job_id]
    assert len(studio.passes("transformer")) == 3 * request.num_inference_steps + REFINING_STEPS
    assert torch.equal(drawn.latents, by_hand(folder, request).latents)


def test_switched_off_the_model_draws_in_one_stage(studio, folder):
    request = two_stage_requests()[0]
    plain = msgspec.structs.replace(request, extra=request.extra | {"two_stages": False})
    drawn = studio.draw([plain])[plain.job_id]
    assert studio.passes("latent_upsampler") == []
    assert (drawn.frames == draw_alone(DiffusionPipeline.from_pretrained(folder), plain).frames).all()


def test_progress_counts_the_steps_of_both_stages_and_never_falls(studio):
    request = two_stage_requests()[0]
    studio.draw([request])
    reports = [message for message in studio.messages if isinstance(message, Progress)]
    num_steps = request.num_inference_steps + REFINING_STEPS
    assert {report.num_steps for report in reports} == {num_steps}
    steps = [report.step for report in reports]
    assert steps == sorted(steps)
    assert set(steps) == set(range(num_steps + 1))
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions)
    # Between the stages, where the share of the steps done is known exactly.
    between = next(report for report in reports if report.step == request.num_inference_steps)
    assert between.fraction == pytest.approx(0.03 + 0.92 * request.num_inference_steps / num_steps)


@pytest.mark.parametrize("steps_before", [1, 4])
def test_a_job_can_be_cancelled_in_each_stage(studio, steps_before):
    request = two_stage_requests()[0]

    def cancel(turn: int) -> None:
        done = [message.step for message in studio.messages if isinstance(message, Progress)]
        if done and done[-1] == steps_before:
            studio.worker.cancel(request.job_id)

    studio.draw([request], meanwhile=cancel)
    assert isinstance(studio.messages[-1], Failed)
    assert studio.messages[-1].code == "cancelled"
    assert len(studio.passes("latent_upsampler")) == (steps_before > request.num_inference_steps)
    assert len(studio.passes("transformer")) == steps_before
    assert not studio.worker.jobs


def test_unfinished_work_is_shown_in_both_stages_and_the_clip_stays_the_same(studio):
    # Its decoder cannot do with one latent a side.
    request = two_stage_requests(num_inference_steps=3, height=128)[0]
    without = studio.draw([request])[request.job_id]
    watched = studio.draw([msgspec.structs.replace(request, partial_images=2)])[request.job_id]
    assert (watched.frames == without.frames).all()
    assert [preview.shape for preview in watched.previews] == [(1, 64, 64, 3), (1, 128, 128, 3)]


def test_card_offers_the_second_stage_at_twice_the_usual_size(studio, family_folder, tmp_path):
    card, plain = studio.card, Studio(family_folder("ltx-2"), tmp_path).card
    assert card.parameters["two_stages"] == "bool"
    assert card.defaults["two_stages"] is True
    assert (card.size_multiple, plain.size_multiple) == (64, 32)
    assert (card.default_width, card.default_height) == (2 * plain.default_width, 2 * plain.default_height)
    assert card.precisions["latent_upsampler"] == "fp32"
    assert card.parameters_count > plain.parameters_count
    assert "two_stages" not in plain.parameters | plain.defaults


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, True), ({"rational_spatial_scale": 1.5}, False), ({"temporal_upsample": True}, False)],
)
def test_only_what_doubles_the_sides_is_taken_for_the_second_stage(folder, tmp_path, settings, expected):
    other = tmp_path / "other"
    (other / "latent_upsampler").mkdir(parents=True)
    shutil.copy(folder / "model_index.json", other)
    config = msgspec.json.decode((folder / "latent_upsampler" / "config.json").read_bytes())
    (other / "latent_upsampler" / "config.json").write_bytes(msgspec.json.encode(config | settings))
    assert has_upsampler(find_checkpoint(str(other), revision=None, variant=None)) is expected
