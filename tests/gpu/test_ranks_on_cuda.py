"""Several GPUs draw what one does: the two halves of guidance apart, step caches in agreement, over NCCL."""

import pytest
import torch

from families import FAMILIES
from worker.drawing import relative_error
from worker.in_process import in_process
from worker.test_cfg_parallel import TOLERANCE, draw, guided
from worker.test_step_cache_on_ranks import CACHE
from worker.test_step_cache_on_ranks import draw as draw_with_cache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["qwen-image", "wan-2.1", "flux-2-klein"])
def test_the_halves_of_guidance_on_two_gpus_give_the_bits_of_one(name, precision, family_folder, tmp_path):
    folder, denoisers, job = family_folder(name), FAMILIES[name].denoisers, guided(name)[0]
    one, two = (
        in_process(draw, folder, tmp_path, denoisers, [[job]], {"precision": precision} | settings)[0]
        for settings in ({}, {"num_gpus": 2, "cfg_parallel": 2})
    )
    assert torch.equal(two.latents[job.job_id], one.latents[job.job_id])
    assert len(two.passes) < len(one.passes)


def test_two_gpus_skip_the_steps_that_one_skips(family_folder, tmp_path):
    folder = family_folder("wan-2.1")
    settings = CACHE | {"precision": "fp32"}
    one, two = (in_process(draw_with_cache, folder, tmp_path, settings | more) for more in ({}, {"num_gpus": 2}))
    assert two.computed == one.computed
    for job_id, latents in one.latents.items():
        assert relative_error(two.latents[job_id], latents) < 10 * TOLERANCE
