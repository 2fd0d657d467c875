"""What the quality words mean: the one table from a preset to a number."""

from __future__ import annotations

import re
from typing import Literal

from ..core.errors import RequestError

PRESETS: dict[str, int] = {"maximum": 100, "high": 90, "medium": 55, "low": 35}
DEFAULTS: dict[Literal["image", "video"], int] = {"image": 75, "video": 50}


def resolve_quality(
    output_quality: object, output_compression: object, media: Literal["image", "video"] = "image"
) -> int:
    """Return 0 (smallest file) to 100 (best picture) for a request's two values, as they came from JSON or a form.

    `output_compression` wins where both are given; None is not given. Raises RequestError naming the parameter for
    an unknown word (even where compression wins), for anything but a whole number, and outside 0..100.
    """
    preset = DEFAULTS[media]
    if output_quality is not None and output_quality != "default":
        if not isinstance(output_quality, str) or output_quality not in PRESETS:
            words = ", ".join([*PRESETS, "default"])
            raise RequestError(
                f"output_quality {_shown(output_quality)}: must be one of {words}.", param="output_quality"
            )
        preset = PRESETS[output_quality]
    return preset if output_compression is None else _compression(output_compression)


def _compression(value: object) -> int:
    number: int | None = None
    # True is an int to Python, but no number to a client.
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,9}", value):
        number = int(value)
    if number is None or not 0 <= number <= 100:
        raise RequestError(
            f"output_compression {_shown(value)}: must be a whole number from 0 (smallest file) to 100 (best picture).",
            param="output_compression",
        )
    return number


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
