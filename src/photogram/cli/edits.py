"""Input pictures of `photogram generate --image`: read, checked, and laid out for the worker."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import msgspec
from PIL import Image, ImageOps

from ..core.card import ModelCard
from ..core.errors import RequestError
from ..core.request import Task
from ..server.resolve import Drawing, ImagesCall
from ..server.sizes import Size

EDIT_TASKS: tuple[Task, ...] = ("TI2I", "I2I")


def edit_task(card: ModelCard, num_images: int) -> Task:
    """Return the card's task that changes pictures. Raises RequestError where it has none, or takes fewer pictures."""
    task = next((task for task in EDIT_TASKS if task in card.tasks), None)
    if task is None or card.max_input_images == 0:
        raise RequestError(f"--image: model '{card.name}' takes no input pictures.", param="image")
    if num_images > card.max_input_images:
        raise RequestError(
            f"--image given {num_images} times: model '{card.name}' takes at most {card.max_input_images}.",
            param="image",
        )
    return task


def read_pictures(names: Sequence[str], folder: Path, max_pixels: int) -> tuple[tuple[Path, ...], Size]:
    """Copy the pictures as upright RGB PNGs into `folder`; return their paths and the first one's size.

    Raises RequestError for a file that is no PNG, JPEG or WebP picture, or has more than `max_pixels`.
    """
    pictures = [_read(name, max_pixels) for name in names]
    paths: list[Path] = []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"input-{number}.png")
        picture.save(paths[-1], "PNG", compress_level=1)
    return tuple(paths), Size(*pictures[0].size)


def _read(name: str, max_pixels: int) -> Image.Image:
    try:
        # The pixel count is checked right below, before anything is decoded.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            with Image.open(name, formats=("PNG", "JPEG", "WEBP")) as picture:
                if picture.width * picture.height > max_pixels:
                    size = f"{picture.width}x{picture.height}"
                    raise RequestError(
                        f"--image '{name}' is {size}: over {max_pixels} pixels (--max-pixels).", param="image"
                    )
                return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no PNG, JPEG or WebP picture"
        raise RequestError(f"--image '{name}': {reason}.", param="image") from None


def like(first: Size, card: ModelCard) -> str:
    """Return the size to draw when none is asked for: the first picture's aspect at the model's usual pixel count."""
    scale = math.sqrt(card.default_width * card.default_height / (first.width * first.height))
    sides = (
        max(card.min_side, round(side * scale / card.size_multiple) * card.size_multiple)
        for side in (first.width, first.height)
    )
    return str(Size(*sides))


def with_pictures(call: ImagesCall, task: Task, paths: Sequence[Path]) -> tuple[Drawing, ...]:
    """Return the call's drawings, made from these pictures."""
    images = tuple(str(path) for path in paths)
    return tuple(
        Drawing(request=msgspec.structs.replace(drawing.request, task=task, images=images), output=drawing.output)
        for drawing in call.drawings
    )
