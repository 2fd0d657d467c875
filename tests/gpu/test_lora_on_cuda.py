"""LoRAs on a GPU: restored bit for bit from pinned memory, and mixed in one pass as on the CPU."""

import random

import msgspec
import pytest
import torch

from photogram.core.messages import LorasReady
from worker.drawing import Studio, relative_error
from worker.lora.test_mixing import MIXED_TOLERANCE, exactly, requests_with_loras
from worker.lora.test_weights import digest, set_loras, uses_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("name", ["flux-1", "stable-diffusion-xl", "wan-2.2"])
def test_twenty_switches_leave_every_bit_as_it_was(name, family_folder, tmp_path):
    studio = Studio(family_folder(name), tmp_path, precision="bf16")
    uses = uses_for(studio, tmp_path)
    before, seen, chance = digest(studio), {}, random.Random(7)
    for _ in range(20):
        chosen = tuple(
            msgspec.structs.replace(use, strength=chance.choice((-0.6, 0.3, 1.0, 1.5)))
            for use in chance.sample(uses, chance.randint(1, 3))
        )
        assert isinstance(set_loras(studio, *chosen), LorasReady)
        merged = digest(studio)
        assert merged != before
        assert seen.setdefault(chosen, merged) == merged
    set_loras(studio)
    assert digest(studio) == before


@pytest.mark.parametrize("name", ["flux-1", "wan-2.1", "qwen-image", "z-image"])
def test_four_loras_share_every_pass(name, family_folder, tmp_path):
    studio = Studio(family_folder(name), tmp_path, precision="fp32")
    requests = requests_with_loras(studio, name, tmp_path)
    drawn = studio.draw(requests)
    assert {len(jobs) for jobs in studio.passes("transformer")} == {4}
    for request in requests:
        reference = exactly(studio, request)
        assert relative_error(drawn[request.job_id].latents, reference.latents) < 10 * MIXED_TOLERANCE
