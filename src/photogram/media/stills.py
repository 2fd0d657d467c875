"""Pictures of a finished clip: one that stands for it, and a sheet of many."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .clips import evenly_spaced
from .fit import Picture

THUMBNAIL_SIDE = 512
SHEET_COLUMNS, SHEET_TILES, SHEET_SIDE = 5, 25, 320
_QUALITY = 85


@dataclass(frozen=True, slots=True)
class Still:
    """`make` takes the clip's file and gives the picture's; `suffix` has no dot."""

    content_type: str
    suffix: str
    make: Callable[[bytes], bytes]


def thumbnail(clip: bytes) -> bytes:
    """Return the frame in the middle of a clip as a WebP picture, its longer side at most 512 pixels."""
    (middle,) = evenly_spaced(clip, 1)
    return _saved(_within(middle, THUMBNAIL_SIDE), "WEBP")


def spritesheet(clip: bytes) -> bytes:
    """Return up to 25 frames of a clip, row by row, as one JPEG picture of tiles of at most 320 pixels a side."""
    tiles = [_within(picture_HWC, SHEET_SIDE) for picture_HWC in evenly_spaced(clip, SHEET_TILES)]
    columns = min(SHEET_COLUMNS, len(tiles))
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height))
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width, number // columns * height))
    return _saved(sheet, "JPEG")


STILLS = {
    "thumbnail": Still("image/webp", "webp", thumbnail),
    "spritesheet": Still("image/jpeg", "jpg", spritesheet),
}
"""What `variant` may ask for beside the clip itself."""


def _within(picture_HWC: Picture, side: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(picture_HWC))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _saved(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format, quality=_QUALITY)
    return file.getvalue()
