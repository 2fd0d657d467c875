"""The picture that a clip begins with, of the size that is drawn: so no pipeline stretches it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ..core.errors import StorageFailed
from .fit import Picture, cover


def of_picture(source: Path, target: Path, width: int, height: int) -> None:
    """Write a picture of the server's own, cropped to the size's aspect, as a PNG file that survives a power cut.

    Raises StorageFailed.
    """
    try:
        with Image.open(source) as picture:
            picture_HWC = np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise _failed(error) from error
    _write(picture_HWC, target, width, height)


def of_clip_end(clip: Path, target: Path, width: int, height: int) -> None:
    """Write the last frame of a clip in the form of `GenerateRequest.video`, as `of_picture` does."""
    try:
        frames_FHWC = np.load(clip, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise _failed(error) from error
    _write(frames_FHWC[-1], target, width, height)


def _write(picture_HWC: Picture, target: Path, width: int, height: int) -> None:
    try:
        with target.open("wb") as file:
            Image.fromarray(cover(picture_HWC, width, height)).save(file, "PNG", compress_level=1)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _failed(error) from error


def _failed(error: OSError) -> StorageFailed:
    return StorageFailed(f"The picture that the clip begins with could not be kept: {error.strerror or error}.")
