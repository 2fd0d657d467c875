"""A pipeline without a row in the tables is served with what its signature and configuration tell."""

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from families import FAMILIES
from photogram.core.request import GenerateRequest
from photogram.models import derive
from photogram.models.checkpoint import find_checkpoint

from .drawing import Studio

FIVE = ("stable-diffusion-1.5", "flux-1", "sana", "ltx", "wan-2.1")


@pytest.fixture
def without_cards(monkeypatch):
    def derive_card(*args, **kwargs):
        return derive.derive_card(*args, **kwargs, families={})

    monkeypatch.setattr("photogram.worker.loading.derive_card", derive_card)


@pytest.mark.parametrize("name", FIVE)
def test_family_without_a_card_is_served_with_the_defaults_found(name, family_folder, tmp_path, without_cards):
    studio = Studio(family_folder(name), tmp_path)
    card = studio.card
    assert card.media == FAMILIES[name].media
    assert card.default_width % card.size_multiple == 0
    # The defaults found are those of the full-sized model; the smallest legal size shows that they are understood.
    side = 4 * card.size_multiple
    request = GenerateRequest(
        job_id="job",
        owner="test",
        task=card.tasks[0],
        prompt="a red circle",
        width=side,
        height=side,
        num_frames=None if card.default_frames is None else 1 + 2 * card.frame_multiple,
        num_inference_steps=2,
        guidance_scale=card.default_guidance,
        seed=1,
    )
    drawn = studio.draw([request])["job"]
    assert drawn.failure is None
    frames = 1 if request.num_frames is None else request.num_frames
    assert drawn.frames.shape == (frames, side, side, 3)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_size_multiple_is_what_the_pipeline_accepts(name, family_folder):
    """At the multiple found, the pipeline draws exactly the size that was asked for."""
    family = FAMILIES[name]
    pipeline = DiffusionPipeline.from_pretrained(family_folder(name))
    pipeline.set_progress_bar_config(disable=True)
    multiple = derive.token_side(pipeline)
    width, height = 3 * multiple, 2 * multiple
    if multiple == 8:
        width, height = 40, 48
    call = dict(family.call) | {"width": width, "height": height}
    if name == "sana":
        call["use_resolution_binning"] = False
    if name == "flux-1-kontext":
        call["max_area"] = width * height
    if family.image == "required":
        call["image"] = Image.new("RGB", (width, height), "red")
    with torch.inference_mode():
        result = pipeline(prompt="cat", output_type="pt", return_dict=False, **call)[0]
    assert tuple(result.shape[-2:]) == (height, width)


def test_folder_may_carry_its_own_card(family_folder, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for part in family_folder("flux-1").iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "photogram.json").write_text('{"default_width": 96, "default_height": 64, "max_native_pixels": 6144}')
    card = Studio(folder, tmp_path).card
    assert (card.default_width, card.default_height, card.max_native_pixels) == (96, 64, 6144)
    assert find_checkpoint(str(folder), revision=None, variant=None).overrides["default_width"] == 96
