"""From the size a model draws to the size that was asked for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

Picture = npt.NDArray[np.uint8]
"""One picture, shape (H, W, C): C is 3 (RGB) or 4 (RGBA)."""


def fit(drawn_HWC: Picture, width: int, height: int) -> Picture:
    """Return the picture at exactly `width` x `height` pixels.

    Equal sizes come back as they are. A drawing that covers the size is cropped evenly, pixels untouched (an odd
    pixel goes from the right or the bottom). One that does not is enlarged in its own aspect (Lanczos) until it
    covers, and cropped evenly. A drawing is never shrunk.
    """
    drawn_height, drawn_width, _ = drawn_HWC.shape
    if (drawn_width, drawn_height) == (width, height):
        return drawn_HWC
    if drawn_width >= width and drawn_height >= height:
        left, top = (drawn_width - width) // 2, (drawn_height - height) // 2
        return drawn_HWC[top : top + height, left : left + width]
    scale = max(width / drawn_width, height / drawn_height)
    # Enlarging and cropping are one resampling of a box, so no size in between is rounded to whole pixels.
    box_width, box_height = min(width / scale, drawn_width), min(height / scale, drawn_height)
    left_edge, top_edge = (drawn_width - box_width) / 2, (drawn_height - box_height) / 2
    box = (left_edge, top_edge, left_edge + box_width, top_edge + box_height)
    enlarged = Image.fromarray(drawn_HWC).resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(enlarged)


def cover(picture_HWC: Picture, width: int, height: int) -> Picture:
    """Return a picture of somebody else's at exactly the size: enlarged or reduced until it just covers it (Lanczos),
    and cropped evenly."""
    if picture_HWC.shape[:2] == (height, width):
        return picture_HWC
    image = Image.fromarray(np.ascontiguousarray(picture_HWC))
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
