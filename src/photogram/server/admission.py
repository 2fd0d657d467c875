"""Refuses what certainly does not fit the device's memory before any work is done for it.

Holds a drawn size and length against the card's `room`; knows how to name the largest that would fit.
"""

from __future__ import annotations

from ..core.card import ModelCard
from ..core.errors import RequestError
from .sizes import Size


def check_memory(card: ModelCard, size: Size, frames: int | None = None) -> None:
    """Raise RequestError for a picture or clip that cannot fit, naming the most that can.

    `size` is what is drawn, `frames` a clip's drawn length. A card without `room` admits all.
    """
    if card.room is None or card.room.fits(size.width, size.height, frames):
        return
    fewer = _most_frames(card, size, frames)
    if fewer is not None:
        raise RequestError(
            f"num_frames: {frames} frames of {size} do not fit the memory of {card.device}; at most {fewer} do.",
            param="num_frames",
            code="exceeds_memory",
        )
    largest = _largest_size(card, size, frames)
    clip = "" if frames is None else f" with {frames} frames"
    hint = f"; the largest of this shape that does is {largest}" if largest is not None else ""
    raise RequestError(
        f"size '{size}'{clip} does not fit the memory of {card.device}{hint}.", param="size", code="exceeds_memory"
    )


def _most_frames(card: ModelCard, size: Size, frames: int | None) -> int | None:
    """Return the longest clip of this size that fits; None where not even two latent frames do."""
    assert card.room is not None
    step = card.frame_multiple
    for drawn in range((frames or 1) - step, step, -step):
        if card.room.fits(size.width, size.height, drawn):
            return drawn
    return None


def _largest_size(card: ModelCard, size: Size, frames: int | None) -> Size | None:
    """Return the largest drawn size of about this shape that fits; None where none does."""
    assert card.room is not None
    multiple = card.size_multiple
    for columns in range(size.width // multiple - 1, 0, -1):
        width = columns * multiple
        height = max(multiple, round(size.height * width / size.width / multiple) * multiple)
        if min(width, height) < card.min_side:
            return None
        if card.room.fits(width, height, frames):
            return Size(width, height)
    return None
