"""Pictures that clients send: believed only after their header was read, upright and RGB afterwards.

The type is told by the bytes, never by a name or a content type; the size is checked before anything is decoded.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..core.errors import RequestError
from .fit import Picture

FORMATS = ("PNG", "JPEG", "WEBP")
MIN_SIDE = 8


def read_picture(source: IO[bytes] | Path, what: str, *, max_pixels: int, param: str = "image") -> Image.Image:
    """Return a PNG, JPEG or WebP picture upright, as RGB in sRGB; transparent parts are white.

    `what` names it in errors. Raises RequestError for anything else, for a picture of more than `max_pixels` and for an
    animated one.
    """
    picture = _in_eight_bits(_decoded(source, what, max_pixels, param))
    profile = picture.info.get("icc_profile")
    if "A" in picture.getbands() or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        coloured = _in_srgb(layered.convert("RGB"), profile)
        ground = Image.new("RGB", picture.size, "white")
        return Image.composite(coloured, ground, layered.getchannel("A"))
    if picture.mode not in ("RGB", "CMYK", "L"):
        picture = picture.convert("RGB")
    return _in_srgb(picture, profile).convert("RGB")


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

    Original and mask are brought to the picture's size as the worker brings them: in their own aspect, so that they
    just cover it, and cropped evenly.
    """
    height, width, _ = picture_HWC.shape
    with Image.open(original) as base, Image.open(mask) as edited:
        kept = ImageOps.fit(base.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        where = ImageOps.fit(edited.convert("L"), (width, height), Image.Resampling.BILINEAR)
    return np.asarray(Image.composite(Image.fromarray(picture_HWC).convert("RGB"), kept, where))


def _decoded(source: IO[bytes] | Path, what: str, max_pixels: int, param: str) -> Image.Image:
    def refused(reason: str, code: str = "invalid_image") -> RequestError:
        return RequestError(f"{what}: {reason}.", param=param, code=code)

    try:
        # The pixel count is checked right below, before anything is decoded.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            with Image.open(source, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    reason = f"{width}x{height} is over {max_pixels} pixels (--max-pixels)"
                    raise refused(reason, "image_too_large")
                if min(width, height) < MIN_SIDE:
                    reason = f"{width}x{height} is too small; a side must have at least {MIN_SIDE} pixels"
                    raise refused(reason, "image_too_small")
                # A JPEG may hold further pictures (gain maps, depth) beside the one that everybody shows.
                if isinstance(picture, PngImageFile | WebPImageFile) and picture.n_frames > 1:
                    raise refused(f"has {picture.n_frames} frames; a still picture is needed")
                return ImageOps.exif_transpose(picture)
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise refused(f"over {max_pixels} pixels (--max-pixels)", "image_too_large") from None
    except MemoryError:
        raise refused("takes more memory to decode than a picture of --max-pixels should") from None
    except (OSError, ValueError, SyntaxError, struct.error, EOFError) as error:
        raise refused(getattr(error, "strerror", None) or "no PNG, JPEG or WebP picture that can be read") from None


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """Return pictures of 16 bits a sample with the upper eight; Pillow would cut off all that is above 255."""
    if picture.mode.startswith("I"):
        samples_HW = np.asarray(picture, dtype=np.int32) >> 8
        return Image.fromarray(samples_HW.clip(0, 255).astype(np.uint8))
    return picture


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the picture's colours as sRGB has them. A profile that cannot be used is left aside, as browsers do."""
    if not profile:
        return picture
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # Most profiles say sRGB in their own words, and converting between the two would only add noise.
        if picture.mode == "RGB" and "srgb" in ImageCms.getProfileDescription(found).lower():
            return picture
        converted = ImageCms.profileToProfile(picture, found, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return picture
    assert converted is not None
    return converted
