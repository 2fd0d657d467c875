"""What an edit's mask and strength become for the worker, by what the model's card says."""

from pathlib import Path

import pytest

from photogram.core.config import ServeConfig
from photogram.core.errors import RequestError
from photogram.server.inputs import Inputs
from photogram.server.resolve import Resolver
from photogram.server.sizes import Size

from .fake_engine import image_card

REDRAWS = image_card(tasks=("T2I", "I2I"), takes_mask=True, takes_strength=True, edit_strength=0.7)
EDITS = image_card(tasks=("TI2I", "T2I", "I2I"), takes_mask=True, takes_strength=True)
NEITHER = image_card(tasks=("TI2I", "T2I", "I2I"))


def resolved(card, mask: bool = False, **fields):
    inputs = Inputs(
        folder=Path("in"), paths=(Path("in/0.png"),), first=Size(64, 48), mask=Path("in/mask.png") if mask else None
    )
    call = Resolver(config=ServeConfig()).images({"prompt": "a cat"} | fields, card, "owner", inputs)
    return call.drawings[0].request, call.drawings[0].output, call.ignored


@pytest.mark.parametrize(("card", "strength"), [(REDRAWS, 0.7), (EDITS, None), (NEITHER, None)])
def test_edit_without_a_strength_goes_as_far_as_the_card_says(card, strength):
    request, _, ignored = resolved(card)
    assert (request.strength, request.mask, ignored) == (strength, None, ())


def test_strength_is_taken_where_the_model_has_one_and_named_where_not():
    assert resolved(EDITS, strength=0.4)[0].strength == 0.4
    assert resolved(REDRAWS, strength="0.4")[0].strength == 0.4
    request, _, ignored = resolved(NEITHER, strength=0.4)
    assert (request.strength, ignored) == (None, ("strength",))


@pytest.mark.parametrize("strength", [0, -1, 1.5, "much"])
def test_strength_out_of_bounds_is_refused(strength):
    with pytest.raises(RequestError) as refused:
        resolved(EDITS, strength=strength)
    assert refused.value.param == "strength"


def test_mask_goes_to_the_worker_where_the_model_takes_one_and_to_the_file_always():
    request, output, _ = resolved(REDRAWS, mask=True)
    assert (request.mask, request.strength) == ("in/mask.png", None)
    assert (output.mask, output.original) == ("in/mask.png", "in/0.png")
    request, output, _ = resolved(NEITHER, mask=True)
    assert (request.mask, output.mask) == (None, "in/mask.png")
