"""The second call of a guided step is foretold from the first, and never handed over where it was foretold wrongly."""

from typing import Any

import torch

from photogram.worker.fibers import Call
from photogram.worker.guidance import Foresight
from photogram.worker.modules import BigModule

MODULE = BigModule("transformer", torch.nn.Linear(1, 1))
PROMPT, NEGATIVE = torch.ones(1, 3, 2), torch.zeros(1, 5, 2)


def call(latents: torch.Tensor, time: float, text: torch.Tensor, **more: Any) -> Call:
    kwargs = {"timestep": torch.tensor([time]), "text": text, "shapes": [[(1, 4, 4)]], "mask": None} | more
    return Call(module=MODULE, method="forward", args=(latents,), kwargs=kwargs)


def after_one_step() -> Foresight:
    foresight = Foresight()
    latents = torch.randn(1, 4)
    for text in (PROMPT, NEGATIVE):
        foresight.note(call(latents, 1.0, text), 0)
    return foresight


def test_what_differed_a_step_ago_is_taken_from_there_and_the_rest_from_now():
    foresight, latents = after_one_step(), torch.randn(1, 4)
    foresight.note(call(latents, 0.5, PROMPT), 1)
    foretold = foresight.next_call()
    assert foretold.args[0] is latents
    assert foretold.kwargs["timestep"].item() == 0.5
    assert foretold.kwargs["text"] is NEGATIVE


def test_an_answer_is_given_to_an_equal_call_once():
    foresight, latents = after_one_step(), torch.randn(1, 4)
    foresight.note(call(latents, 0.5, PROMPT), 1)
    foresight.keep(foresight.next_call(), "answer")
    real = call(latents.clone(), 0.5, NEGATIVE.clone())
    foresight.note(real, 1)
    assert foresight.answer(real) == "answer"
    assert foresight.answer(real) is None


def test_an_answer_is_not_given_to_another_call_or_in_another_step():
    latents = torch.randn(1, 4)
    for real, position in (
        (call(latents, 0.25, NEGATIVE), 1),
        (call(latents + 1, 0.5, NEGATIVE), 1),
        (call(latents, 0.5, NEGATIVE[:, :4]), 1),
        (call(latents, 0.5, NEGATIVE, mask=torch.ones(1)), 1),
        (call(latents, 0.5, NEGATIVE, shapes=[[(1, 2, 8)]]), 1),
        (call(latents, 0.5, NEGATIVE), 2),
    ):
        foresight = after_one_step()
        foresight.note(call(latents, 0.5, PROMPT), 1)
        foresight.keep(foresight.next_call(), "answer")
        foresight.note(real, position)
        assert foresight.answer(real) is None


def test_nothing_is_foretold_in_the_first_step_or_where_a_step_has_one_call():
    foresight = Foresight()
    for position in range(3):
        foresight.note(call(torch.randn(1, 4), 1.0, PROMPT), position)
        assert foresight.next_call() is None


def test_nothing_is_foretold_after_the_second_call():
    foresight, latents = after_one_step(), torch.randn(1, 4)
    foresight.note(call(latents, 0.5, PROMPT), 1)
    foresight.note(call(latents, 0.5, NEGATIVE), 1)
    assert foresight.next_call() is None
