import asyncio
import io
import threading

import av
import numpy as np
import pytest
from PIL import Image

import photogram.media.pool as pool_module
from photogram.core.errors import EngineLost, GenerationFailed
from photogram.core.messages import FrameBlock, SoundBlock
from photogram.core.request import OutputSpec
from photogram.media.pool import MediaPool

from .pictures import block, clip_block, decoded, moving, photo, psnr


def test_a_picture_is_fitted_encoded_and_told_with_its_size(tmp_path):
    picture = photo(64, 64)
    pool = MediaPool(tmp_path)
    output = OutputSpec(width=64, height=60, format="png", compression=75)
    made = asyncio.run(pool.encode_picture(block(tmp_path, picture), output, None))
    pool.close()
    assert (made.content_type, made.width, made.height) == ("image/png", 64, 60)
    with Image.open(io.BytesIO(made.data)) as image:
        assert np.array_equal(np.asarray(image), picture[2:62])
    assert list(tmp_path.iterdir()) == []


def test_64_encodes_at_once_are_each_their_own_picture(tmp_path):
    pictures = [photo(96, 64, seed=seed) for seed in range(64)]
    formats = ["png", "jpeg", "webp"]

    async def encode_all():
        pool = MediaPool(tmp_path, num_threads=4)
        made = await asyncio.gather(
            *(
                pool.encode_picture(
                    block(tmp_path, picture, f"job{index}"),
                    OutputSpec(width=96, height=64, format=formats[index % 3], compression=95),
                    None,
                )
                for index, picture in enumerate(pictures)
            )
        )
        pool.close()
        return made

    for picture, made in zip(pictures, asyncio.run(encode_all()), strict=True):
        with Image.open(io.BytesIO(made.data)) as image:
            error = np.abs(np.asarray(image.convert("RGB")).astype(int) - picture).mean()
        assert error < 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("shape", "format"), [((2, 16, 16, 3), "png"), ((1, 16, 16, 3), "mp4")])
def test_what_is_not_one_picture_is_a_failed_generation_and_leaves_no_frames(tmp_path, shape, format):
    (tmp_path / "job").write_bytes(bytes(int(np.prod(shape))))
    pool = MediaPool(tmp_path)
    output = OutputSpec(width=16, height=16, format=format, compression=75)
    with pytest.raises(GenerationFailed, match="one frame"):
        asyncio.run(pool.encode_picture(FrameBlock(path=str(tmp_path / "job"), shape=shape), output, None))
    pool.close()
    assert list(tmp_path.iterdir()) == []


def test_cancelled_encodes_leave_no_frames(tmp_path, monkeypatch):
    gate = threading.Event()
    encode = pool_module._encode_picture

    def wait_and_encode(*arguments):
        gate.wait(30)
        return encode(*arguments)

    monkeypatch.setattr(pool_module, "_encode_picture", wait_and_encode)

    async def cancel_all():
        pool = MediaPool(tmp_path, num_threads=1)
        output = OutputSpec(width=32, height=32, format="png", compression=75)
        tasks = [
            asyncio.create_task(pool.encode_picture(block(tmp_path, photo(32, 32), f"job{index}"), output, None))
            for index in range(5)
        ]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        gate.set()
        pool.close()
        assert all(task.cancelled() for task in tasks)

    asyncio.run(cancel_all())
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pool_refuses_and_leaves_no_frames(tmp_path):
    pool = MediaPool(tmp_path)
    pool.close()
    output = OutputSpec(width=16, height=16, format="png", compression=75)
    with pytest.raises(EngineLost):
        asyncio.run(pool.encode_picture(block(tmp_path, photo(16, 16)), output, None))
    assert list(tmp_path.iterdir()) == []


def test_the_event_loop_runs_on_while_pictures_are_encoded(tmp_path, monkeypatch):
    gate = threading.Event()
    encode = pool_module._encode_picture

    def wait_and_encode(*arguments):
        assert gate.wait(30)
        return encode(*arguments)

    monkeypatch.setattr(pool_module, "_encode_picture", wait_and_encode)

    async def encode_while_the_loop_turns():
        pool = MediaPool(tmp_path, num_threads=1)
        output = OutputSpec(width=16, height=16, format="jpeg", compression=75)
        task = asyncio.create_task(pool.encode_picture(block(tmp_path, photo(16, 16)), output, None))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        gate.set()  # only a loop that is not blocked gets here
        made = await task
        pool.close()
        return made

    assert asyncio.run(encode_while_the_loop_turns()).content_type == "image/jpeg"


CLIP = OutputSpec(width=96, height=60, format="mp4", compression=90, fps=16)


def encoded_clip(folder, frames, output=CLIP):
    async def encode():
        pool = MediaPool(folder / "frames")
        try:
            return await pool.encode_clip(clip_block(folder / "frames", frames), output, None)
        finally:
            pool.close()

    (folder / "frames").mkdir()
    return asyncio.run(encode())


def test_a_clip_is_fitted_encoded_and_told_with_its_size_and_length(tmp_path):
    frames = moving(5, 96, 64)
    made = encoded_clip(tmp_path, frames)
    assert (made.content_type, made.width, made.height, made.num_frames, made.fps) == ("video/mp4", 96, 60, 5, 16)
    assert psnr(decoded(made.data), frames[:, 2:62]) > 25
    assert list((tmp_path / "frames").iterdir()) == []


def test_a_drawn_clip_is_enlarged_to_the_size_asked_for(tmp_path):
    output = OutputSpec(width=192, height=128, format="mp4", compression=90, fps=16)
    assert decoded(encoded_clip(tmp_path, moving(5, 96, 64), output).data).shape == (5, 128, 192, 3)


def test_a_clip_that_continues_another_follows_it_without_the_frame_they_share(tmp_path):
    frames = moving(9, 96, 60)
    np.save(tmp_path / "earlier.npy", frames[:5])
    output = OutputSpec(
        width=96, height=60, format="mp4", compression=90, fps=16, continues=str(tmp_path / "earlier.npy")
    )
    made = encoded_clip(tmp_path, frames[4:], output)
    assert made.num_frames == 9
    assert psnr(decoded(made.data), frames) > 25


def sound_block(folder, rate=16000, seconds=1.0, channels=1, name="sound"):
    t = np.arange(int(rate * seconds)) / rate
    samples = np.stack([np.sin(2 * np.pi * 440 * t)] * channels, axis=1).astype(np.float32) * 0.5
    (folder / name).write_bytes(samples.tobytes())
    return SoundBlock(path=str(folder / name), shape=samples.shape, rate=rate)


def test_the_sound_of_a_clip_begins_where_its_frames_do(tmp_path):
    np.save(tmp_path / "earlier.npy", moving(17, 96, 60))
    frames_dir = tmp_path / "frames"
    frames_dir.mkdir()
    output = OutputSpec(
        width=96, height=60, format="mp4", compression=50, fps=16, continues=str(tmp_path / "earlier.npy")
    )

    async def encode():
        pool = MediaPool(frames_dir)
        try:
            return await pool.encode_clip(
                clip_block(frames_dir, moving(17, 96, 60)), output, None, sound_block(frames_dir, seconds=2)
            )
        finally:
            pool.close()

    with av.open(io.BytesIO(asyncio.run(encode()).data)) as container:
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)[0]
    loud = np.flatnonzero(np.abs(heard) > 0.2)
    assert loud[0] / 16000 == pytest.approx(1.0, abs=0.1)
    assert list(frames_dir.iterdir()) == []


@pytest.mark.parametrize("draws_sound", [True, False])
def test_the_earlier_sound_of_a_clip_that_goes_on_is_kept(draws_sound, tmp_path):
    np.save(tmp_path / "earlier.npy", moving(17, 96, 60))
    t = np.arange(17 * 48000 // 16) / 48000
    wave = (0.5 * np.sin(2 * np.pi * 880 * t)).astype(np.float32)
    np.save(tmp_path / "sound.npy", np.stack([wave, wave], axis=1))
    frames_dir = tmp_path / "frames"
    frames_dir.mkdir()
    output = OutputSpec(
        width=96,
        height=60,
        format="mp4",
        compression=50,
        fps=16,
        continues=str(tmp_path / "earlier.npy"),
        continues_sound=str(tmp_path / "sound.npy"),
    )

    async def encode():
        pool = MediaPool(frames_dir)
        try:
            drawn = sound_block(frames_dir, seconds=1) if draws_sound else None
            return await pool.encode_clip(clip_block(frames_dir, moving(17, 96, 60)), output, None, drawn)
        finally:
            pool.close()

    data = asyncio.run(encode()).data
    with av.open(io.BytesIO(data)) as container:
        audio = container.streams.audio[0]
        assert (audio.rate, audio.channels) == (48000, 2)
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio)], axis=1)[0]
    assert len(decoded(data)) == 33
    assert len(heard) / 48000 == pytest.approx(33 / 16, abs=0.05)

    def pitch(begins_s, ends_s):
        part = heard[round(begins_s * 48000) : round(ends_s * 48000)]
        return np.argmax(np.abs(np.fft.rfft(part * np.hanning(len(part))))) * 48000 / len(part)

    assert pitch(0.1, 0.9) == pytest.approx(880, abs=4)
    if draws_sound:
        assert pitch(1.1, 1.9) == pytest.approx(440, abs=4)
    else:
        assert np.abs(heard[round(1.2 * 48000) :]).max() < 0.01
    assert list(frames_dir.iterdir()) == []


@pytest.mark.parametrize(("changes", "said"), [({"channels": 3}, "1 or 2 channels"), ({"rate": 12345}, "encoded")])
def test_a_sound_that_no_clip_can_have_is_a_failed_generation_and_leaves_nothing(tmp_path, changes, said):
    async def encode():
        pool = MediaPool(tmp_path)
        try:
            await pool.encode_clip(
                clip_block(tmp_path, moving(3, 96, 60)), CLIP, None, sound_block(tmp_path, **changes)
            )
        finally:
            pool.close()

    with pytest.raises(GenerationFailed, match=said):
        asyncio.run(encode())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "format", "fps"),
    [((2, 16, 16, 4), "mp4", 16), ((2, 16, 16, 3), "png", 16), ((2, 16, 16, 3), "mp4", None)],
)
def test_what_is_no_clip_is_a_failed_generation_and_leaves_no_frames(tmp_path, shape, format, fps):
    output = OutputSpec(width=16, height=16, format=format, compression=75, fps=fps)
    with pytest.raises(GenerationFailed, match="RGB frames"):
        encoded_clip(tmp_path, np.zeros(shape, np.uint8), output)
    assert list((tmp_path / "frames").iterdir()) == []


def test_a_still_of_a_clip_is_made_off_the_loop(tmp_path):
    made = encoded_clip(tmp_path, moving(5, 96, 60))

    async def still():
        pool = MediaPool(tmp_path)
        try:
            return await pool.still(made.data, "thumbnail")
        finally:
            pool.close()

    with Image.open(io.BytesIO(asyncio.run(still()))) as picture:
        assert (picture.format, picture.size) == ("WEBP", (96, 60))
