"""What cannot fit the device's memory is refused with the most that can; what may fit is not."""

import msgspec
import pytest

from photogram.core.card import ModelCard
from photogram.core.errors import RequestError
from photogram.core.footprint import Footprint, Room
from photogram.server.admission import check_memory
from photogram.server.sizes import Size

# 16 pixels a token side, 4 frames a latent frame, 100 bytes a token; a decoder of 8 bytes a pixel, 4 frames at a time.
FOOTPRINT = Footprint(token_side=16, frame_multiple=4, bytes_per_token=100, bytes_per_pixel=8, frames_at_once=4)
CARD = ModelCard(
    name="model",
    model_path="model",
    pipeline_class="WanPipeline",
    tasks=("T2V",),
    media="video",
    default_width=160,
    default_height=160,
    size_multiple=16,
    default_steps=4,
    frame_multiple=4,
    device="cuda:0",
    device_name="a GPU",
)


def with_room(denoise_bytes: int, decode_bytes: int = 10**12) -> ModelCard:
    return msgspec.structs.replace(
        CARD, room=Room(footprint=FOOTPRINT, denoise_bytes=denoise_bytes, decode_bytes=decode_bytes)
    )


def refusal(card: ModelCard, size: Size, frames: int | None = None) -> RequestError:
    with pytest.raises(RequestError) as raised:
        check_memory(card, size, frames)
    assert (raised.value.status, raised.value.code) == (400, "exceeds_memory")
    return raised.value


def test_what_fits_exactly_is_admitted_and_one_token_more_is_not():
    check_memory(with_room(10 * 10 * 100), Size(160, 160))
    assert refusal(with_room(10 * 10 * 100 - 1), Size(160, 160)).param == "size"


def test_a_card_that_knows_of_no_memory_admits_all():
    check_memory(CARD, Size(100_000, 100_000), 10_000)


def test_a_model_of_unknown_footprint_admits_all():
    room = Room(footprint=Footprint(token_side=8), denoise_bytes=0, decode_bytes=0)
    check_memory(msgspec.structs.replace(CARD, room=room), Size(8192, 8192), 1000)


@pytest.mark.parametrize("size", [Size(1024, 1024), Size(1920, 1088), Size(512, 2048)])
def test_the_largest_size_that_is_named_is_admitted_and_keeps_the_shape(size):
    card = with_room(1000 * 100)
    named = refusal(card, size).message.rpartition(" is ")[2].rstrip(".")
    width, height = map(int, named.split("x"))
    check_memory(card, Size(width, height))
    assert width % 16 == height % 16 == 0
    assert width / height == pytest.approx(size.width / size.height, rel=0.1)
    larger = width + 16
    refusal(card, Size(larger, round(size.height * larger / size.width / 16) * 16))


def test_a_clip_too_long_is_told_the_length_that_fits():
    card = with_room(5 * 10 * 10 * 100)
    error = refusal(card, Size(160, 160), 81)
    assert error.param == "num_frames"
    assert "at most 17 do" in error.message
    check_memory(card, Size(160, 160), 17)


def test_a_clip_whose_frames_alone_are_too_large_is_told_a_size():
    assert refusal(with_room(100 * 100), Size(320, 320), 9).param == "size"


def test_decoding_has_to_fit_too():
    frames, pixels = 8, 160 * 160
    needed = FOOTPRINT.decode_bytes(160, 160, frames)
    assert needed == pixels * frames * 24
    check_memory(with_room(10**12, needed), Size(160, 160), frames)
    refusal(with_room(10**12, needed - 1), Size(160, 160), frames)


def test_tiles_bound_what_decoding_takes():
    tiled = msgspec.structs.replace(FOOTPRINT, bytes_per_pixel=1000, pixels_at_once=64 * 64)
    assert tiled.decode_bytes(160, 160, 1) == 64 * 64 * 1000
