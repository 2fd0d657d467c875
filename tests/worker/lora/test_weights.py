"""What is merged comes out again bit for bit, whatever happens in between."""

import hashlib
import random
from contextlib import nullcontext

import msgspec
import pytest
import torch

from photogram.core.messages import LorasReady, LorasRefused, SetLoras
from photogram.core.request import LoraUse

from ..drawing import Studio
from ..test_families_served import requests_of
from .files import Maker, diffusers_file, linears
from .formats import EXAMPLES


def digest(studio: Studio) -> str:
    """A hash of every parameter and buffer of every network, as its calls see them."""
    total = hashlib.sha256()
    for name, module in sorted(studio.served.modules.items()):
        with nullcontext() if module.loras is None else module.loras.weights.changing():
            for key, tensor in sorted(module.module.state_dict().items()):
                total.update(f"{name}.{key}".encode())
                total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def set_loras(studio: Studio, *uses: LoraUse, merged: bool = True) -> LorasReady | LorasRefused:
    studio.messages.clear()
    with torch.inference_mode():
        studio.worker.set_loras(SetLoras("r", uses, merged))
        studio.settle()
    return studio.messages[-1]


def uses_for(studio: Studio, folder, count: int = 4) -> list[LoraUse]:
    module = studio.card.lora_modules[0]
    layers = linears(studio.served.modules[module].module)
    return [
        LoraUse(
            nickname=f"lora-{i}",
            path=str(diffusers_file(folder / f"{i}.safetensors", module, layers, rank=2 + i, seed=i)),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("name", ["flux-1", "stable-diffusion-1.5"])
def test_twenty_random_switches_leave_every_bit_of_the_model_as_it_was(name, family_folder, tmp_path):
    import safetensors.torch

    studio = Studio(family_folder(name), tmp_path, precision="bf16")
    uses = uses_for(studio, tmp_path)
    if name == "stable-diffusion-1.5":
        # with convolutions and a text encoder
        path = tmp_path / "kohya.safetensors"
        safetensors.torch.save_file(EXAMPLES["kohya, Stable Diffusion"].make(Maker()), path)
        uses.append(LoraUse(nickname="kohya", path=str(path)))
    before, seen, chance = digest(studio), {}, random.Random(7)
    for _ in range(20):
        chosen = tuple(
            msgspec.structs.replace(use, strength=chance.choice((-0.6, 0.3, 0.8, 1.0, 1.5)))
            for use in chance.sample(uses, chance.randint(1, 3))
        )
        assert isinstance(set_loras(studio, *chosen), LorasReady)
        merged = digest(studio)
        assert merged != before
        assert seen.setdefault(chosen, merged) == merged
        if chance.random() < 0.3:
            assert isinstance(set_loras(studio, *chosen, merged=False), LorasReady)
            assert digest(studio) == before
    first, expected = next(iter(seen.items()))
    set_loras(studio, *first)
    assert digest(studio) == expected, "the same set gave other bits after other switches"
    set_loras(studio)
    assert digest(studio) == before


def test_order_of_merging_is_the_order_of_the_set(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    one, two, *_ = uses_for(studio, tmp_path)
    state = set_loras(studio, two, one).state
    assert [entry.nickname for entry in state.active["transformer"]] == ["lora-1", "lora-0"]
    assert state.active["transformer"][0].num_lora_layers_with_weights == len(
        linears(studio.served.modules["transformer"].module)
    )
    assert {entry.nickname: entry.rank for entry in state.loaded} == {"lora-0": 2, "lora-1": 3}


def test_a_set_that_fails_leaves_the_weights_as_they_were(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path, precision="fp16")
    one, two, *_ = uses_for(studio, tmp_path)
    set_loras(studio, one)
    merged = digest(studio)
    too_strong = msgspec.structs.replace(two, strength=1e30)
    absent = LoraUse(nickname="absent", path=str(tmp_path / "absent.safetensors"))
    for uses, code in (((one, too_strong), "invalid_lora"), ((two, absent), "lora_not_found")):
        answer = set_loras(studio, *uses)
        assert isinstance(answer, LorasRefused)
        assert answer.code == code
        assert answer.param
        assert digest(studio) == merged
    state = set_loras(studio, one).state
    assert [entry.nickname for entry in state.active["transformer"]] == ["lora-0"]


def test_device_failing_half_way_is_rolled_back(family_folder, tmp_path, monkeypatch):
    from photogram.worker.lora.changes import LowRank

    studio = Studio(family_folder("flux-1"), tmp_path)
    one, two, *_ = uses_for(studio, tmp_path)
    set_loras(studio, one)
    merged, num_calls, real = digest(studio), 0, LowRank.add_to

    def fail_once(self, weight, strength):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, weight, strength)

    monkeypatch.setattr(LowRank, "add_to", fail_once)
    answer = set_loras(studio, two)
    assert isinstance(answer, LorasRefused)
    assert answer.code == "out_of_memory"
    assert digest(studio) == merged


def test_jobs_after_an_unmerge_are_drawn_by_the_base(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    (use, *_) = uses_for(studio, tmp_path)
    plain = requests_of("flux-1")[0]
    before = studio.draw([plain])[plain.job_id].latents
    set_loras(studio, use)
    during = studio.draw([msgspec.structs.replace(plain, loras=(use,))])[plain.job_id].latents
    set_loras(studio, use, merged=False)
    after = studio.draw([plain])[plain.job_id].latents
    assert (after == before).all()
    assert not (during == before).all()


def test_a_strength_of_zero_is_the_base_and_the_next_lora_is_served(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    first, second, *_ = uses_for(studio, tmp_path)
    plain = requests_of("flux-1")[0]
    base = studio.draw([plain])[plain.job_id].latents
    nothing = msgspec.structs.replace(first, strength=0.0)
    answer = set_loras(studio, nothing)
    assert {one.strength for module in answer.state.active.values() for one in module} == {0.0}
    set_loras(studio, nothing, merged=False)
    drawn = [studio.draw([msgspec.structs.replace(plain, loras=(use,))]) for use in (nothing, second, nothing)]
    before, changed, after = (result[plain.job_id].latents for result in drawn)
    assert (before == base).all()
    assert (after == base).all()
    assert not (changed == base).all()


def test_a_compiled_denoiser_is_switched_without_compiling_again(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    module = studio.served.modules["transformer"]
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for block in module.module.transformer_blocks:
        block.compile(backend=backend)
    uses = uses_for(studio, tmp_path)
    plain = requests_of("flux-1")[0]
    studio.draw([plain])
    first = len(compiled)
    assert first > 0
    for use in uses:
        jobs = [msgspec.structs.replace(plain, job_id=f"{use.nickname}-{i}", loras=(use,)) for i in range(1)]
        assert all(drawn.failure is None for drawn in studio.draw(jobs).values())
        assert studio.worker.loras.merged()["transformer"] != ()
    assert len(compiled) == first
