"""What else the components of a loaded model can be: each class served as by itself, and no weight held twice."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from families import FAMILIES
from families.reference import picture
from photogram.core.errors import RequestError
from photogram.core.request import GenerateRequest
from photogram.models.latents import encode, knows_latents

from .drawing import Studio, draw_alone, relative_error
from .test_families_served import STACKED_TOLERANCE, requests_of

SIDE = 64


def a_mask(side: int = SIDE) -> Image.Image:
    """White where it is drawn anew: a block that lies on every family's latent grid."""
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).rectangle((side // 4, side // 4, side * 3 // 4 - 1, side * 3 // 4 - 1), fill=255)
    return mask


def a_clip(frames: int, seed: int = 0) -> np.ndarray:
    """A patchwork that moves to the right, uint8 (F, H, W, 3)."""
    first = np.asarray(picture(width=SIDE, height=SIDE, seed=seed))
    return np.stack([np.roll(first, 4 * i, axis=1) for i in range(frames)])


@dataclass(frozen=True, slots=True)
class Given:
    """What a request begins with, as files for the server and as arguments of the stock class."""

    fields: Mapping[str, Any]
    arguments: Mapping[str, Any]


def given(use: str, folder: Path, seed: int, frames: int | None) -> Given:
    image, path = picture(width=SIDE, height=SIDE, seed=seed), folder / f"{use}-{seed}.png"
    image.save(path)
    if use == "clip":
        np.save(folder / f"{seed}.npy", a_clip(frames, seed))
        clip = [Image.fromarray(frame) for frame in a_clip(frames, seed)]
        fields = {"task": "V2V", "video": str(folder / f"{seed}.npy"), "strength": 0.7}
        return Given(fields, {"video": clip, "strength": 0.7})
    fields = {"task": "I2V" if frames else "I2I", "images": (str(path),)}
    if use == "image":
        return Given(fields, {"image": image})
    if use == "redraw":
        return Given(fields | {"strength": 0.7}, {"image": image, "strength": 0.7})
    a_mask().save(folder / "mask.png")
    return Given(
        fields | {"strength": 0.8, "mask": str(folder / "mask.png")},
        {"image": image, "mask_image": a_mask(), "strength": 0.8},
    )


CASES = [
    ("stable-diffusion-1.5", "redraw", "StableDiffusionImg2ImgPipeline"),
    ("stable-diffusion-1.5", "inpaint", "StableDiffusionInpaintPipeline"),
    ("stable-diffusion-xl", "redraw", "StableDiffusionXLImg2ImgPipeline"),
    ("stable-diffusion-xl", "inpaint", "StableDiffusionXLInpaintPipeline"),
    ("stable-diffusion-3", "redraw", "StableDiffusion3Img2ImgPipeline"),
    ("stable-diffusion-3", "inpaint", "StableDiffusion3InpaintPipeline"),
    ("flux-1", "redraw", "FluxImg2ImgPipeline"),
    ("flux-1", "inpaint", "FluxInpaintPipeline"),
    ("qwen-image", "redraw", "QwenImageImg2ImgPipeline"),
    ("qwen-image", "inpaint", "QwenImageInpaintPipeline"),
    ("z-image", "redraw", "ZImageImg2ImgPipeline"),
    ("z-image", "inpaint", "ZImageInpaintPipeline"),
    ("ltx", "image", "LTXImageToVideoPipeline"),
    ("ltx-2", "image", "LTX2ImageToVideoPipeline"),
    ("wan-2.1", "clip", "WanVideoToVideoPipeline"),
    ("wan-2.2-ti2v", "image", "WanImageToVideoPipeline"),
    ("cogvideox", "clip", "CogVideoXVideoToVideoPipeline"),
]


@pytest.mark.parametrize(("name", "use", "class_name"), CASES)
def test_each_use_gives_what_its_own_class_gives(name, use, class_name, family_folder, tmp_path):
    studio = Studio(family_folder(name), tmp_path, max_batch_size=1)
    served = studio.served.by_use[use]
    assert type(served).__name__ == class_name
    for part, component in studio.served.pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            assert served.components[part] is component

    loaded = DiffusionPipeline.from_pretrained(family_folder(name))
    settings = {key: value for key, value in loaded.config.items() if isinstance(value, bool)}
    stock_class = getattr(diffusers, class_name)
    accepted = stock_class.__init__.__code__.co_varnames
    stock = stock_class(**{k: v for k, v in (settings | loaded.components).items() if k in accepted})

    requests, alone = [], {}
    for seed, request in enumerate(requests_of(name)):
        inputs = given(use, tmp_path, seed, request.num_frames)
        request = msgspec.structs.replace(request, num_inference_steps=request.num_inference_steps + 1, **inputs.fields)
        requests.append(request)
        alone[request.job_id] = draw_alone(stock, request, given=inputs.arguments)
    interleaved = studio.draw(requests)
    for job_id, reference in alone.items():
        assert interleaved[job_id].failure is None
        assert (interleaved[job_id].frames == reference.frames).all()
        assert interleaved[job_id].frames.shape[1:3] == (SIDE, SIDE)

    stacking = Studio(family_folder(name), tmp_path, max_batch_size=8)
    stacked = stacking.draw(requests)
    sizes = [len(jobs) for jobs in stacking.passes(*FAMILIES[name].denoisers)]
    # LTX-2's class takes one picture, so what two would look like cannot be learnt: its jobs take turns.
    assert (max(sizes) > 1) == ((name, use) != ("ltx-2", "image")), f"passes of {sizes} jobs"
    for job_id, reference in alone.items():
        assert relative_error(stacked[job_id].latents, reference.latents) < STACKED_TOLERANCE


# --- without a class of their own ---------------------------------------------------------------------------------


def drawn_from(studio: Studio, request: GenerateRequest):
    result = studio.draw([request])[request.job_id]
    assert result.failure is None, result.failure
    return result


def test_clip_from_noised_latents_is_what_the_video_to_video_class_gives(family_folder, tmp_path):
    """Wan 2.1 has such a class: the way of the families that have none is compared with it."""
    studio = Studio(family_folder("wan-2.1"), tmp_path)
    request = requests_of("wan-2.1")[1]
    fields = dict(given("clip", tmp_path, 1, request.num_frames).fields, strength=0.5)
    request = msgspec.structs.replace(request, **fields)
    by_class = drawn_from(studio, request)
    del studio.served.by_use["clip"]
    by_latents = drawn_from(studio, request)
    assert relative_error(by_latents.latents, by_class.latents) < STACKED_TOLERANCE


def test_mask_by_latents_is_what_the_inpaint_class_gives(family_folder, tmp_path):
    """FLUX.2 klein has such a class, not served as it draws at sizes of its own."""
    inputs = given("inpaint", tmp_path, 2, None)
    request = msgspec.structs.replace(requests_of("flux-2-klein")[1], **inputs.fields)
    loaded = DiffusionPipeline.from_pretrained(family_folder("flux-2-klein"))
    stock = diffusers.Flux2KleinInpaintPipeline(**loaded.components, is_distilled=loaded.config.is_distilled)
    reference = draw_alone(stock, request, given=inputs.arguments)
    drawn = drawn_from(Studio(family_folder("flux-2-klein"), tmp_path), request)
    assert relative_error(drawn.latents, reference.latents) < STACKED_TOLERANCE


@pytest.mark.parametrize("name", ["flux-2-klein", "sana", "flux-1-kontext", "qwen-image", "stable-diffusion-xl"])
def test_latents_outside_the_mask_are_the_picture_s(name, family_folder, tmp_path):
    studio = Studio(family_folder(name), tmp_path)
    studio.served.by_use.pop("inpaint", None)
    base = requests_of(name)[0]
    inputs = given("inpaint", tmp_path, 3, None)
    a_mask(base.width).save(tmp_path / "mask.png")
    inside = drawn_from(studio, msgspec.structs.replace(base, **inputs.fields | {"strength": None}))
    Image.new("L", (SIDE, SIDE), 0).save(tmp_path / "mask.png")
    nothing = drawn_from(studio, msgspec.structs.replace(base, job_id="nothing", **inputs.fields))
    Image.new("L", (SIDE, SIDE), 255).save(tmp_path / "mask.png")
    everything = drawn_from(
        studio, msgspec.structs.replace(base, job_id="everything", **inputs.fields | {"strength": None})
    )
    # Latents as the decoder is given them; of FLUX and FLUX.2 they are unpacked by then.
    *_, height, width = nothing.latents.shape
    border = torch.ones(height, width, dtype=torch.bool)
    border[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = False
    assert torch.equal(inside.latents[..., border], nothing.latents[..., border])
    assert relative_error(inside.latents[..., ~border], nothing.latents[..., ~border]) > 0.05
    assert relative_error(everything.latents, nothing.latents) > 0.05


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_is_encoded_for_the_solver_is_decoded_as_the_source(name, family_folder):
    """The pipeline's own end, given the source in place of the last sample, hands the decoder the source's latents."""
    request = requests_of(name)[0]
    pipeline = DiffusionPipeline.from_pretrained(family_folder(name))
    if not knows_latents(pipeline):
        assert name in ("cogvideox", "ltx-2")  # of which one has a class for it, the other makes sound as well
        return
    picture_HWC = np.asarray(picture(width=request.width, height=request.height))
    pixels = torch.tensor(picture_HWC).permute(2, 0, 1)[None] / 127.5 - 1
    if request.num_frames is not None:
        pixels = torch.stack([pixels.roll(i, dims=3) for i in range(request.num_frames)], dim=2)
    noted = []
    encoder = pipeline.vae.encode
    pipeline.vae.encode = lambda *args, **kwargs: noted.append(encoder(*args, **kwargs)) or noted[-1]
    with torch.inference_mode():
        source = encode(pipeline, pixels)
        pipeline.vae.encode = encoder
        step = type(pipeline.scheduler).step
        type(pipeline.scheduler).step = lambda self, *args, **kwargs: (source,)
        try:
            image = {"image": picture()} if FAMILIES[name].image == "required" else {}
            drawn = draw_alone(pipeline, request, given=image)
        finally:
            type(pipeline.scheduler).step = step
    kept = noted[0].latent_dist.mode() if "latent_dist" in noted[0] else noted[0].latent
    assert relative_error(drawn.latents, kept) < 1e-6


def test_nearer_to_the_source_the_smaller_the_strength(family_folder, tmp_path):
    studio = Studio(family_folder("flux-2-klein"), tmp_path)
    base = msgspec.structs.replace(requests_of("flux-2-klein")[0], num_inference_steps=8)
    fields = dict(given("redraw", tmp_path, 4, None).fields)
    plain = drawn_from(studio, base)
    drawn = {}
    for strength in (0.01, 0.3, 0.6, 1.0):
        fields["strength"] = strength
        drawn[strength] = drawn_from(studio, msgspec.structs.replace(base, job_id=f"{strength}", **fields)).latents
    distances = [relative_error(drawn[strength], drawn[0.01]) for strength in (0.3, 0.6, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] > 0.01
    assert torch.equal(drawn[1.0], plain.latents)  # nothing is left of the source


def test_strength_of_nothing_is_refused(family_folder, tmp_path):
    studio = Studio(family_folder("flux-2-klein"), tmp_path)
    inputs = given("redraw", tmp_path, 0, None)
    request = msgspec.structs.replace(requests_of("flux-2-klein")[0], **inputs.fields | {"strength": 0.0})
    failure = studio.draw([request])[request.job_id].failure
    assert (failure.code, failure.param) == (RequestError.code, "strength")


@pytest.mark.parametrize(
    ("name", "fields", "param"),
    [
        ("wan-2.1-i2v", {}, "image"),
        ("wan-2.1", {"images": ("a.png",)}, "image"),
        ("wan-2.1-i2v", {"video": "a.npy"}, "video"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_any_work(name, fields, param, family_folder, tmp_path):
    studio = Studio(family_folder(name), tmp_path)
    request = msgspec.structs.replace(requests_of(name)[0], **fields)
    failure = studio.draw([request])[request.job_id].failure
    assert (failure.code, failure.param) == ("unsupported_by_model", param)
    assert not studio.passes("transformer", "text_encoder", "vae")


def test_card_tells_what_the_model_can(family_folder, tmp_path):
    told = {}
    for name in FAMILIES:
        card = Studio(family_folder(name), tmp_path).card
        told[name] = (card.tasks, card.takes_mask, card.takes_strength, card.max_input_images)
    assert told == {
        "stable-diffusion-1.5": (("T2I", "I2I"), True, True, 1),
        "stable-diffusion-xl": (("T2I", "I2I"), True, True, 1),
        "stable-diffusion-3": (("T2I", "I2I"), True, True, 1),
        "flux-1": (("T2I", "I2I"), True, True, 1),
        "flux-2-klein": (("TI2I", "T2I", "I2I"), True, True, 16),
        "qwen-image": (("T2I", "I2I"), True, True, 1),
        "z-image": (("T2I", "I2I"), True, True, 1),
        "sana": (("T2I", "I2I"), True, True, 1),
        "ltx": (("TI2V", "T2V", "I2V", "V2V"), False, True, 1),
        "ltx-2": (("TI2V", "T2V", "I2V"), False, False, 1),
        "hunyuan-video-1.5": (("T2V", "V2V"), False, True, 0),
        "cogvideox": (("T2V", "V2V"), False, True, 0),
        "wan-2.1": (("T2V", "V2V"), False, True, 0),
        "wan-2.2": (("T2V", "V2V"), False, True, 0),
        "wan-2.2-ti2v": (("TI2V", "T2V", "I2V", "V2V"), False, True, 1),
        "flux-1-kontext": (("TI2I", "T2I", "I2I"), True, True, 16),
        "wan-2.1-i2v": (("I2V",), False, True, 1),
    }
