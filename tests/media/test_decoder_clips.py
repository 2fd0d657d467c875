"""Clips of strangers, decoded in processes that cannot harm the server."""

import asyncio
import tempfile

import numpy as np
import pytest

from photogram.core.errors import RequestError, StorageFailed
from photogram.media import decoder_pool
from photogram.media.clip_file import encode_mp4
from photogram.media.clips import ClipFacts
from photogram.media.decoder import ClipForm
from photogram.media.decoder_pool import DecoderPool
from photogram.media.sound import KEPT_RATE, Sound

from .pictures import moving, psnr

PIXELS = 512 * 512
FORM = ClipForm(width=96, height=64, num_frames=9, fps=8)


@pytest.fixture(scope="module")
def frames():
    return moving(17, 96, 64)


@pytest.fixture(scope="module")
def clip(frames):
    return encode_mp4(frames, 96, 64, 16, 90)


def with_pool(work):
    async def run():
        pool = DecoderPool(max_pixels=1_000_000)
        try:
            return await work(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def probe(data, max_pixels=PIXELS):
    async def work(pool):
        with tempfile.TemporaryFile() as source:
            source.write(data)
            return await pool.probe(source, "'video'", "video", max_pixels=max_pixels)

    return with_pool(work)


def write(data, target, form=FORM):
    async def work(pool):
        with tempfile.TemporaryFile() as source:
            source.write(data)
            await pool.clip(source, target, "'video'", "video", max_pixels=PIXELS, form=form)

    with_pool(work)
    return np.load(target, mmap_mode="r", allow_pickle=False)


def test_a_clip_is_probed_and_written_as_a_worker_reads_it(clip, frames, tmp_path):
    assert probe(clip) == ClipFacts(width=96, height=64, num_frames=17, fps=16.0)
    found = write(clip, tmp_path / "clip.npy")
    assert (found.dtype, found.shape) == (np.uint8, (9, 64, 96, 3))
    assert psnr(found, frames[::2]) > 30


def test_the_sound_of_a_clip_is_written_as_long_as_its_frames(frames, tmp_path):
    level = np.full((17 * 24000 // 16, 1), 0.25, np.float32) * np.sin(np.arange(25500) / 10, dtype=np.float32)[:, None]
    data = encode_mp4(frames, 96, 64, 16, 90, None, Sound(level, 24000))

    async def work(pool):
        with tempfile.TemporaryFile() as source:
            source.write(data)
            target = tmp_path / "sound.npy"
            await pool.sound(source, target, "'video'", "video", max_pixels=PIXELS, form=FORM)
            return np.load(target, allow_pickle=False)

    found = with_pool(work)
    assert (found.dtype, found.shape) == (np.float32, (9 * KEPT_RATE // 8, 2))
    heard = found[: KEPT_RATE // 2]
    assert np.sqrt(np.mean(heard**2)) == pytest.approx(0.25 / np.sqrt(2), rel=0.1)


@pytest.mark.parametrize("data", [b"", b"no clip", b"\0\0\0\x18ftypisom" + bytes(50)])
def test_what_is_no_clip_is_refused_with_its_field(data, tmp_path):
    with pytest.raises(RequestError) as refusal:
        probe(data)
    assert (refusal.value.param, refusal.value.code) == ("video", "invalid_video")
    with pytest.raises(RequestError):
        write(data, tmp_path / "clip.npy")
    assert list(tmp_path.iterdir()) == []


def test_too_many_pixels_are_refused(clip):
    with pytest.raises(RequestError) as refusal:
        probe(clip, max_pixels=1000)
    assert refusal.value.code == "video_too_large"


def test_a_clip_that_takes_too_long_is_refused_and_the_next_one_is_read(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_pool, "CLIP_CPU_S", 1)
    large = ClipForm(width=4096, height=4096, num_frames=30, fps=30)
    with pytest.raises(RequestError, match="could not be decoded within 1 s") as refusal:
        write(clip, tmp_path / "large.npy", large)
    assert refusal.value.code == "invalid_video"
    assert list(tmp_path.iterdir()) == []
    assert len(write(clip, tmp_path / "clip.npy")) == 9


def test_a_clip_that_cannot_be_kept_is_a_failed_storage(clip, tmp_path):
    with pytest.raises(StorageFailed):
        write(clip, tmp_path / "absent" / "clip.npy")


def test_a_file_in_memory_can_be_probed_once_it_has_a_descriptor(clip):
    async def work(pool):
        with tempfile.SpooledTemporaryFile(max_size=1 << 20) as source:
            source.write(clip)
            return await pool.probe(source, "'video'", "video", max_pixels=PIXELS)

    assert with_pool(work).num_frames == 17
