"""Pictures of strangers: what is taken, as what, and what a picture cannot do to the server."""

import asyncio
import io
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import psutil
import pytest
from hypothesis import strategies as st
from PIL import Image, ImageCms

from photogram.core.errors import EngineLost, RequestError, StorageFailed
from photogram.media import decoder_pool
from photogram.media.decoder_pool import DecoderPool

MAX_PIXELS = 1_000_000


def saved(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    pixels[..., 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    return Image.fromarray(pixels)


def png_of_size(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG file that says it is `width` x `height` and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


async def decoded(data: bytes, folder: Path, pool: DecoderPool, like=None) -> Image.Image:
    target = folder / "0.png"
    target.unlink(missing_ok=True)
    with tempfile.TemporaryFile() as source:
        source.write(data)
        if like is not None:
            await pool.mask(source, target, like)
        else:
            size = await pool.picture(source, target, "'image'", "image")
            with Image.open(target) as picture:
                assert picture.size == size
    with Image.open(target) as picture:
        picture.load()
        return picture


def decoders() -> set[psutil.Process]:
    return {child for child in psutil.Process().children() if "photogram.media.decoder" in child.cmdline()}


class Decoding:
    """A pool in a loop of its own, shared by the tests that do it no harm."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._pool = DecoderPool(max_pixels=MAX_PIXELS)

    def decode(self, data: bytes, folder: Path, like=None) -> Image.Image:
        return self._runner.run(decoded(data, folder, self._pool, like))

    def refusal(self, data: bytes, folder: Path, like=None) -> RequestError:
        with pytest.raises(RequestError) as raised:
            self.decode(data, folder, like)
        assert list(folder.iterdir()) == []
        assert raised.value.param == ("image" if like is None else "mask")
        return raised.value

    def close(self) -> None:
        self._runner.run(self._pool.close())
        self._runner.close()


@pytest.fixture(scope="module")
def decoding() -> Iterator[Decoding]:
    shared = Decoding()
    yield shared
    shared.close()


# --- what a picture becomes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_pixels_are_those_of_the_file(decoding, tmp_path, format):
    options = {"lossless": True} if format == "WEBP" else {"quality": 95}
    original = gradient(60, 40)
    picture = decoding.decode(saved(original, format, **options), tmp_path)
    assert (picture.mode, picture.format, picture.size) == ("RGB", "PNG", (60, 40))
    difference = np.abs(np.asarray(picture).astype(int) - np.asarray(original))
    assert difference.max() <= (6 if format == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(decoding, tmp_path, orientation):
    upright = gradient(48, 32)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a private remark"
    picture = decoding.decode(saved(stored, exif=exif), tmp_path)
    assert np.array_equal(np.asarray(picture), np.asarray(upright))
    assert picture.getexif().get(0x0112) is None
    assert b"private remark" not in (tmp_path / "0.png").read_bytes()


def test_inks_become_colours(decoding, tmp_path):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert decoding.decode(saved(red, "JPEG"), tmp_path).getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=3)


def test_a_wide_gamut_profile_is_applied(decoding, tmp_path):
    # A matrix profile whose red and green are exchanged shows beyond doubt that it was used.
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = {bytes(srgb[128 + 4 + 12 * i : 128 + 8 + 12 * i]): 128 + 4 + 12 * i for i in range(srgb[131])}
    red, green = table[b"rXYZ"], table[b"gXYZ"]
    srgb[red : red + 4], srgb[green : green + 4] = b"gXYZ", b"rXYZ"
    description = srgb.find("sRGB".encode("utf-16-be"))
    srgb[description : description + 8] = "swap".encode("utf-16-be")
    data = saved(Image.new("RGB", (16, 16), (255, 0, 0)), icc_profile=bytes(srgb))
    assert decoding.decode(data, tmp_path).getpixel((4, 4)) == pytest.approx((0, 255, 0), abs=3)
    unusable = saved(Image.new("RGB", (16, 16), (9, 8, 7)), icc_profile=b"\xff" * 3000)
    assert decoding.decode(unusable, tmp_path).getpixel((4, 4)) == (9, 8, 7)


def test_transparent_parts_are_white_and_sixteen_bits_keep_their_range(decoding, tmp_path):
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    half.paste((0, 0, 255, 0), (0, 0, 8, 16))
    picture = decoding.decode(saved(half), tmp_path)
    assert (picture.getpixel((2, 2)), picture.getpixel((12, 2))) == ((255, 255, 255), (255, 0, 0))
    deep = Image.fromarray(np.full((16, 16), 128 << 8, np.uint16))
    assert decoding.decode(saved(deep), tmp_path).getpixel((0, 0)) == (128, 128, 128)


def test_masks_are_edited_where_they_are_transparent(decoding, tmp_path):
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (8, 0, 16, 16))
    grey = decoding.decode(saved(mask), tmp_path, like=(16, 16))
    assert (grey.mode, grey.getpixel((2, 2)), grey.getpixel((12, 2))) == ("L", 0, 255)
    (tmp_path / "0.png").unlink()
    assert "16x16" in decoding.refusal(saved(mask), tmp_path, like=(16, 8)).message
    assert "alpha" in decoding.refusal(saved(gradient(16, 16)), tmp_path, like=(16, 16)).message


def test_what_is_hidden_behind_a_picture_does_not_get_through(decoding, tmp_path):
    polyglot = saved(gradient(16, 16)) + b"PK\x03\x04<script>alert(1)</script>"
    decoding.decode(polyglot, tmp_path)
    assert b"script" not in (tmp_path / "0.png").read_bytes()


# --- what is refused ----------------------------------------------------------------------------------------------


def test_bombs_are_refused_by_their_header(decoding, tmp_path):
    for size in ((100_000, 100_000), (2**31 - 1, 2**31 - 1), (1_000_001, 1), (1000, 1001)):
        began = time.monotonic()
        error = decoding.refusal(png_of_size(*size), tmp_path)
        assert error.code in ("image_too_large", "image_too_small")
        assert time.monotonic() - began < 5


def test_a_bomb_of_zeroes_is_refused_though_it_is_a_whole_picture(decoding, tmp_path):
    data = saved(Image.new("1", (20_000, 20_000)))
    assert len(data) < 100_000
    assert decoding.refusal(data, tmp_path).code == "image_too_large"


def test_a_profile_that_unpacks_to_hundreds_of_megabytes_is_refused(decoding, tmp_path):
    plain = saved(gradient(64, 64))
    body = b"sRGB\0\0" + zlib.compress(bytes(300_000_000), 1)
    chunk = struct.pack(">I", len(body)) + b"iCCP" + body + struct.pack(">I", zlib.crc32(b"iCCP" + body))
    after_header = 8 + 25
    refused = decoding.refusal(plain[:after_header] + chunk + plain[after_header:], tmp_path)
    assert refused.code == "invalid_image"
    assert decoding.decode(plain, tmp_path).size == (64, 64)


def test_exif_that_is_none_costs_nothing_but_itself(decoding, tmp_path):
    picture = gradient(64, 64)
    for exif in (b"\xff" * 60_000, b"MM\0*\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + bytes(60_000)):
        taken = decoding.decode(saved(picture, "JPEG", quality=95, exif=b"Exif\0\0" + exif), tmp_path)
        assert np.asarray(taken) == pytest.approx(np.asarray(picture), abs=12)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animations_are_refused_by_their_number_of_frames(decoding, tmp_path, format):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    error = decoding.refusal(saved(frames[0], format, save_all=True, append_images=frames[1:]), tmp_path)
    assert "3 frames" in error.message


def test_a_phones_jpeg_with_further_pictures_is_taken(decoding, tmp_path):
    further = [Image.new("RGB", (64, 48), "red"), Image.new("L", (32, 24))]
    data = saved(further[0], "MPO", save_all=True, append_images=further[1:])
    assert decoding.decode(data, tmp_path).getpixel((5, 5)) == pytest.approx((254, 0, 0), abs=2)


@pytest.mark.parametrize(
    "data",
    {
        "empty": b"",
        "text": b"hello",
        "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
        "html": b"<!DOCTYPE html><img src=x>",
        "gif": saved(Image.new("P", (64, 64)), "GIF"),
        "bmp": saved(gradient(64, 64), "BMP"),
        "tiff": saved(gradient(64, 64), "TIFF"),
        "pdf": saved(gradient(64, 64), "PDF"),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(/etc/passwd) (r) file\n",
        "zip": b"PK\x03\x04" + bytes(200),
        "mp4": bytes.fromhex("0000001c6674797069736f6d") + bytes(200),
        "png without its data": png_of_size(64, 64),
        "png of garbage": png_of_size(64, 64, os.urandom(64 * 256)),
        "png cut off": saved(gradient(64, 64))[:100],
        "jpeg cut off": saved(gradient(64, 64), "JPEG")[:300],
        "webp cut off": saved(gradient(64, 64), "WEBP")[:100],
        "only a magic": b"\x89PNG\r\n\x1a\n",
        "webp's magic": b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(30),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_no_picture_is_refused(decoding, tmp_path, data):
    error = decoding.refusal(data[1], tmp_path)
    assert (error.status, error.code) == (400, "invalid_image")


KEPT = sorted((Path(__file__).parents[1] / "fuzz/corpus/pictures").iterdir())


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_kept_malformed_pictures_are_refused(decoding, tmp_path, path):
    assert decoding.refusal(path.read_bytes(), tmp_path).status == 400


@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    format=st.sampled_from(["PNG", "JPEG", "WEBP"]),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6),
    cut=st.integers(0, 200),
)
def test_any_damage_gives_a_picture_or_a_refusal(decoding, tmp_path, format, changes, cut):
    data = bytearray(saved(gradient(48, 32), format))
    for place, bytes_ in changes:
        place %= len(data)
        data[place : place + len(bytes_)] = bytes_
    outcome: object
    try:
        outcome = decoding.decode(bytes(data[: len(data) - cut]), tmp_path).mode
    except RequestError as error:
        outcome = (error.status, error.param)
    assert outcome in ("RGB", (400, "image"))


# --- what cannot happen -------------------------------------------------------------------------------------------


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_pool, "_MARGIN_BYTES", 4 << 20)
    monkeypatch.setattr(decoder_pool, "_BYTES_PER_PIXEL", 1)

    async def story() -> None:
        pool = DecoderPool(max_pixels=10_000_000)
        try:
            await decoded(saved(Image.new("RGB", (3000, 3000))), tmp_path, pool)
        finally:
            await pool.close()

    with pytest.raises(RequestError) as raised:
        asyncio.run(story())
    assert raised.value.code == "invalid_image"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bound", ["wall_s", "cpu_s"])
def test_a_decode_that_takes_too_long_is_ended_and_others_go_on(tmp_path, bound):
    """A pixel limit far beyond what can be decoded in a second."""

    async def story() -> tuple[str, float]:
        pool = DecoderPool(**{"max_pixels": 400_000_000, bound: 1})
        slow = saved(Image.new("RGB", (18_000, 18_000)), compress_level=1)
        began = time.monotonic()
        try:
            with pytest.raises(RequestError) as raised:
                await decoded(slow, tmp_path, pool)
            took = time.monotonic() - began
            assert list(tmp_path.iterdir()) == []
            assert (await decoded(saved(gradient(16, 16)), tmp_path, pool)).size == (16, 16)
            return raised.value.message, took
        finally:
            await pool.close()

    message, took = asyncio.run(story())
    assert "could not be decoded within" in message
    assert took < 30


def test_the_process_is_started_again_when_it_was_killed(tmp_path):
    async def story() -> None:
        others = decoders()
        pool = DecoderPool(max_pixels=MAX_PIXELS)
        try:
            for _ in range(3):
                await decoded(saved(gradient(16, 16)), tmp_path, pool)
                (child,) = decoders() - others
                child.kill()
        finally:
            await pool.close()
        assert decoders() == others

    asyncio.run(story())


def test_many_pictures_leave_no_process_and_no_descriptor_behind(tmp_path):
    async def story() -> tuple[int, int]:
        others = decoders()
        pool = DecoderPool(max_pixels=MAX_PIXELS, num_at_once=3)
        data, bad = saved(gradient(16, 16)), b"no picture"

        async def one(number: int) -> None:
            folder = tmp_path / str(number)
            folder.mkdir()
            if number % 3:
                await decoded(data, folder, pool)
            else:
                with pytest.raises(RequestError):
                    await decoded(bad, folder, pool)

        try:
            await one(0)
            before = psutil.Process().num_fds()
            await asyncio.gather(*(one(number) for number in range(1, 60)))
            after = psutil.Process().num_fds()
            (child,) = decoders() - others
            # A fork has answered before it has ended: its descriptors are closed first.
            _, alive = psutil.wait_procs(child.children(), timeout=30)
            assert alive == []
            return before, after
        finally:
            await pool.close()

    before, after = asyncio.run(story())
    assert after == before


def test_a_full_disk_is_a_storage_failure_and_not_the_clients(tmp_path):
    async def story(target: Path) -> None:
        pool = DecoderPool(max_pixels=MAX_PIXELS)
        try:
            with tempfile.TemporaryFile() as source:
                source.write(saved(gradient(16, 16)))
                await pool.picture(source, target, "'image'", "image")
        finally:
            await pool.close()

    with pytest.raises(StorageFailed):
        asyncio.run(story(tmp_path / "no such folder" / "0.png"))


def test_a_closed_pool_starts_nothing(tmp_path):
    async def story() -> None:
        pool = DecoderPool(max_pixels=MAX_PIXELS)
        await pool.close()
        await decoded(saved(gradient(16, 16)), tmp_path, pool)

    with pytest.raises(EngineLost):
        asyncio.run(story())
    assert list(tmp_path.iterdir()) == []
