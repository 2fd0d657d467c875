"""Pictures and frame blocks for the tests of media."""

from pathlib import Path

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
