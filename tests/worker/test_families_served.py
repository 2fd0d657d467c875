"""Each real pipeline class, served: alone, interleaved and stacked, against the unmodified pipeline by itself."""

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from families import FAMILIES
from photogram.core.request import GenerateRequest

from .drawing import Studio, draw_alone, relative_error

PROMPTS = (
    "a red circle",
    "a small blue square beside a large yellow star under a gray moon",
    "cat",
)
STEPS = (4, 6, 3)
GUIDANCE = (3.0, 4.5, 2.0)
STACKED_TOLERANCE = 1e-4  # of the latents' range, fp32


def requests_of(name: str, **changes) -> list[GenerateRequest]:
    """Three jobs of unequal prompts, seeds, steps and guidance."""
    family = FAMILIES[name]
    call = dict(family.call)
    shared = {
        "width": call.pop("width"),
        "height": call.pop("height"),
        "num_frames": call.pop("num_frames", None),
    } | changes
    call.pop("num_inference_steps", None)
    guided = {"guidance_scale", "true_cfg_scale"} & call.keys()
    main = "true_cfg_scale" if name == "qwen-image" else "guidance_scale"
    call.pop(main, None)
    return [
        GenerateRequest(
            job_id=f"job-{i}",
            owner="test",
            task="T2V" if family.media == "video" else "T2I",
            prompt=prompt,
            negative_prompt="blurry, pale" if family.negative_prompt else None,
            num_inference_steps=STEPS[i],
            guidance_scale=GUIDANCE[i] if guided else None,
            seed=i,
            extra=call,
            **shared,
        )
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.image != "required"])
def test_family_gives_what_its_unmodified_pipeline_gives(name, family_folder, tmp_path):
    family = FAMILIES[name]
    requests = requests_of(name)
    plain = DiffusionPipeline.from_pretrained(family_folder(name))
    alone = {request.job_id: draw_alone(plain, request) for request in requests}

    interleaving = Studio(family_folder(name), tmp_path, max_batch_size=1)
    interleaved = interleaving.draw(requests)
    order = [jobs[0] for jobs in interleaving.passes(*family.denoisers)]
    assert order != sorted(order), "the jobs ran one after another, not interleaved"
    for job_id, reference in alone.items():
        assert interleaved[job_id].failure is None
        assert (interleaved[job_id].frames == reference.frames).all()
        assert (interleaved[job_id].latents == reference.latents).all()

    stacking = Studio(family_folder(name), tmp_path, max_batch_size=8)
    stacked = stacking.draw(requests)
    sizes = [len(jobs) for jobs in stacking.passes(*family.denoisers)]
    assert max(sizes) == 3, f"no forward pass was shared by all three: {sizes}"
    for job_id, reference in alone.items():
        assert relative_error(stacked[job_id].latents, reference.latents) < STACKED_TOLERANCE


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if family.packed and family.image == "never"]
)
def test_landscape_and_portrait_of_equal_token_count_give_right_pictures(name, family_folder, tmp_path):
    family = FAMILIES[name]
    wide = requests_of(name, **family.wide)[0]
    tall = requests_of(name, **family.tall)[1]
    plain = DiffusionPipeline.from_pretrained(family_folder(name))
    studio = Studio(family_folder(name), tmp_path)
    drawn = studio.draw([wide, tall])
    for request in (wide, tall):
        reference = draw_alone(plain, request)
        assert relative_error(drawn[request.job_id].latents, reference.latents) < STACKED_TOLERANCE


def test_qwen_prompts_of_unequal_length_share_a_pass(family_folder, tmp_path):
    studio = Studio(family_folder("qwen-image"), tmp_path)
    drawn = studio.draw(requests_of("qwen-image"))
    assert all(result.failure is None for result in drawn.values())
    lengths = {len(studio.served.pipeline.tokenizer(prompt).input_ids) for prompt in PROMPTS}
    assert len(lengths) == 3
    assert max(len(jobs) for jobs in studio.passes("transformer")) == 3


def test_edits_with_inputs_of_unequal_size_give_right_pictures(family_folder, tmp_path):
    pictures = [Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 50).convert("RGB") for size in ((96, 64), (64, 96))]
    plain = DiffusionPipeline.from_pretrained(family_folder("flux-2-klein"))
    requests = []
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
        requests.append(requests_of("flux-2-klein", images=(str(tmp_path / f"{i}.png"),))[i])
    studio = Studio(family_folder("flux-2-klein"), tmp_path)
    drawn = studio.draw(requests)
    for request, picture in zip(requests, pictures, strict=True):
        reference = draw_alone(plain, request, [picture])
        assert drawn[request.job_id].failure is None
        assert relative_error(drawn[request.job_id].latents, reference.latents) < STACKED_TOLERANCE
