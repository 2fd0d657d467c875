"""Pictures, clips and frame blocks for the tests of media."""

import io
from pathlib import Path

import av
import numpy as np
from PIL import Image

from photogram.core.messages import FrameBlock


def photo(width, height, channels=3, noise=3.0, seed=0):
    """A smooth picture with a little noise, as a model makes them; shape (H, W, C)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), channels), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    return np.clip(smooth + rng.normal(0, noise, smooth.shape), 0, 255).astype(np.uint8)


def block(folder: Path, picture_HWC, name="job"):
    """The picture as a worker leaves it: raw bytes in a file of one frame."""
    path = folder / name
    path.write_bytes(picture_HWC.tobytes())
    return FrameBlock(path=str(path), shape=(1, *picture_HWC.shape))


def psnr(first, second):
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def moving(num_frames, width, height, noise=1.0):
    """A clip of soft colours that drift and a red disc that circles; shape (F, H, W, 3)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for number in range(num_frames):
        picture = np.stack(
            [
                127 + 100 * np.sin(x / 40 + number / 5) * np.cos(y / 30),
                127 + 90 * np.cos(x / 25 - number / 7),
                127 + 110 * np.sin((x + y) / 50 + number / 3),
            ],
            axis=-1,
        )
        middle = width / 2 + width / 4 * np.cos(number / 8), height / 2 + height / 4 * np.sin(number / 8)
        picture[(x - middle[0]) ** 2 + (y - middle[1]) ** 2 < (height / 6) ** 2] = (230, 30, 40)
        frames[number] = np.clip(picture + rng.normal(0, noise, picture.shape), 0, 255)
    return frames


def clip_block(folder: Path, frames_FHWC, name="job"):
    """The clip as a worker leaves it."""
    path = folder / name
    path.write_bytes(frames_FHWC.tobytes())
    return FrameBlock(path=str(path), shape=frames_FHWC.shape)


def decoded(data: bytes):
    """Every frame of an MP4 file as FFmpeg shows it by its own choice of colours; shape (F, H, W, 3)."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
