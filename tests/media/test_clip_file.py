import io
import json
import struct

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from photogram.core.errors import GenerationFailed, RequestError
from photogram.media.clip_file import crf, encode_mp4
from photogram.media.provenance import Provenance, read_provenance
from photogram.media.quality import PRESETS
from photogram.media.sound import Sound

from .pictures import decoded, moving, psnr

MADE = Provenance(
    prompt="ein Kätzchen & 猫 <spielt>",
    seed=7,
    steps=4,
    size="192x128",
    generated_size="192x128",
    num_frames=17,
    fps=16,
    model="acme/mover",
)


def boxes(data):
    """(type, payload) of each box at the file's top level."""
    found, at = [], 0
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        found.append((kind.decode("latin-1"), data[at + 8 : at + size]))
        at += size
    return found


@pytest.fixture(scope="module")
def frames():
    return moving(17, 192, 128)


@pytest.mark.parametrize("fps", [8, 16, 24, 30])
def test_a_clip_has_the_frames_the_size_the_rate_and_the_duration_it_was_given(frames, fps):
    with av.open(io.BytesIO(encode_mp4(frames, 192, 128, fps, 50))) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == fps
        assert (stream.width, stream.height, stream.frames) == (192, 128, 17)
        assert float(stream.duration * stream.time_base) == pytest.approx(17 / fps, abs=0.001)
        assert float(container.duration / av.time_base) == pytest.approx(17 / fps, abs=0.001)
        times = [frame.time for frame in container.decode(stream)]
    assert times == pytest.approx([number / fps for number in range(17)], abs=0.001)


def test_browsers_and_phones_can_play_it_at_every_compression(frames):
    for compression in (0, 50, 100):
        with av.open(io.BytesIO(encode_mp4(frames[:3], 192, 128, 16, compression))) as container:
            context = container.streams.video[0].codec_context
            assert (context.name, context.pix_fmt, context.profile) == ("h264", "yuv420p", "High")


def test_it_plays_while_it_loads_and_tells_its_colours(frames):
    data = encode_mp4(frames, 192, 128, 16, 50)
    assert [kind for kind, _ in boxes(data) if kind != "free"] == ["ftyp", "moov", "mdat"]
    with av.open(io.BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_range, context.colorspace) == (ColorRange.MPEG, Colorspace.ITU709)
        assert (context.color_primaries, context.color_trc) == (1, 1)


def test_colours_come_back_as_they_were_drawn():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 120, 40)]
    flat = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in colours])
    # One level of a channel is up to two of RGB in limited range.
    assert np.abs(decoded(encode_mp4(flat, 32, 32, 1, 100)).astype(int) - flat).max() <= 3


def test_each_preset_keeps_what_it_promises(frames):
    found = {word: psnr(decoded(encode_mp4(frames, 192, 128, 16, PRESETS[word])), frames) for word in PRESETS}
    assert found["maximum"] >= found["high"] > found["medium"] > found["low"]
    # A noise of one level alone is 48 dB; what is lost at the top is half the colour resolution at hard edges.
    assert found["low"] > 29
    assert found["medium"] > 33
    assert found["high"] > 35


def test_more_quality_is_never_a_smaller_file_up_to_90(frames):
    sizes = [len(encode_mp4(frames, 192, 128, 16, compression)) for compression in range(0, 91, 10)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] / 4


def test_compression_maps_to_rate_factors_a_browser_can_play():
    assert [crf(compression) for compression in (0, 10, 35, 50, 55, 90, 99, 100)] == [51, 45, 33, 25, 22, 5, 1, 1]
    factors = [crf(compression) for compression in range(101)]
    assert factors == sorted(factors, reverse=True)


def test_equal_frames_give_equal_bytes(frames):
    t = np.arange(48000) / 48000
    sound = Sound(np.sin(2 * np.pi * 440 * t, dtype=np.float32)[:, None] * 0.5, 48000)
    assert len({encode_mp4(frames, 192, 128, 16, 50, MADE, sound) for _ in range(6)}) == 1


def test_odd_sides_are_refused_before_anything_is_encoded():
    with pytest.raises(GenerationFailed, match="33x32"):
        encode_mp4(iter(()), 33, 32, 16, 50)


def test_the_file_tells_how_it_was_made(frames):
    data = encode_mp4(frames, 192, 128, 16, 50, MADE)
    assert read_provenance(data) == MADE
    with av.open(io.BytesIO(data)) as container:
        assert container.metadata["description"] == MADE.prompt
        assert json.loads(container.metadata["comment"])["seed"] == 7
    ((_, box),) = [found for found in boxes(data) if found[0] == "uuid"]
    assert b"trainedAlgorithmicMedia" in box
    assert len(decoded(data)) == 17


def test_without_provenance_nothing_is_told(frames):
    data = encode_mp4(frames[:2], 192, 128, 16, 50)
    assert read_provenance(data) is None
    assert "uuid" not in [kind for kind, _ in boxes(data)]


def test_what_only_begins_like_a_clip_is_refused():
    with pytest.raises(RequestError):
        read_provenance(b"\0\0\0\x18ftypisom" + bytes(100))


def test_sound_that_ends_early_is_followed_by_silence(frames):
    rate = 24000
    tone = np.full((rate // 4, 1), 0.5, np.float32) * np.sin(np.arange(rate // 4) / 10, dtype=np.float32)[:, None]
    data = encode_mp4(frames, 192, 128, 16, 50, None, Sound(tone, rate))
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        assert float(stream.duration * stream.time_base) == pytest.approx(17 / 16, abs=1 / 16)
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], axis=1)[0]
    assert np.abs(heard[: rate // 4]).max() > 0.3
    assert np.abs(heard[rate // 2 :]).max() < 0.01


@pytest.mark.parametrize("channels", [1, 2])
def test_sound_is_an_aac_track_as_long_as_the_picture(frames, channels):
    rate = 24000
    t = np.arange(3 * rate) / rate
    tone = np.sin(2 * np.pi * 440 * t, dtype=np.float32) * 0.5
    data = encode_mp4(frames, 192, 128, 16, 50, None, Sound(np.stack([tone] * channels, axis=1), rate))
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        assert (stream.codec_context.name, stream.rate, stream.channels) == ("aac", rate, channels)
        assert float(stream.duration * stream.time_base) == pytest.approx(17 / 16, abs=2048 / rate)
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], axis=1)[0]
    spectrum = np.abs(np.fft.rfft(heard[4096 : 4096 + rate // 2]))
    assert int(np.argmax(spectrum)) * 2 == pytest.approx(440, abs=4)
    assert len(decoded(data)) == 17
