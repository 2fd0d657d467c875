"""The pictures and clips that the host has checked and laid out, opened for a pipeline at the size that is drawn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..core.errors import RequestError
from ..core.request import GenerateRequest

# F frames, H/W height and width in pixels, C channels (RGB)

MIN_REFERENCE_SIDE = 64
"""Pixels; FLUX.2's pipelines look at nothing smaller."""


def open_picture(path: str) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def fitted(
    picture: Image.Image, width: int, height: int, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Return the picture at the drawn size; where the aspect differs, as much as possible of its middle."""
    if picture.size == (width, height):
        return picture
    scale = max(width / picture.width, height / picture.height)
    seen_width, seen_height = width / scale, height / scale
    left, top = (picture.width - seen_width) / 2, (picture.height - seen_height) / 2
    box = (left, top, left + seen_width, top + seen_height)
    return picture.resize((width, height), resampling, box=box)


def as_reference(picture: Image.Image, width: int, height: int, multiple: int) -> Image.Image:
    """Return a picture to look at, in its own aspect with as many pixels as are drawn, enlarged or reduced.

    A model with a native pixel count knows a thing by its size: a reference of four times the pixels that it draws
    shows it things twice as large as its own. Each side becomes the multiple of `multiple` that is nearest, and where
    one would be under MIN_REFERENCE_SIDE the whole picture is larger.
    """
    scale = math.sqrt(width * height / (picture.width * picture.height))
    scale = max(scale, MIN_REFERENCE_SIDE / min(picture.size))
    shortest = math.ceil(MIN_REFERENCE_SIDE / multiple) * multiple
    sides = (max(shortest, round(side * scale / multiple) * multiple) for side in picture.size)
    return fitted(picture, *sides)


def open_mask(path: str, width: int, height: int) -> Image.Image:
    """Return a mask as 8-bit grey of the drawn size, 255 where the picture is drawn anew."""
    with Image.open(path) as mask:
        # Without the ringing of sharper filters, which would reach beyond the mask.
        return fitted(mask.convert("L"), width, height, Image.Resampling.BILINEAR)


def open_clip(request: GenerateRequest) -> list[Image.Image]:
    """Return the clip's frames at the drawn size. Raises RequestError for one shorter than what is to be drawn."""
    assert request.video is not None
    frames_FHWC = np.load(Path(request.video), mmap_mode="r", allow_pickle=False)
    count = request.num_frames or len(frames_FHWC)
    if len(frames_FHWC) < count:
        raise RequestError(f"video: has {len(frames_FHWC)} frames, {count} are to be drawn.", param="video")
    return [fitted(Image.fromarray(frame), request.width, request.height) for frame in frames_FHWC[:count]]


def picture_pixels(path: str, width: int, height: int) -> torch.Tensor:
    """Return a picture as (1, 3, H, W) in -1..1."""
    return _pixels(fitted(open_picture(path), width, height)).permute(2, 0, 1)[None]


def clip_pixels(request: GenerateRequest) -> torch.Tensor:
    """Return the request's clip as (1, 3, F, H, W) in -1..1."""
    return torch.stack([_pixels(frame) for frame in open_clip(request)]).permute(3, 0, 1, 2)[None]


def mask_pixels(path: str, width: int, height: int) -> torch.Tensor:
    """Return a mask as (1, 1, H, W), 1 where the picture is drawn anew."""
    return torch.from_numpy(np.asarray(open_mask(path, width, height), dtype=np.float32) / 255)[None, None]


def _pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1)
