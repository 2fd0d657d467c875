"""A step cache over several ranks skips what it skips on one: the decision is the whole sequence's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from diffusers.hooks.first_block_cache import FBCHeadBlockHook

from .drawing import Studio, relative_error
from .in_process import in_process
from .test_families_served import requests_of

TOLERANCE = 1e-4  # of the latents' range, fp32
CACHE = {"step_cache": "first-block", "step_cache_threshold": 1.0}


@dataclass
class Result:
    latents: dict[str, torch.Tensor]
    computed: list[bool]  # whether the leader ran all blocks, call by call
    num_kept: int  # states in the leader's cache after the jobs


def draw(folder: Path, scratch: Path, settings: dict[str, Any]) -> Result:
    torch.set_num_threads(1)
    studio = Studio(folder, scratch, **settings)
    hook = head_hook(studio.served.modules["transformer"].module)
    decide, computed = hook._should_compute_remaining_blocks, []

    def noting(residual: torch.Tensor) -> bool:
        computed.append(decide(residual))
        return computed[-1]

    hook._should_compute_remaining_blocks = noting
    jobs = [msgspec.structs.replace(one, num_inference_steps=6) for one in requests_of("wan-2.1")[:2]]
    drawn = studio.draw(jobs)
    assert [one.failure for one in drawn.values()] == [None, None]
    latents = {job_id: one.latents.cpu() for job_id, one in drawn.items()}
    return Result(latents, computed, len(hook.state_manager._state_cache))


def head_hook(denoiser: torch.nn.Module) -> FBCHeadBlockHook:
    registries = [module._diffusers_hook for module in denoiser.modules() if hasattr(module, "_diffusers_hook")]
    (hook,) = [hook for one in registries for hook in one.hooks.values() if isinstance(hook, FBCHeadBlockHook)]
    return hook


@pytest.mark.parametrize(
    "layout",
    [{"ulysses_degree": 2}, pytest.param({"ring_degree": 2}, marks=pytest.mark.long)],
    ids=["Ulysses", "ring"],
)
def test_two_ranks_skip_the_steps_that_one_skips(layout, family_folder, tmp_path):
    folder = family_folder("wan-2.1")
    one, two = (in_process(draw, folder, tmp_path, settings) for settings in (CACHE, CACHE | {"num_gpus": 2} | layout))
    assert set(one.computed) == {True, False}
    assert two.computed == one.computed
    assert two.num_kept == one.num_kept == 0
    for job_id, latents in one.latents.items():
        assert relative_error(two.latents[job_id], latents) < TOLERANCE


@pytest.mark.long
def test_a_step_cache_works_with_both_halves_of_guidance_apart(family_folder, tmp_path):
    settings = CACHE | {"num_gpus": 2, "cfg_parallel": 2}
    drawn = in_process(draw, family_folder("wan-2.1"), tmp_path, settings)
    assert set(drawn.computed) == {True, False}
