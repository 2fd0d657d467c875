"""The two halves of a guided step, run at the same time on two groups of ranks, give what one rank gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from families import FAMILIES
from photogram.core.request import GenerateRequest
from photogram.worker.parallel.decoding import LEAST_ROWS, _Bands

from .drawing import Studio, relative_error
from .in_process import in_process
from .test_families_served import requests_of

TOLERANCE = 1e-4  # of the latents' range, fp32
STEPS = 4
LOSSY_STEPS = 12  # enough to leave some out


@dataclass
class Result:
    latents: dict[str, torch.Tensor]
    passes: list[tuple[str, ...]]


def draw(
    folder: Path,
    scratch: Path,
    denoisers: tuple[str, ...],
    batches: list[list[GenerateRequest]],
    settings: dict[str, Any],
) -> list[Result]:
    """Draw batches of requests one after the other on one start of the ranks."""
    torch.set_num_threads(1)
    studio = Studio(folder, scratch, **settings)
    results = []
    for batch in batches:
        drawn = studio.draw(batch)
        assert [one.failure for one in drawn.values()] == [None] * len(batch)
        latents = {job_id: one.latents.cpu() for job_id, one in drawn.items()}
        results.append(Result(latents, studio.passes(*denoisers)))
    return results


def guided(name: str) -> list[GenerateRequest]:
    return [msgspec.structs.replace(one, num_inference_steps=STEPS, guidance_scale=3.0) for one in requests_of(name)]


def on_one_and_more(
    name: str, family_folder, scratch: Path, batches: list[list[GenerateRequest]], **settings: Any
) -> tuple[list[Result], list[Result]]:
    """What one rank draws, and what several with these settings do."""
    folder, denoisers = family_folder(name), FAMILIES[name].denoisers
    return (
        in_process(draw, folder, scratch, denoisers, batches, {}),
        in_process(draw, folder, scratch, denoisers, batches, settings),
    )


@pytest.mark.parametrize("name", ["qwen-image", pytest.param("wan-2.1", marks=pytest.mark.long)])
def test_a_job_gets_the_bits_of_one_rank_in_half_the_passes(name, family_folder, tmp_path):
    first, second, third = guided(name)
    alone, together = [first], [second, third]
    lossy = [msgspec.structs.replace(first, num_inference_steps=LOSSY_STEPS, quality_mode="fast")]
    batches = [alone, alone, together, together, lossy]
    one, two = on_one_and_more(name, family_folder, tmp_path, batches, num_gpus=2, cfg_parallel=2)
    for mine, theirs in zip(two[:2], one[:2], strict=True):
        assert torch.equal(mine.latents[first.job_id], theirs.latents[first.job_id])
    assert len(one[0].passes) == 2 * STEPS
    assert len(two[0].passes) == STEPS + 1  # of the first job's first step nothing is foretold
    assert len(two[1].passes) == STEPS
    for mine, theirs in zip(two[2:], one[2:], strict=True):
        for job_id, latents in theirs.latents.items():
            assert relative_error(mine.latents[job_id], latents) < TOLERANCE
    assert len(two[3].passes) == STEPS  # of two jobs each
    assert len(two[4].passes) < len(one[4].passes) < 2 * LOSSY_STEPS


@pytest.mark.long
def test_the_rows_of_one_call_are_run_apart(family_folder, tmp_path):
    first, second, third = guided("stable-diffusion-xl")
    one, two = on_one_and_more(
        "stable-diffusion-xl", family_folder, tmp_path, [[first], [second, third]], num_gpus=2, enable_cfg_parallel=True
    )
    for mine, theirs in zip(two, one, strict=True):
        for job_id, latents in theirs.latents.items():
            assert relative_error(mine.latents[job_id], latents) < TOLERANCE


@pytest.mark.long
def test_jobs_without_guidance_are_divided_between_the_groups(family_folder, tmp_path):
    jobs = [
        msgspec.structs.replace(one, num_inference_steps=STEPS, guidance_scale=1.0) for one in requests_of("wan-2.1")
    ]
    one, two = on_one_and_more("wan-2.1", family_folder, tmp_path, [jobs], num_gpus=2, cfg_parallel=2)
    for job_id, latents in one[0].latents.items():
        assert relative_error(two[0].latents[job_id], latents) < TOLERANCE


def draw_frames(folder: Path, scratch: Path, job: GenerateRequest, settings: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Draw one job; return its frames and how often the leader took a band of what is decoded."""
    torch.set_num_threads(1)
    cut, bands = _Bands.cut, []

    def noting(self: _Bands, whole: torch.Tensor) -> torch.Tensor:
        bands.append(cut(self, whole))
        return bands[-1]

    _Bands.cut = noting
    return Studio(folder, scratch, **settings).draw([job])[job.job_id].frames, len(bands)


def test_a_large_picture_is_decoded_by_the_devices_of_both_halves(family_folder, tmp_path):
    folder, first = family_folder("qwen-image"), guided("qwen-image")[0]
    large = msgspec.structs.replace(first, width=8 * LEAST_ROWS * 2, height=32, num_inference_steps=2)
    (one, not_cut), (two, cut) = (
        in_process(draw_frames, folder, tmp_path, large, settings)
        for settings in ({}, {"num_gpus": 2, "cfg_parallel": 2})
    )
    assert (not_cut, cut) == (0, 1)
    assert np.abs(two.astype(int) - one).max() <= 1  # of 255


LAYOUTS = {
    "Ulysses 2": {"num_gpus": 2, "ulysses_degree": 2},
    "ring 2": {"num_gpus": 2, "ring_degree": 2},
    "Ulysses 2 x ring 2": {"num_gpus": 4, "ulysses_degree": 2, "ring_degree": 2},
    "CFG 2": {"num_gpus": 2, "cfg_parallel": 2},
    "CFG 2 x Ulysses 2": {"num_gpus": 4, "cfg_parallel": 2, "ulysses_degree": 2},
}


@pytest.mark.long
@pytest.mark.parametrize("name", ["wan-2.1", "flux-2-klein", "qwen-image"])
def test_every_layout_draws_what_one_rank_draws(name, family_folder, tmp_path):
    jobs = guided(name)
    folder, denoisers = family_folder(name), FAMILIES[name].denoisers
    reference = in_process(draw, folder, tmp_path, denoisers, [jobs], {})[0]
    for layout, settings in LAYOUTS.items():
        drawn = in_process(draw, folder, tmp_path, denoisers, [jobs], settings)[0]
        for job_id, latents in reference.latents.items():
            assert relative_error(drawn.latents[job_id], latents) < TOLERANCE, layout


@pytest.mark.long
@pytest.mark.parametrize("layout", ["Ulysses 2", "CFG 2"])
def test_compiled_blocks_draw_over_two_ranks_what_plain_ones_draw_on_one(layout, family_folder, tmp_path):
    job = guided("wan-2.1")[0]
    folder, denoisers = family_folder("wan-2.1"), FAMILIES["wan-2.1"].denoisers
    plain = in_process(draw, folder, tmp_path, denoisers, [[job]], {})[0]
    compiled = in_process(draw, folder, tmp_path, denoisers, [[job]], LAYOUTS[layout] | {"compile": True})[0]
    assert relative_error(compiled.latents[job.job_id], plain.latents[job.job_id]) < TOLERANCE
