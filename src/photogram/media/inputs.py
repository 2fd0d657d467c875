"""Pictures that clients send: believed only after their header was read, upright and RGB afterwards.

The type is told by the bytes, never by a name or a content type; the size is checked before anything is decoded.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from ..core.errors import RequestError
from .fit import Picture

FORMATS = ("PNG", "JPEG", "WEBP")
MIN_SIDE = 8


def read_picture(source: IO[bytes] | Path, what: str, *, max_pixels: int, param: str = "image") -> Image.Image:
    """Return the first frame of a PNG, JPEG or WebP picture, upright, as RGB; transparent parts are white.

    `what` names it in errors. Raises RequestError for anything else, and for a picture of more than `max_pixels`.
    """
    picture = _decoded(source, what, max_pixels, param)
    if "A" in picture.getbands() or "transparency" in picture.info:
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    return picture.convert("RGB")


def read_mask(source: IO[bytes] | Path, size: tuple[int, int], *, max_pixels: int) -> Image.Image:
    """Return a mask as 8-bit grey, 255 where the picture is to be edited: where the alpha channel is 0.

    Raises RequestError for a picture without an alpha channel or of another size than the first input's.
    """
    picture = _decoded(source, "mask", max_pixels, "mask")
    if "A" not in picture.getbands():
        raise RequestError("mask: has no alpha channel; transparent pixels say what is to be edited.", param="mask")
    if picture.size != size:
        raise RequestError(
            f"mask: is {picture.width}x{picture.height}, the first image {size[0]}x{size[1]}; they must be equal.",
            param="mask",
        )
    return ImageOps.invert(picture.getchannel("A"))


def keep_outside(picture_HWC: Picture, original: Path, mask: Path) -> Picture:
    """Return the picture with the original's pixels wherever the mask (255: edited) does not say otherwise.

    Original and mask are brought to the picture's size.
    """
    height, width, _ = picture_HWC.shape
    with Image.open(original) as base, Image.open(mask) as edited:
        kept = base.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        where = edited.convert("L").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(Image.composite(Image.fromarray(picture_HWC).convert("RGB"), kept, where))


def _decoded(source: IO[bytes] | Path, what: str, max_pixels: int, param: str) -> Image.Image:
    try:
        # The pixel count is checked right below, before anything is decoded.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            with Image.open(source, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise RequestError(
                        f"{what} is {width}x{height}: over {max_pixels} pixels (--max-pixels).",
                        param=param,
                        code="image_too_large",
                    )
                if min(width, height) < MIN_SIDE:
                    raise RequestError(
                        f"{what} is {width}x{height}: a side must have at least {MIN_SIDE} pixels.",
                        param=param,
                        code="image_too_small",
                    )
                return ImageOps.exif_transpose(picture)
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise RequestError(
            f"{what}: over {max_pixels} pixels (--max-pixels).", param=param, code="image_too_large"
        ) from None
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no PNG, JPEG or WebP picture"
        raise RequestError(f"{what}: {reason}.", param=param, code="invalid_image") from None
