"""What a model makes of input pictures: which task, how many, and at which size."""

from __future__ import annotations

import math

from ..core.card import ModelCard
from ..core.errors import RequestError
from ..core.request import Task
from .sizes import Size

EDIT_TASKS: tuple[Task, ...] = ("TI2I", "I2I")


VARIATION_STRENGTH = 0.7
"""Of a variation that names none: the picture's layout stays and its details do not."""


def edit_task(card: ModelCard, num_images: int) -> Task:
    """Return the card's task that changes pictures. Raises RequestError where it has none, or takes fewer pictures."""
    task = next((task for task in EDIT_TASKS if task in card.tasks), None)
    if task is None or card.max_input_images == 0:
        raise RequestError(f"Model '{card.name}' takes no input pictures.", param="image", code="unsupported_by_model")
    if num_images > card.max_input_images:
        raise RequestError(
            f"{num_images} images: model '{card.name}' takes at most {card.max_input_images}.", param="image"
        )
    return task


def variation_strength(asked: float | None, card: ModelCard) -> float:
    """Return the strength at which a picture is varied. Raises RequestError where the model cannot begin at one."""
    if not card.takes_strength:
        raise RequestError(
            f"Model '{card.name}' cannot begin at a picture, and so makes no variations.",
            param="image",
            code="unsupported_by_model",
        )
    return VARIATION_STRENGTH if asked is None else asked


def like(first: Size, card: ModelCard) -> str:
    """Return the size to draw when none is asked for: the first picture's aspect at the model's usual pixel count."""
    scale = math.sqrt(card.default_width * card.default_height / (first.width * first.height))
    sides = (
        max(card.min_side, round(side * scale / card.size_multiple) * card.size_multiple)
        for side in (first.width, first.height)
    )
    return str(Size(*sides))
