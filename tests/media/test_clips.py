import contextlib
import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from photogram.core.errors import RequestError, StorageFailed
from photogram.media.clip_file import encode_mp4
from photogram.media.clips import ClipFacts, probe_clip, write_frames, write_sound
from photogram.media.first_frame import of_clip_end, of_picture
from photogram.media.sound import KEPT_RATE, Sound
from photogram.media.stills import STILLS

from .pictures import moving, psnr

PIXELS = 1920 * 1088


@pytest.fixture(scope="module")
def frames():
    return moving(17, 192, 128)


@pytest.fixture(scope="module")
def clip(frames):
    return encode_mp4(frames, 192, 128, 16, 90)


def other_file(frames, format, codec, pix_fmt="yuv420p", times=None):
    """A clip as another program writes it; `times` are the frames' times in hundredths of a second."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 100)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = (times or range(0, 4 * len(frames), 4))[number], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def read(data, tmp_path, **changes):
    options = {"width": 192, "height": 128, "fps": 16, "num_frames": 17, "max_pixels": PIXELS, **changes}
    with (tmp_path / "frames.npy").open("wb") as target:
        write_frames(io.BytesIO(data), "'video'", target, **options)
    return np.load(tmp_path / "frames.npy")


def test_a_clip_is_known_before_it_is_decoded(clip):
    known = ClipFacts(width=192, height=128, num_frames=17, fps=16.0)
    assert probe_clip(io.BytesIO(clip), "'video'", max_pixels=PIXELS) == known
    assert known.seconds == 17 / 16


def test_frames_come_back_in_their_order_and_colours(clip, frames, tmp_path):
    found = read(clip, tmp_path)
    assert (found.dtype, found.shape) == (np.uint8, frames.shape)
    assert min(psnr(one, drawn) for one, drawn in zip(found, frames, strict=True)) > 34


def test_another_rate_takes_the_frame_that_is_shown_at_each_time(clip, frames, tmp_path):
    half = read(clip, tmp_path, fps=8, num_frames=9)
    assert all(psnr(one, drawn) > 34 for one, drawn in zip(half, frames[::2], strict=True))
    double = read(clip, tmp_path, fps=32, num_frames=34)
    assert all(np.array_equal(double[2 * number], double[2 * number + 1]) for number in range(17))


def test_frames_of_unequal_duration_are_shown_as_long_as_they_last(frames, tmp_path):
    data = other_file(frames[:3], "matroska", "libx264", times=[0, 50, 75])
    found = read(data, tmp_path, fps=8, num_frames=8)
    shown = [max(range(3), key=lambda number: psnr(one, frames[number])) for one in found]
    assert shown == [0, 0, 0, 0, 1, 1, 2, 2]


def test_a_longer_reading_stays_at_the_last_frame_and_a_shorter_one_stops(clip, frames, tmp_path):
    longer = read(clip, tmp_path, num_frames=21)
    assert all(psnr(one, frames[16]) > 34 for one in longer[16:])
    assert len(read(clip, tmp_path, num_frames=5)) == 5


def test_another_size_is_covered_and_cropped_evenly(clip, frames, tmp_path):
    found = read(clip, tmp_path, width=128, height=128, num_frames=1)[0]
    assert psnr(found, frames[0][:, 32:160]) > 34


@pytest.mark.parametrize(
    ("format", "codec"), [("mov", "libx264"), ("webm", "libvpx-vp9"), ("matroska", "libx264"), ("mp4", "mpeg4")]
)
def test_the_formats_of_other_programs_are_read(frames, format, codec, tmp_path):
    data = other_file(frames[:6], format, codec)
    facts = probe_clip(io.BytesIO(data), "'video'", max_pixels=PIXELS)
    assert (facts.width, facts.height, facts.num_frames) == (192, 128, 6)
    assert facts.fps == pytest.approx(25, rel=0.01)
    found = read(data, tmp_path, fps=25, num_frames=6)
    assert psnr(found, frames[:6]) > 24


def test_a_clip_that_was_filmed_upright_is_read_upright(clip, tmp_path):
    """Telephones store the frames lying down, and a matrix that turns them."""
    identity = b"".join(number.to_bytes(4, "big", signed=True) for number in (1 << 16, 0, 0, 0, 1 << 16, 0))
    quarter = b"".join(number.to_bytes(4, "big", signed=True) for number in (0, 1 << 16, 0, -(1 << 16), 0, 0))
    track = clip.index(b"tkhd")
    at = clip.index(identity, track)
    turned = clip[:at] + quarter + clip[at + len(quarter) :]
    facts = probe_clip(io.BytesIO(turned), "'video'", max_pixels=PIXELS)
    assert (facts.width, facts.height) == (128, 192)
    upright = read(turned, tmp_path, width=128, height=192, num_frames=1)[0]
    lying = read(clip, tmp_path, num_frames=1)[0]
    assert psnr(upright, np.rot90(lying, -1)) > 40


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_video"),
        (b"no clip at all", "invalid_video"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "invalid_video"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "invalid_video"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isom", "invalid_video"),
        (b"\x1aE\xdf\xa3" + bytes(64), "invalid_video"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "invalid_video"),
    ],
)
def test_what_is_no_clip_is_refused_with_the_parameter(data, code):
    with pytest.raises(RequestError) as refusal:
        probe_clip(io.BytesIO(data), "'video'", max_pixels=PIXELS)
    assert (refusal.value.param, refusal.value.code) == ("video", code)


def test_a_clip_of_too_many_pixels_is_refused_before_it_is_decoded(clip):
    with pytest.raises(RequestError, match="192x128: over 10000 pixels") as refusal:
        probe_clip(io.BytesIO(clip), "'video'", max_pixels=10_000)
    assert refusal.value.code == "video_too_large"


def test_a_codec_that_is_not_listed_is_refused(frames):
    data = other_file(frames[:2], "mov", "prores_ks", pix_fmt="yuv422p10le")
    with pytest.raises(RequestError, match="prores") as refusal:
        probe_clip(io.BytesIO(data), "'video'", max_pixels=PIXELS)
    assert refusal.value.code == "unsupported_video"


def test_every_truncation_of_a_clip_is_refused_or_read(clip, tmp_path):
    for length in range(0, len(clip), len(clip) // 40):
        with contextlib.suppress(RequestError):
            probe_clip(io.BytesIO(clip[:length]), "'video'", max_pixels=PIXELS)
            read(clip[:length], tmp_path)


def test_noise_in_a_clip_is_refused_or_read(clip, tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(clip)
        for at in rng.integers(0, len(clip), 30):
            broken[at] = rng.integers(256)
        with contextlib.suppress(RequestError):
            probe_clip(io.BytesIO(broken), "'video'", max_pixels=PIXELS)
            read(bytes(broken), tmp_path)


def test_a_thumbnail_is_the_frame_in_the_middle(clip, frames):
    with Image.open(io.BytesIO(STILLS["thumbnail"].make(clip))) as picture:
        assert (picture.format, picture.size) == ("WEBP", (192, 128))
        found = [psnr(np.asarray(picture.convert("RGB")), frame) for frame in frames]
    assert found.index(max(found)) == 8


def test_a_spritesheet_shows_frames_from_start_to_end(clip, frames):
    with Image.open(io.BytesIO(STILLS["spritesheet"].make(clip))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (5 * 192, 4 * 128))
        sheet = np.asarray(picture)
    for number, frame in enumerate(frames):
        row, column = divmod(number, 5)
        assert psnr(sheet[row * 128 : row * 128 + 128, column * 192 : column * 192 + 192], frame) > 28


def test_large_and_long_clips_have_small_stills():
    data = encode_mp4(moving(30, 768, 64), 768, 64, 16, 20)
    with Image.open(io.BytesIO(STILLS["thumbnail"].make(data))) as picture:
        assert picture.size == (512, 43)
    with Image.open(io.BytesIO(STILLS["spritesheet"].make(data))) as picture:
        assert picture.size == (5 * 320, 5 * 27)


def test_the_first_frame_of_a_clip_is_cropped_to_the_size_that_is_drawn(frames, tmp_path):
    Image.fromarray(frames[0]).save(tmp_path / "picture.png")
    of_picture(tmp_path / "picture.png", tmp_path / "first.png", 128, 128)
    with Image.open(tmp_path / "first.png") as picture:
        assert np.array_equal(np.asarray(picture), frames[0][:, 32:160])
    np.save(tmp_path / "clip.npy", frames)
    of_clip_end(tmp_path / "clip.npy", tmp_path / "first.png", 192, 128)
    with Image.open(tmp_path / "first.png") as picture:
        assert np.array_equal(np.asarray(picture), frames[-1])


def test_a_first_frame_that_cannot_be_kept_is_a_failed_storage(frames, tmp_path):
    np.save(tmp_path / "clip.npy", frames)
    with pytest.raises(StorageFailed):
        of_clip_end(tmp_path / "clip.npy", tmp_path / "absent" / "first.png", 192, 128)
    with pytest.raises(StorageFailed):
        of_picture(tmp_path / "absent.png", tmp_path / "first.png", 192, 128)


def sounding(frames, format, codec, rate, *, layout="stereo", begins_s=0.0, seconds=1.0):
    """A clip as another program writes it: at 16 frames a second, with a tone of 440 Hz from `begins_s` on."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        video = container.add_stream("libx264" if format != "webm" else "libvpx-vp9", rate=16)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        audio = container.add_stream(codec, rate=rate, layout=layout)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        t = np.arange(round(seconds * rate)) / rate
        wave = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
        samples = np.stack([wave] * (1 if layout == "mono" else 2))
        resampler = av.AudioResampler(format=audio.codec_context.format.name, layout=layout, rate=rate)
        size = 960
        for start in range(0, len(t), size):
            piece = np.ascontiguousarray(samples[:, start : start + size])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = start + round(begins_s * rate)
            for one in resampler.resample(frame):
                container.mux(audio.encode(one))
        container.mux(audio.encode(None))
    return file.getvalue()


def read_sound(data, tmp_path, seconds=17 / 16):
    with (tmp_path / "sound.npy").open("wb") as target:
        write_sound(io.BytesIO(data), "'video'", target, seconds=seconds)
    return np.load(tmp_path / "sound.npy", allow_pickle=False)


SOUNDS = [("mp4", "aac", 44100, "stereo"), ("mov", "pcm_s16le", 22050, "mono"), ("webm", "libopus", 48000, "stereo"),
          ("matroska", "flac", 48000, "stereo"), ("mp4", "libmp3lame", 44100, "mono")]  # fmt: skip


@pytest.mark.parametrize(("format", "codec", "rate", "layout"), SOUNDS)
def test_sound_of_any_usual_kind_is_heard_where_it_was(format, codec, rate, layout, frames, tmp_path):
    data = sounding(frames, format, codec, rate, layout=layout, begins_s=0.25, seconds=0.5)
    found = read_sound(data, tmp_path)
    assert (found.dtype, found.shape) == (np.float32, (17 * KEPT_RATE // 16, 2))
    assert np.abs(found[:, 0] - found[:, 1]).max() < 0.02
    loud = np.flatnonzero(np.abs(found[:, 0]) > 0.2)
    # Files tell where a track begins in milliseconds, and a codec's frames have soft ends.
    assert loud[0] / KEPT_RATE == pytest.approx(0.25, abs=0.01)
    assert loud[-1] / KEPT_RATE == pytest.approx(0.75, abs=0.01)
    middle = found[round(0.3 * KEPT_RATE) : round(0.7 * KEPT_RATE), 0]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert np.argmax(spectrum) * KEPT_RATE / len(middle) == pytest.approx(440, abs=3)
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.05)


def test_sound_ends_with_the_frames_and_is_followed_by_silence_where_it_ends_early(frames, tmp_path):
    data = sounding(frames, "mp4", "aac", 48000, seconds=0.5)
    assert len(read_sound(data, tmp_path, seconds=0.25)) == KEPT_RATE // 4
    longer = read_sound(data, tmp_path, seconds=2.0)
    assert len(longer) == 2 * KEPT_RATE
    assert np.abs(longer[round(0.6 * KEPT_RATE) :]).max() < 0.01


def test_the_sound_of_this_server_s_own_clips_comes_back_in_step(frames, tmp_path):
    t = np.arange(17 * 24000 // 16) / 24000
    wave = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    data = encode_mp4(frames, 192, 128, 16, 90, None, Sound(np.stack([wave, wave], axis=1), 24000))
    found = read_sound(data, tmp_path)[:, 0]
    told = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(found)) / KEPT_RATE)
    assert np.corrcoef(found[4800:-4800], told[4800:-4800])[0, 1] > 0.98


def test_a_clip_without_sound_has_no_samples(clip, tmp_path):
    assert read_sound(clip, tmp_path).shape == (0, 2)


def test_sound_of_an_unusual_kind_is_refused_by_its_name(frames, tmp_path):
    with pytest.raises(RequestError, match="its sound is mp2; AAC, MP3") as refusal:
        read_sound(sounding(frames, "matroska", "mp2", 48000), tmp_path)
    assert (refusal.value.param, refusal.value.code) == ("video", "unsupported_video")
