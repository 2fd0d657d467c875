"""What an edit's mask and strength become for the worker, by what the model's card says."""

from pathlib import Path

import pytest

from photogram.core.config import ServeConfig
from photogram.core.errors import RequestError
from photogram.server.edits import VARIATION_STRENGTH
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


def test_high_fidelity_keeps_more_of_the_picture_where_edits_go_by_strength():
    request, _, ignored = resolved(REDRAWS, input_fidelity="high")
    assert (request.strength, ignored) == (pytest.approx(0.49), ())
    request, _, ignored = resolved(REDRAWS, input_fidelity="LOW")
    assert (request.strength, ignored) == (0.7, ())


@pytest.mark.parametrize(
    ("card", "fields", "strength"),
    [
        (REDRAWS, {"strength": 0.9}, 0.9),  # the number wins
        (REDRAWS, {"mask": True}, None),  # what lies under a mask is drawn from nothing
        (EDITS, {}, None),
        (NEITHER, {}, None),
    ],
)
@pytest.mark.parametrize("fidelity", ["low", "high"])
def test_fidelity_without_effect_is_named_as_ignored(card, fields, strength, fidelity):
    request, _, ignored = resolved(card, input_fidelity=fidelity, **fields)
    assert (request.strength, ignored) == (strength, ("input_fidelity",))


@pytest.mark.parametrize("fidelity", ["medium", 1, True])
def test_fidelity_that_is_neither_low_nor_high_is_refused(fidelity):
    with pytest.raises(RequestError) as refused:
        resolved(REDRAWS, input_fidelity=fidelity)
    assert refused.value.param == "input_fidelity"


def test_variations_go_less_far_with_high_fidelity_and_as_far_as_a_strength_says():
    def varied(**fields):
        inputs = Inputs(folder=Path("in"), paths=(Path("in/0.png"),), first=Size(64, 48))
        call = Resolver(config=ServeConfig()).images(fields, EDITS, "owner", inputs, is_variation=True)
        return call.drawings[0].request.strength, call.ignored

    assert varied() == varied(input_fidelity="low") == (VARIATION_STRENGTH, ())
    assert varied(input_fidelity="high") == (pytest.approx(0.35), ())
    assert varied(input_fidelity="high", strength=0.8) == (0.8, ("input_fidelity",))


def test_mask_goes_to_the_worker_where_the_model_takes_one_and_to_the_file_always():
    request, output, _ = resolved(REDRAWS, mask=True)
    assert (request.mask, request.strength) == ("in/mask.png", None)
    assert (output.mask, output.original) == ("in/mask.png", "in/0.png")
    request, output, _ = resolved(NEITHER, mask=True)
    assert (request.mask, output.mask) == (None, "in/mask.png")
