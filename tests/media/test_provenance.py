import io
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from photogram import __version__
from photogram.core.card import ModelCard
from photogram.core.errors import RequestError
from photogram.core.request import GenerateRequest, OutputSpec
from photogram.media.image_file import encode_image
from photogram.media.provenance import Provenance, describe, read_provenance

from .pictures import photo

FORMATS = ("png", "jpeg", "webp")
PICTURE = photo(32, 32)
MADE = Provenance(
    prompt="a red circle",
    negative_prompt="blur",
    seed=2**63 - 1,
    steps=20,
    guidance_scale=3.5,
    size="32x32",
    generated_size="32x32",
    model="some/model",
    revision="abc123",
)
PROMPTS = [
    "plain",
    "",
    "café, Ångström",
    "紅い円 🟥🧑‍🎨 on a <b>\"white\" & 'bright'</b> wall",
    "two\nlines\tand a NUL \0 and \x1b \x85 \ufffe \uffff",
    '{"seed": 1}',
    "UNICODE",
]


def read_xmp(data):
    with Image.open(io.BytesIO(data)) as image:
        packet = image.info["xmp"]
    description = ElementTree.fromstring(packet).find(".//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    return description.attrib


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_was_written_is_read_back(format, prompt):
    made = msgspec.structs.replace(MADE, prompt=prompt, negative_prompt=prompt)
    assert read_provenance(encode_image(PICTURE, format, 75, made)) == made


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=300), format=st.sampled_from(FORMATS))
def test_any_prompt_is_read_back(prompt, format):
    made = msgspec.structs.replace(MADE, prompt=prompt, negative_prompt=None, guidance_scale=None, revision=None)
    data = encode_image(PICTURE, format, 75, made)
    assert read_provenance(data) == made
    assert read_xmp(data)["{http://ns.adobe.com/xap/1.0/}CreatorTool"] == made.software


@pytest.mark.parametrize("format", FORMATS)
def test_without_provenance_the_file_says_nothing(format):
    data = encode_image(PICTURE, format, 75)
    assert read_provenance(data) is None
    for trace in (b"photogram", b"Exif", b"xmp", b"tEXt", b"iTXt", b"tIME"):
        assert trace not in data


def test_png_bytes_with_metadata_are_the_same_whatever_the_quality():
    assert encode_image(PICTURE, "png", 5, MADE) == encode_image(PICTURE, "png", 95, MADE)


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_leaves_the_pixels_as_they_are(format):
    def pixels(data):
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image)

    assert np.array_equal(pixels(encode_image(PICTURE, format, 75)), pixels(encode_image(PICTURE, format, 75, MADE)))


def test_png_texts_are_plain_chunks_and_international_ones_only_where_needed():
    data = encode_image(PICTURE, "png", 75, msgspec.structs.replace(MADE, prompt="café"))
    with Image.open(io.BytesIO(data)) as image:
        assert image.text["Description"] == "café"
        assert image.text["Software"] == f"photogram {__version__}"
        assert '"seed":9223372036854775807' in image.text["photogram"]
    assert b"tEXtDescription\0caf\xe9" in data
    assert b"iTXtDescription" in encode_image(PICTURE, "png", 75, msgspec.structs.replace(MADE, prompt="🟥"))


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_exif_shows_the_prompt_and_the_program_to_other_programs(format):
    with Image.open(io.BytesIO(encode_image(PICTURE, format, 75, MADE))) as image:
        exif = image.getexif()
    assert exif[0x010E] == "a red circle"
    assert exif[0x0131] == f"photogram {__version__}"


@pytest.mark.parametrize("format", FORMATS)
def test_xmp_says_that_a_model_made_the_picture_and_how(format):
    found = read_xmp(encode_image(PICTURE, format, 75, MADE))
    assert found["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert msgspec.json.decode(found["{urn:photogram:1}parameters"], type=Provenance) == MADE


@pytest.mark.parametrize("prompt", ["ワード " * 8000, "🟥" * 32_000])
def test_the_longest_prompt_is_whole_in_png_and_webp_and_shortened_openly_in_jpeg(prompt):
    made = msgspec.structs.replace(MADE, prompt=prompt)
    for format in ("png", "webp"):
        assert read_provenance(encode_image(PICTURE, format, 75, made)) == made
    found = read_provenance(encode_image(PICTURE, "jpeg", 75, made))
    assert found.shortened
    assert prompt.startswith(found.prompt)
    assert len(found.prompt) > 5_000
    assert (found.seed, found.negative_prompt) == (made.seed, made.negative_prompt)


def test_a_request_is_described_by_what_makes_it_again():
    request = GenerateRequest(
        job_id="img_" + "0" * 32,
        owner="someone",
        task="T2I",
        prompt="a cat",
        width=1280,
        height=736,
        num_inference_steps=4,
        guidance_scale=1.0,
        seed=7,
    )
    card = ModelCard(
        name="m",
        model_path="/m",
        revision="r",
        pipeline_class="P",
        tasks=("T2I",),
        media="image",
        default_width=64,
        default_height=64,
        size_multiple=16,
        default_steps=4,
        device="cpu",
        device_name="cpu",
    )
    output = OutputSpec(width=1280, height=720, format="png", compression=75)
    made = describe(request, output, card)
    assert (made.size, made.generated_size) == ("1280x720", "1280x736")
    assert (made.prompt, made.seed, made.steps, made.guidance_scale) == ("a cat", 7, 4, 1.0)
    assert (made.model, made.revision) == ("m", "r")
    again = describe(
        msgspec.structs.replace(request, job_id="img_" + "1" * 32, owner="other"),
        OutputSpec(width=1280, height=720, format="png", compression=5),
        card,
    )
    assert again == made
    assert made.quality_mode == "exact"
    assert describe(msgspec.structs.replace(request, quality_mode="fast"), output, card).quality_mode == "fast"


def test_bytes_that_are_no_picture_are_refused_and_foreign_pictures_say_nothing():
    with pytest.raises(RequestError):
        read_provenance(b"not a picture")
    foreign = io.BytesIO()
    Image.fromarray(PICTURE).save(foreign, "PNG")
    assert read_provenance(foreign.getvalue()) is None
