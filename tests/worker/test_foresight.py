"""The second call of a guided step is foretold from the first, and never handed over where it was foretold wrongly."""

from typing import Any

import torch
from msgspec.structs import replace

from photogram.core.request import GenerateRequest
from photogram.worker.fibers import Call
from photogram.worker.guidance import Foresight, Habits, kind_of
from photogram.worker.modules import BigModule

MODULE = BigModule("transformer", torch.nn.Linear(1, 1))
PROMPT, NEGATIVE = torch.ones(1, 3, 2), torch.zeros(1, 5, 2)


def call(latents: torch.Tensor, time: float, text: torch.Tensor, **more: Any) -> Call:
    kwargs = {"timestep": torch.tensor([time]), "text": text, "shapes": [[(1, 4, 4)]], "mask": None} | more
    return Call(module=MODULE, method="forward", args=(latents,), kwargs=kwargs)


def after_one_step(habits: Habits | None = None, kind: str = "kind") -> Foresight:
    foresight = Foresight(Habits() if habits is None else habits, kind)
    latents = torch.randn(1, 4)
    for text in (PROMPT, NEGATIVE):
        foresight.note(call(latents, 1.0, text), 0)
    return foresight


def after_a_job(kind: str = "kind") -> Habits:
    """The habits once a guided job of a kind has come to its second step."""
    habits = Habits()
    foresight = after_one_step(habits, kind)
    foresight.note(call(torch.randn(1, 4), 0.5, PROMPT), 1)
    assert foresight.next_call() is not None
    return habits


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


def test_a_jobs_first_step_is_foretold_from_the_last_job_of_its_kind():
    foresight, latents = Foresight(after_a_job(), "kind"), torch.randn(1, 4)
    foresight.note(call(latents, 1.0, PROMPT * 3), 0)
    foretold = foresight.next_call()
    assert foretold.args[0] is latents
    assert foretold.kwargs["text"] is NEGATIVE
    foresight.keep(foretold, "answer")
    real = call(latents, 1.0, NEGATIVE.clone())
    foresight.note(real, 0)
    assert foresight.answer(real) == "answer"


def test_no_job_is_foretold_from_one_of_another_kind_or_by_another_network():
    other = Call(module=BigModule("second", torch.nn.Linear(1, 1)), method="forward", args=(), kwargs={})
    for kind, first in (("other", call(torch.randn(1, 4), 1.0, PROMPT)), ("kind", other)):
        foresight = Foresight(after_a_job(), kind)
        foresight.note(first, 0)
        assert foresight.next_call() is None


def test_a_kind_whose_second_calls_come_otherwise_or_not_at_all_is_not_foretold_again():
    latents = torch.randn(1, 4)
    for real, position in ((call(latents, 1.0, NEGATIVE + 1), 0), (call(latents, 0.5, PROMPT), 1)):
        habits = after_a_job()
        foresight = Foresight(habits, "kind")
        foresight.note(call(latents, 1.0, PROMPT), 0)
        foresight.keep(foresight.next_call(), "answer")
        foresight.note(real, position)
        assert foresight.answer(real) is None
        after_one_step(habits).next_call()  # what another job does teaches nothing any more
        later = Foresight(habits, "kind")
        later.note(call(latents, 1.0, PROMPT), 0)
        assert later.next_call() is None


def test_only_what_is_a_second_calls_own_is_kept_and_of_a_few_kinds():
    habits = after_a_job("kind 0")
    habit = habits.of("kind 0", call(torch.randn(1, 4), 1.0, PROMPT))
    assert habit.second.args == (None,)
    assert {name for name, value in habit.second.kwargs.items() if isinstance(value, torch.Tensor)} == {"text"}
    for number in range(1, 20):
        habits.learn(f"kind {number}", habit.differs, call(torch.randn(1, 4), 1.0, NEGATIVE))
    assert habits.of("kind 0", habit.second) is None
    assert habits.of("kind 19", habit.second) is not None


def test_jobs_are_of_one_kind_whatever_their_prompt_seed_and_size():
    one = GenerateRequest(
        job_id="a", owner="o", task="T2I", prompt="a", negative_prompt="pale", width=64, height=64,
        num_inference_steps=4, guidance_scale=3.0, seed=1, extra={"a": 1, "b": 2},
    )  # fmt: skip
    other = replace(one, job_id="b", prompt="b", seed=2, width=32, num_inference_steps=9, extra={"b": 2, "a": 1})
    assert kind_of(one) == kind_of(other)
    for change in ({"negative_prompt": "dark"}, {"guidance_scale": 1.0}, {"extra": {"a": 2}}, {"images": ("x.png",)}):
        assert kind_of(replace(one, **change)) != kind_of(one)


def test_nothing_is_foretold_where_a_step_has_one_call():
    foresight = Foresight(Habits(), "kind")
    for position in range(3):
        foresight.note(call(torch.randn(1, 4), 1.0, PROMPT), position)
        assert foresight.next_call() is None


def test_nothing_is_foretold_after_the_second_call():
    foresight, latents = after_one_step(), torch.randn(1, 4)
    foresight.note(call(latents, 0.5, PROMPT), 1)
    foresight.note(call(latents, 0.5, NEGATIVE), 1)
    assert foresight.next_call() is None
