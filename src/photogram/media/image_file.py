"""One picture into the bytes of a PNG, JPEG or WebP file, and the table of the formats."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..core.errors import RequestError
from ..core.request import ImageFormat
from .fit import Picture
from .png import png
from .provenance import Provenance, exif_and_xmp, png_texts


@dataclass(frozen=True, slots=True)
class FileType:
    """`suffix` has no dot; `max_side` is the longest side in pixels that the format can hold."""

    content_type: str
    suffix: str
    max_side: int


FILE_TYPES: dict[str, FileType] = {
    "png": FileType("image/png", "png", 2**31 - 1),
    "jpeg": FileType("image/jpeg", "jpg", 65500),
    "webp": FileType("image/webp", "webp", 16383),
    "mp4": FileType("video/mp4", "mp4", 16384),
}

# From here up JPEG keeps colour at full resolution: coloured edges are then what limits the picture.
_FULL_COLOUR_QUALITY = 90


def check_side(format: str, width: int, height: int) -> None:
    """Raise RequestError naming ``size`` where the format cannot hold a picture of this size."""
    limit = FILE_TYPES[format].max_side
    if max(width, height) > limit:
        raise RequestError(
            f"size '{width}x{height}': a {format} file holds at most {limit} pixels a side.", param="size"
        )


def encode_image(
    picture_HWC: Picture, format: ImageFormat, compression: int, provenance: Provenance | None = None
) -> bytes:
    """Return the picture as a file; the same arguments give the same bytes.

    `compression` is 0 (smallest) to 100 (best) for JPEG and WebP; PNG is lossless and ignores it. An RGBA picture
    keeps its alpha in PNG and WebP and is laid over white for JPEG. With `provenance` None nothing at all is written
    beside the pixels. Raises RequestError for a picture larger than the format can hold.
    """
    height, width, channels = picture_HWC.shape
    check_side(format, width, height)
    if format == "png":
        return png(picture_HWC, () if provenance is None else png_texts(provenance))
    image = Image.fromarray(np.ascontiguousarray(picture_HWC))
    exif, xmp = (b"", b"") if provenance is None else exif_and_xmp(provenance, segments=format == "jpeg")
    file = io.BytesIO()
    if format == "webp":
        image.save(file, "WEBP", quality=compression, exif=exif, xmp=xmp)
        return file.getvalue()
    if channels == 4:
        image = _over_white(image)
    full_colour = compression >= _FULL_COLOUR_QUALITY
    image.save(
        file,
        "JPEG",
        quality=max(1, compression),  # libjpeg's scale begins at 1
        subsampling="4:4:4" if full_colour else "4:2:0",
        # Own code tables save a twentieth, but Pillow then needs the whole file in a buffer of one or two bytes a
        # pixel, which a noisy picture in full colour overruns.
        optimize=not full_colour,
        exif=exif,
        xmp=xmp,
    )
    return file.getvalue()


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white
