"""Sizes: what a request asks for, whether it is allowed, and what the model draws for it. All in pixels."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..core.card import ModelCard
from ..core.errors import RequestError
from .fields import shown

MAX_ASPECT = 8
"""The longer side over the shorter one, at most."""
_SPELLING = re.compile(r"\s*(\d{1,18})\s*[xX*×]\s*(\d{1,18})\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Size:
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def asked_size(size: str | None, width: int | None, height: int | None) -> Size | None:
    """Return the size that a request names, or None where it leaves it to the model.

    Raises RequestError for a spelling that is no size, and where `size` and `width`/`height` disagree.
    """
    named = _parse(size)
    if width is None and height is None:
        return named
    if named is not None:
        if (width or named.width, height or named.height) != (named.width, named.height):
            raise RequestError(
                f"size '{named}' disagrees with width {width} and height {height}; send one of them.", param="size"
            )
        return named
    if width is None or height is None:
        missing = "width" if width is None else "height"
        raise RequestError(f"'{missing}' is missing: width and height go together.", param=missing)
    return Size(width, height)


def _parse(text: str | None) -> Size | None:
    if text is None or text.strip().lower() in ("", "auto"):
        return None
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise RequestError(f"size {shown(text)} is not a size; write it as '1024x1024', or 'auto'.", param="size")
    return Size(int(match.group(1)), int(match.group(2)))


def check_size(size: Size, *, min_side: int, max_pixels: int, limit_flag: str) -> None:
    """Raise RequestError, naming the bound, for a size that this server or this model does not make."""
    if min(size.width, size.height) < min_side:
        raise RequestError(f"size '{size}': each side must be at least {min_side} pixels.", param="size")
    if size.width * size.height > max_pixels:
        raise RequestError(
            f"size '{size}' has {size.width * size.height} pixels; at most {max_pixels} are allowed ({limit_flag}).",
            param="size",
        )
    if max(size.width, size.height) > MAX_ASPECT * min(size.width, size.height):
        raise RequestError(f"size '{size}': the aspect must be within 1:{MAX_ASPECT} and {MAX_ASPECT}:1.", param="size")


def drawn_size(size: Size, card: ModelCard) -> Size:
    """Return the legal size to draw for a picture of `size`.

    That is the next larger multiple, to be cropped; or, beyond the model's native pixel count, the size nearest in
    aspect within that count, to be enlarged until it covers `size` and cropped.
    """
    multiple, native = card.size_multiple, card.max_native_pixels
    legal = Size(_up(size.width, multiple), _up(size.height, multiple))
    if native is None or legal.width * legal.height <= native:
        return legal
    scale = min(1.0, math.sqrt(native / (size.width * size.height)))
    shortest = _up(card.min_side, multiple)
    sides = [
        {max(shortest, math.floor(side * scale / multiple) * multiple), max(shortest, _up(side * scale, multiple))}
        for side in (size.width, size.height)
    ]
    candidates = {Size(width, height) for width in sides[0] for height in sides[1]}
    # A very long picture cannot keep its aspect within the count: its short side is at the least legal one.
    for width in sides[0]:
        candidates.add(Size(width, max(shortest, native // width // multiple * multiple)))
    for height in sides[1]:
        candidates.add(Size(max(shortest, native // height // multiple * multiple), height))
    within = [one for one in candidates if one.width * one.height <= native] or [Size(shortest, shortest)]
    aspect = math.log(size.width / size.height)
    return min(
        within, key=lambda one: (round(abs(math.log(one.width / one.height) - aspect), 3), -one.width * one.height)
    )


def _up(side: float, multiple: int) -> int:
    return math.ceil(side / multiple) * multiple
