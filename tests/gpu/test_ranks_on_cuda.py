"""Several GPUs draw what one does: the two halves of guidance apart, step caches in agreement, over NCCL."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES
from photogram.core.request import GenerateRequest
from worker import test_step_cache_on_ranks as step_cache
from worker.drawing import relative_error
from worker.in_process import in_process
from worker.test_cfg_parallel import STEPS, TOLERANCE, Result, draw, guided

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


def say(doing: str) -> None:
    print(f"{time.strftime('%X')} {doing}", file=sys.stderr, flush=True)


def draw_on_one_and_two(
    folder: Path, scratch: Path, denoisers: tuple[str, ...], job: GenerateRequest, settings: Mapping[str, Any]
) -> tuple[Result, Result]:
    """Draw a job twice on one GPU and on two, where the second time also the first step is foretold."""
    results = []
    for more in ({}, {"num_gpus": 2, "cfg_parallel": 2}):
        say(f"{folder.name}: {settings | more}")
        results.append(draw(folder, scratch, denoisers, [[job], [job]], {**settings, **more})[1])
    return results[0], results[1]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen-image", {"precision": "bf16"}),
        ("wan-2.1", {"precision": "fp32"}),
        ("flux-2-klein", {"precision": "bf16", "cuda_graphs": True}),
    ],
)
def test_the_halves_of_guidance_on_two_gpus_give_the_bits_of_one(name, settings, family_folder, tmp_path):
    job = guided(name)[0]
    one, two = in_process(
        draw_on_one_and_two, family_folder(name), tmp_path, FAMILIES[name].denoisers, job, settings
    )  # fmt: skip
    assert torch.equal(two.latents[job.job_id], one.latents[job.job_id])
    assert len(one.passes) == 2 * STEPS
    assert len(two.passes) == STEPS


def draw_with_cache_on_one_and_two(folder: Path, scratch: Path) -> list[step_cache.Result]:
    results = []
    for more in ({}, {"num_gpus": 2, "ulysses_degree": 2}):
        say(f"{folder.name} with a step cache: {more}")
        results.append(step_cache.draw(folder, scratch, step_cache.CACHE | {"precision": "fp32"} | more))
    return results


def test_two_gpus_skip_the_steps_that_one_skips(family_folder, tmp_path):
    one, two = in_process(draw_with_cache_on_one_and_two, family_folder("wan-2.1"), tmp_path)
    assert two.computed == one.computed
    for job_id, latents in one.latents.items():
        assert relative_error(two.latents[job_id], latents) < 10 * TOLERANCE
