"""At which size a model looks at the pictures of an edit: the one at which it draws, where it knows only one."""

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from families.reference import picture
from photogram.core.card import ModelCard
from photogram.core.request import GenerateRequest
from photogram.worker.arguments import call_arguments
from photogram.worker.inputs import as_reference

from .drawing import Studio, draw_alone
from .test_families_served import requests_of


@pytest.fixture
def native_klein(family_folder, tmp_path) -> Path:
    """FLUX.2 klein that draws at most 128x128 pixels."""
    folder = tmp_path / "klein"
    folder.mkdir()
    for part in family_folder("flux-2-klein").iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "photogram.json").write_text(json.dumps({"max_native_pixels": 128 * 128}))
    return folder


def saved(picture: Image.Image, folder: Path) -> str:
    path = folder / f"{picture.width}x{picture.height}.png"
    picture.save(path)
    return str(path)


def edit(name: str, paths: Sequence[str], **fields: object) -> GenerateRequest:
    return msgspec.structs.replace(requests_of(name)[0], task="I2I", images=tuple(paths), **fields)


def looked_at(studio: Studio, request: GenerateRequest, card: ModelCard | None = None) -> list[Image.Image]:
    served = studio.served
    arguments = call_arguments(
        served.for_job(request), served.route(request), request, served.card if card is None else card
    )
    images = arguments["image"]
    return images if isinstance(images, list) else [images]


@pytest.mark.parametrize(
    ("given", "drawn", "expected"),
    [
        ((400, 400), (256, 256), (256, 256)),
        ((200, 200), (256, 256), (256, 256)),
        ((20, 20), (256, 256), (256, 256)),
        ((400, 300), (288, 224), (288, 224)),
        ((1024, 768), (288, 224), (288, 224)),
        ((400, 300), (256, 256), (288, 224)),  # its own aspect, whatever the drawing's
        ((300, 200), (304, 208), (304, 208)),
        ((256, 256), (128, 128), (128, 128)),
        ((256, 256), (32, 32), (64, 64)),  # FLUX.2 looks at nothing smaller
        ((1200, 200), (96, 16), (384, 64)),
    ],
)
def test_reference_has_its_own_aspect_and_the_drawing_s_pixel_count(given, drawn, expected):
    reference = as_reference(Image.new("RGB", given), *drawn, 16)
    assert reference.size == expected


def test_a_reference_of_the_drawn_size_is_left_as_it_is():
    given = picture(width=64, height=96)
    assert as_reference(given, 64, 96, 16) is given


def test_edit_of_a_large_upload_is_that_of_the_same_picture_at_the_native_size(native_klein, family_folder, tmp_path):
    large = picture(width=512, height=512)
    small = large.resize((128, 128), Image.Resampling.LANCZOS)
    studio = Studio(native_klein, tmp_path)
    request = edit("flux-2-klein", [saved(large, tmp_path)], width=128, height=128)
    drawn = studio.draw([request])[request.job_id]
    assert drawn.failure is None
    stock = DiffusionPipeline.from_pretrained(family_folder("flux-2-klein"))
    assert (drawn.frames == draw_alone(stock, request, [small]).frames).all()
    assert not (drawn.frames == draw_alone(stock, request, [large]).frames).all()


def test_several_references_each_keep_their_aspect_and_a_masked_one_lies_as_it_is_drawn(native_klein, tmp_path):
    wide, tall = saved(picture(width=320, height=160), tmp_path), saved(picture(width=90, height=180), tmp_path)
    studio = Studio(native_klein, tmp_path)
    request = edit("flux-2-klein", [wide, tall], width=128, height=128)
    assert [image.size for image in looked_at(studio, request)] == [(176, 96), (96, 176)]
    mask = saved(Image.new("L", (321, 160), 255), tmp_path)
    masked = msgspec.structs.replace(request, mask=mask)
    assert [image.size for image in looked_at(studio, masked)] == [(128, 128), (96, 176)]


@pytest.mark.parametrize("name", ["flux-2-klein", "flux-1-kontext"])
def test_without_a_native_size_or_with_sizes_of_its_own_a_model_gets_the_picture_itself(name, family_folder, tmp_path):
    given = picture(width=192, height=128)
    studio = Studio(family_folder(name), tmp_path)
    request = edit(name, [saved(given, tmp_path)])
    cards = [studio.card]
    if name == "flux-1-kontext":  # which enlarges to a megapixel itself: once is enough
        cards.append(msgspec.structs.replace(studio.card, max_native_pixels=64 * 64))
    for card in cards:
        assert (np.asarray(looked_at(studio, request, card)[0]) == np.asarray(given)).all()


@pytest.mark.parametrize(("size", "why"), [((1000, 64), "Aspect ratio"), ((48, 48), "too small")])
def test_a_picture_that_the_pipeline_never_looks_at_is_refused_before_any_work(size, why, family_folder, tmp_path):
    studio = Studio(family_folder("flux-2-klein"), tmp_path)
    request = edit("flux-2-klein", [saved(Image.new("RGB", size), tmp_path)])
    failure = studio.draw([request])[request.job_id].failure
    assert failure.code == "invalid_value"
    assert why in failure.message
    assert not studio.passes("transformer", "text_encoder", "vae")
