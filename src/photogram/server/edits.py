"""What a model makes of input pictures: which task, how many, how far from them, and at which size."""

from __future__ import annotations

import math

from ..core.card import ModelCard
from ..core.errors import RequestError
from ..core.request import Task
from .fields import Values
from .inputs import Inputs
from .sizes import Size

EDIT_TASKS: tuple[Task, ...] = ("TI2I", "I2I")

VARIATION_STRENGTH = 0.5
"""Of a variation that names none: what the picture shows stays, and how it is drawn does not. Without a prompt nothing
else tells the model what to draw: beyond 0.5, colours and shapes become others."""

HIGH_FIDELITY = 0.7
"""What `input_fidelity` high leaves of a default strength."""


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


def variation_strength(values: Values, card: ModelCard, ignored: list[str]) -> float | None:
    """Return the strength at which a picture is varied. Raises RequestError where the model cannot begin at one.

    As of an edit, what has no effect goes to `ignored`.
    """
    if not card.takes_strength:
        raise RequestError(
            f"Model '{card.name}' cannot begin at a picture, and so makes no variations.",
            param="image",
            code="unsupported_by_model",
        )
    return _strength(values.float("strength"), VARIATION_STRENGTH, values.text("input_fidelity"), ignored)


def edit_strength(values: Values, card: ModelCard, inputs: Inputs | None, ignored: list[str]) -> float | None:
    """Return how far an edit may go from the picture; None where the model edits in its own way.

    What says so and has no effect goes to `ignored`; without `inputs` that is all of it.
    """
    asked = values.float("strength")
    if asked is not None and (inputs is None or not card.takes_strength):
        ignored.append("strength")
        asked = None
    # What lies under a mask is drawn anew, from nothing.
    default = card.edit_strength if inputs is not None and inputs.mask is None else None
    return _strength(asked, default, values.text("input_fidelity"), ignored)


def _strength(asked: float | None, default: float | None, fidelity: str | None, ignored: list[str]) -> float | None:
    if asked is not None or default is None:
        if fidelity is not None:
            ignored.append("input_fidelity")
        return asked
    return round(default * HIGH_FIDELITY, 3) if fidelity == "high" else default


def like(first: Size, card: ModelCard) -> str:
    """Return the size to draw when none is asked for: the first picture's aspect at the model's usual pixel count."""
    scale = math.sqrt(card.default_width * card.default_height / (first.width * first.height))
    sides = (
        max(card.min_side, round(side * scale / card.size_multiple) * card.size_multiple)
        for side in (first.width, first.height)
    )
    return str(Size(*sides))
