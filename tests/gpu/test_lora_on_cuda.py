"""LoRAs on a GPU: restored bit for bit wherever the weights live, and mixed in one pass as on the CPU."""

import random

import msgspec
import pytest
import torch

from photogram.core.messages import LorasReady, LorasRefused
from photogram.worker.lora.ferry import Ferry
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


@pytest.mark.parametrize("flag", ["dit_cpu_offload", "dit_layerwise_offload"])
def test_twenty_switches_leave_every_bit_of_an_offloaded_denoiser_as_it_was(flag, family_folder, tmp_path):
    studios = [
        Studio(family_folder("flux-1"), tmp_path, precision="bf16", **{name: True}) for name in (flag, "pin_cpu_memory")
    ]
    offloaded, resident = studios
    uses = uses_for(offloaded, tmp_path)
    before, chance = digest(offloaded), random.Random(7)
    assert before == digest(resident)

    def leave_by_chance() -> None:
        for visitor in offloaded.served.visitors.all:
            if chance.random() < 0.5:
                visitor.leave()

    for turn in range(20):
        chosen = tuple(
            msgspec.structs.replace(use, strength=chance.choice((-0.6, 0.3, 1.0, 1.5)))
            for use in chance.sample(uses, chance.randint(1, 3))
        )
        for studio in studios:
            assert isinstance(set_loras(studio, *chosen), LorasReady)
        leave_by_chance()
        assert digest(offloaded) == digest(resident)
        if turn % 5 == 4:
            leave_by_chance()
            refused = set_loras(offloaded, msgspec.structs.replace(uses[0], strength=3e38))
            assert isinstance(refused, LorasRefused)
            assert digest(offloaded) == digest(resident), "a set that failed changed the weights"
        leave_by_chance()
    for visitor in offloaded.served.visitors.all:
        visitor.leave()
    set_loras(offloaded)
    assert digest(offloaded) == before


@torch.inference_mode()
def test_weights_are_carried_both_ways_at_once_and_few_of_them_need_room_on_the_device():
    device, count, side = torch.device("cuda"), 48, 2048
    sources = [torch.full((side, side), float(i), dtype=torch.bfloat16).pin_memory() for i in range(count)]
    weights = [torch.empty_like(source).pin_memory() for source in sources]
    weights[5] = torch.empty_like(sources[5], device=device)
    ferry = Ferry(device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for name, base in ferry.bring((str(i), source) for i, source in enumerate(sources)):
        ferry.take(base if int(name) % 3 == 0 else base * 2, weights[int(name)])
    ferry.finish()
    for i, weight in enumerate(weights):
        assert (weight == (i if i % 3 == 0 else 2 * i)).all()
    assert torch.cuda.max_memory_allocated() - before < 16 * sources[0].nbytes


@pytest.mark.parametrize("name", ["flux-1", "wan-2.1", "qwen-image", "z-image"])
def test_four_loras_share_every_pass(name, family_folder, tmp_path):
    studio = Studio(family_folder(name), tmp_path, precision="fp32")
    requests = requests_with_loras(studio, name, tmp_path)
    drawn = studio.draw(requests)
    assert {len(jobs) for jobs in studio.passes("transformer")} == {4}
    for request in requests:
        reference = exactly(studio, request)
        assert relative_error(drawn[request.job_id].latents, reference.latents) < 10 * MIXED_TOLERANCE
