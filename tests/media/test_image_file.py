import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from photogram.core.errors import RequestError
from photogram.media.image_file import FILE_TYPES, check_side, encode_image

from .pictures import photo, psnr

QUALITIES = (0, 10, 35, 55, 75, 89, 90, 100)


def decoded(data):
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    channels=st.sampled_from([3, 4]),
    noise=st.sampled_from([0.0, 5.0, 500.0]),
    seed=st.integers(0, 9),
)
def test_png_gives_back_every_pixel(width, height, channels, noise, seed):
    picture = photo(width, height, channels, noise, seed)
    image = decoded(encode_image(picture, "png", 75))
    assert image.mode == ("RGB" if channels == 3 else "RGBA")
    assert np.array_equal(np.asarray(image), picture)


def test_png_of_many_bands_and_of_rows_longer_than_a_band_gives_back_every_pixel():
    for width, height in ((1500, 700), (100_000, 3)):
        picture = photo(width, height)
        assert np.array_equal(np.asarray(decoded(encode_image(picture, "png", 75))), picture)


def test_png_of_a_cropped_view_gives_back_its_pixels():
    view = photo(64, 64)[8:40, 4:60]
    assert np.array_equal(np.asarray(decoded(encode_image(view, "png", 75))), view)


def test_png_has_the_same_bytes_whatever_the_quality():
    picture = photo(64, 64)
    assert len({encode_image(picture, "png", quality) for quality in QUALITIES}) == 1


def test_png_is_not_much_larger_than_an_exhaustive_search_makes_it():
    picture = photo(512, 512)
    searched = io.BytesIO()
    Image.fromarray(picture).save(searched, "PNG", optimize=True)
    assert len(encode_image(picture, "png", 75)) < 1.15 * len(searched.getvalue())


def test_png_chunks_have_right_checksums():
    data = encode_image(photo(20, 20), "png", 75)
    position, kinds = 8, []
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        body = data[position + 4 : position + 8 + length]
        assert zlib.crc32(body) == int.from_bytes(data[position + 8 + length : position + 12 + length], "big")
        kinds.append(body[:4])
        position += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_higher_quality_is_a_larger_file_nearer_to_the_picture(format):
    picture = photo(256, 256)
    files = [encode_image(picture, format, quality) for quality in QUALITIES]
    sizes = [len(data) for data in files]
    nearness = [psnr(np.asarray(decoded(data).convert("RGB")), picture) for data in files]
    assert sizes == sorted(set(sizes))
    assert nearness == sorted(nearness)
    assert nearness[-1] > 38


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_the_file_is_of_the_format_and_size_asked_for_and_the_same_each_time(format):
    picture = photo(70, 50)
    data = encode_image(picture, format, 80)
    image = decoded(data)
    assert (image.format, image.size) == (format.upper(), (70, 50))
    assert image.get_format_mimetype() == FILE_TYPES[format].content_type
    assert data == encode_image(picture, format, 80)


def test_jpeg_keeps_full_colour_resolution_from_90_up():
    def sampling(quality):
        return [tuple(layer[1:3]) for layer in decoded(encode_image(photo(64, 64), "jpeg", quality)).layer]

    assert sampling(90) == [(1, 1)] * 3
    assert sampling(89)[0] == (2, 2)


def test_alpha_is_kept_by_webp_and_laid_over_white_by_jpeg():
    picture = np.zeros((32, 32, 4), np.uint8)
    picture[:, 16:] = (255, 0, 0, 255)
    assert decoded(encode_image(picture, "webp", 100)).mode == "RGBA"
    flat = np.asarray(decoded(encode_image(picture, "jpeg", 100)))
    assert (flat[:, :8] > 250).all()
    assert np.abs(flat[:, 24:].astype(int) - (255, 0, 0)).max() < 6


@pytest.mark.parametrize("quality", [89, 90, 100])
@pytest.mark.parametrize("side", [16, 200, 1024])
def test_pure_noise_fits_a_jpeg_of_any_quality(side, quality):
    noise = np.random.default_rng(0).integers(0, 2, (side, side, 3), dtype=np.uint8) * 255
    assert decoded(encode_image(noise, "jpeg", quality)).size == (side, side)


def test_a_side_that_the_format_cannot_hold_is_refused_by_name():
    with pytest.raises(RequestError, match="16383") as refused:
        encode_image(np.zeros((16, 16384, 3), np.uint8), "webp", 75)
    assert refused.value.param == "size"
    check_side("jpeg", 16384, 16)
