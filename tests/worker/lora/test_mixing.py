"""Jobs with LoRAs of their own share forward passes, and each gets the picture that its LoRAs merged would give."""

import msgspec
import pytest
import torch

from families import FAMILIES
from photogram.core.messages import LorasReady, SetLoras, Vitals
from photogram.core.request import GenerateRequest, LoraUse

from ..drawing import Studio, relative_error
from ..test_families_served import requests_of
from .files import Maker, diffusers_file, linears

# Of the latents' range, fp32: merged weights and products beside them round differently.
MIXED_TOLERANCE = 1e-4
RANKS = (2, 4, 8, 3)
# The layers that LoRAs for these models change: those of the blocks.
LAYERS = {
    "flux-1": ("transformer_blocks",),
    "wan-2.1": ("blocks",),
    "qwen-image": ("transformer_blocks",),
    "z-image": ("layers", "refiner"),
}


def requests_with_loras(studio: Studio, name: str, folder, module: str = "transformer") -> list[GenerateRequest]:
    """Four requests of equal length, each with a LoRA of another rank and strength."""
    layers = linears(studio.served.modules[module].module, *LAYERS.get(name, ()))
    plain = [*requests_of(name), msgspec.structs.replace(requests_of(name)[0], job_id="job-3", seed=9)]
    return [
        msgspec.structs.replace(
            request,
            num_inference_steps=3,
            loras=(
                LoraUse(
                    nickname=f"lora-{i}",
                    path=str(diffusers_file(folder / f"{i}.safetensors", module, layers, rank=RANKS[i], seed=i)),
                    strength=0.1 + 0.05 * i,
                ),
            ),
        )
        for i, request in enumerate(plain)
    ]


def exactly(studio: Studio, request: GenerateRequest):
    """The request drawn alone with its LoRAs merged."""
    return studio.draw([msgspec.structs.replace(request, deterministic=True)])[request.job_id]


@pytest.mark.parametrize("name", LAYERS)
def test_four_loras_of_unequal_rank_share_every_pass(name, family_folder, tmp_path):
    studio = Studio(family_folder(name), tmp_path)
    requests = requests_with_loras(studio, name, tmp_path)
    drawn = studio.draw(requests)
    passes = studio.passes(*FAMILIES[name].denoisers)
    calls_per_job = sum("job-0" in jobs for jobs in passes)
    assert [len(jobs) for jobs in passes] == [4] * calls_per_job
    without = studio.draw([msgspec.structs.replace(request, loras=()) for request in requests])
    for request in requests:
        reference = exactly(studio, request)
        assert drawn[request.job_id].failure is None
        assert relative_error(drawn[request.job_id].latents, reference.latents) < MIXED_TOLERANCE
        assert relative_error(without[request.job_id].latents, reference.latents) > 10 * MIXED_TOLERANCE


def test_a_job_without_loras_sees_none_of_those_beside_it(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    requests = requests_with_loras(studio, "flux-1", tmp_path)
    bare = msgspec.structs.replace(requests[0], loras=())
    reference = exactly(studio, bare)
    drawn = studio.draw([bare, *requests[1:]])
    assert max(len(jobs) for jobs in studio.passes("transformer")) == 4
    assert relative_error(drawn[bare.job_id].latents, reference.latents) < MIXED_TOLERANCE


def test_several_loras_of_one_job_add_up_beside_others(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    first, second, third, _ = requests_with_loras(studio, "flux-1", tmp_path)
    both = msgspec.structs.replace(first, loras=(*first.loras, *second.loras))
    reference = exactly(studio, both)
    drawn = studio.draw([both, third])
    assert max(len(jobs) for jobs in studio.passes("transformer")) == 2
    assert relative_error(drawn[both.job_id].latents, reference.latents) < MIXED_TOLERANCE


def test_deterministic_jobs_give_the_same_bits_beside_any_others(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    requests = requests_with_loras(studio, "flux-1", tmp_path)
    chosen = msgspec.structs.replace(requests[1], deterministic=True)
    alone = studio.draw([chosen])[chosen.job_id]
    beside = studio.draw([requests[0], chosen, *requests[2:]])[chosen.job_id]
    assert (alone.latents == beside.latents).all()
    assert (alone.frames == beside.frames).all()


def test_a_second_denoiser_has_its_own_loras(family_folder, tmp_path):
    studio = Studio(family_folder("wan-2.2"), tmp_path)
    assert studio.card.lora_modules[:2] == ("transformer", "transformer_2")
    layers = linears(studio.served.modules["transformer"].module, "blocks")
    path = str(diffusers_file(tmp_path / "one.safetensors", "transformer", layers, rank=4))
    plain = requests_of("wan-2.2")[0]

    def latents(*targets: str):
        uses = tuple(LoraUse(nickname="one", path=path, strength=0.2, target=target) for target in targets)
        return exactly(studio, msgspec.structs.replace(plain, loras=uses)).latents

    results = [latents(), latents("transformer"), latents("transformer_2"), latents("all")]
    for i, one in enumerate(results):
        assert all(relative_error(one, other) > 10 * MIXED_TOLERANCE for other in results[:i])
    assert (latents("critic") == results[0]).all()


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_lora_for_the_second_denoiser_leaves_the_first_one_as_it_is(deterministic, family_folder, tmp_path):
    """Wan 2.2 A14B: up to the boundary the clip is the one without LoRAs, bit for bit; from there on it is another."""
    studio = Studio(family_folder("wan-2.2"), tmp_path)
    layers = linears(studio.served.modules["transformer_2"].module, "blocks")
    path = str(diffusers_file(tmp_path / "one.safetensors", "transformer", layers, rank=4))
    plain = msgspec.structs.replace(requests_of("wan-2.2")[1], deterministic=deterministic)
    predictions: dict[str, list[torch.Tensor]] = {}

    def noting(name, real):
        def forward(*args, **kwargs):
            answer = real(*args, **kwargs)
            predictions[name].append(answer[0].clone())
            return answer

        return forward

    for name in ("transformer", "transformer_2"):
        module = studio.served.modules[name]
        module.real["forward"] = noting(name, module.real["forward"])

    def drawn(*targets: str):
        predictions.update(transformer=[], transformer_2=[])
        uses = tuple(LoraUse(nickname="one", path=path, strength=0.2, target=target) for target in targets)
        latents = studio.draw([msgspec.structs.replace(plain, loras=uses)])[plain.job_id].latents
        return predictions["transformer"], predictions["transformer_2"], latents

    first, second, latents = drawn()
    assert len(first) > 1
    assert len(second) > 1
    first_with, second_with, latents_with = drawn("transformer_2")
    assert all(torch.equal(one, other) for one, other in zip(first, first_with, strict=True))
    assert all(relative_error(one, other) > 1e-3 for one, other in zip(second_with, second, strict=True))
    assert relative_error(latents_with, latents) > 10 * MIXED_TOLERANCE
    first_again, second_again, _ = drawn()
    assert all(torch.equal(*pair) for pair in zip(first + second, first_again + second_again, strict=True))


def test_packed_layers_fall_back_to_switching(family_folder, tmp_path, caplog):
    """Z-Image's embedders see the tokens of all rows in one line: whose they are cannot be told from the shape."""
    caplog.set_level("INFO")
    studio = Studio(family_folder("z-image"), tmp_path)
    requests = [
        msgspec.structs.replace(
            request,
            loras=(
                LoraUse(
                    nickname=f"all-{i}",
                    path=str(
                        diffusers_file(
                            tmp_path / f"all-{i}.safetensors",
                            "transformer",
                            linears(studio.served.modules["transformer"].module),
                            rank=2 + i,
                            seed=i,
                        )
                    ),
                    strength=0.2,
                ),
            ),
        )
        for i, request in enumerate(requests_of("z-image"))
    ]
    drawn = studio.draw(requests)
    assert "no longer mixed in one pass" in caplog.text
    for request in requests:
        assert drawn[request.job_id].failure is None
        reference = exactly(studio, request)
        assert relative_error(drawn[request.job_id].latents, reference.latents) < MIXED_TOLERANCE


def test_convolutions_are_served_by_switching_and_the_log_says_so(family_folder, tmp_path, caplog):
    import safetensors.torch

    caplog.set_level("INFO")
    studio = Studio(family_folder("stable-diffusion-1.5"), tmp_path)
    requests = []
    for i, request in enumerate(requests_of("stable-diffusion-1.5")):
        key = "unet.mid_block.resnets.0.conv1"
        tensors = Maker(i).pair(f"{key}.lora_A.weight", f"{key}.lora_B.weight", (32, 32, 3, 3), 2 + i)
        path = tmp_path / f"conv-{i}.safetensors"
        safetensors.torch.save_file(tensors, path)
        use = LoraUse(nickname=f"conv-{i}", path=str(path))
        requests.append(msgspec.structs.replace(request, loras=(use,)))
    drawn = studio.draw(requests)
    assert {len(jobs) for jobs in studio.passes("unet")} == {1}
    assert "mid_block.resnets.0.conv1.weight" in caplog.text
    for request in requests:
        reference = exactly(studio, request)
        assert relative_error(drawn[request.job_id].latents, reference.latents) < MIXED_TOLERANCE


def test_text_encoder_loras_are_part_of_what_the_prompt_cache_knows(family_folder, tmp_path):
    studio = Studio(family_folder("stable-diffusion-1.5"), tmp_path)
    layers = linears(studio.served.modules["text_encoder"].module)
    path = str(diffusers_file(tmp_path / "words.safetensors", "text_encoder", layers, rank=4))
    plain = requests_of("stable-diffusion-1.5")[0]
    spoken = msgspec.structs.replace(plain, loras=(LoraUse(nickname="words", path=path, strength=0.5),))
    before = studio.draw([plain])[plain.job_id].latents
    changed = studio.draw([spoken])[plain.job_id].latents
    after = studio.draw([plain])[plain.job_id].latents
    assert relative_error(changed, before) > 10 * MIXED_TOLERANCE
    assert (after == before).all()
    assert studio.worker.prompt_cache.num_hits > 0


def test_jobs_keep_the_set_they_were_submitted_under(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    first, second, *_ = requests_with_loras(studio, "flux-1", tmp_path)
    reference = exactly(studio, first)

    def set_another(turn: int) -> None:
        if turn == 6:
            studio.worker.set_loras(SetLoras("set", second.loras, True))
            studio.settle()

    drawn = studio.draw([first], meanwhile=set_another)
    assert any(isinstance(message, LorasReady) for message in studio.messages)
    assert studio.worker.loras.merged()["transformer"] != ()
    assert relative_error(drawn[first.job_id].latents, reference.latents) < MIXED_TOLERANCE


def test_the_host_is_told_how_often_the_merged_loras_changed(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    first, second, *_ = requests_with_loras(studio, "flux-1", tmp_path)

    def told_after_setting(loras: tuple[LoraUse, ...]) -> int:
        """What the host knows once the set is merged into the weights and the worker idle."""
        with torch.inference_mode():
            studio.worker.set_loras(SetLoras("set", loras, True))
            studio.settle()
            while studio.worker.turn():
                pass
        [*_, last] = [message for message in studio.messages if isinstance(message, Vitals)]
        assert last.memory is None  # on a CPU
        return last.num_lora_switches

    counts = [told_after_setting(loras) for loras in (first.loras, first.loras, second.loras, ())]
    assert counts == [1, 1, 2, 3]
