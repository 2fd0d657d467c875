"""Forecasts of a denoiser's answers, against functions of which the truth is known."""

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from photogram.worker.fast.forecast import History
from photogram.worker.layout import NotStackable

# Unevenly spaced, as solvers' times are.
TIMES = (1000.0, 940.0, 860.0, 750.0, 610.0, 430.0)
FLAT = torch.tensor([3.0, -1.0, 0.5])
SLOPE = torch.tensor([0.25, 2.0, -1.0]) / 100
CURVE = torch.tensor([1.0, -3.0, 2.0]) / 1e5


def line(step: int) -> torch.Tensor:
    return FLAT + SLOPE * TIMES[step]


def parabola(step: int) -> torch.Tensor:
    return line(step) + CURVE * TIMES[step] ** 2


def history(num_points: int, answers: dict[int, torch.Tensor]) -> History:
    made = History(num_points)
    for step, answer in answers.items():
        made.note(step, answer, TIMES)
    return made


def test_what_runs_straight_is_forecast_exactly_over_uneven_times():
    foretold = history(2, {0: line(0), 2: line(2)}).forecast(4, TIMES)
    torch.testing.assert_close(foretold, line(4), rtol=1e-5, atol=1e-5)


def test_what_runs_in_a_parabola_needs_three_points():
    three = history(3, {step: parabola(step) for step in (0, 1, 3)}).forecast(4, TIMES)
    two = history(2, {step: parabola(step) for step in (1, 3)}).forecast(4, TIMES)
    torch.testing.assert_close(three, parabola(4), rtol=1e-4, atol=1e-4)
    assert (two - parabola(4)).abs().max() > 0.1


def test_nothing_is_measured_until_an_answer_could_have_been_forecast():
    made = history(2, {0: line(0), 1: line(1)})
    assert not made.is_measured
    made.note(2, line(2), TIMES)
    assert made.is_measured


def test_expected_error_grows_with_the_distance_as_the_true_one_does():
    made = history(2, {step: parabola(step) for step in (0, 1, 2)})
    size = parabola(2).square().mean().sqrt()  # what the measured error is relative to
    for step in (3, 4, 5):
        true = (made.forecast(step, TIMES) - parabola(step)).square().mean().sqrt() / size
        torch.testing.assert_close(made.expected_error(step, TIMES), true, rtol=1e-3, atol=1e-6)


def test_forecast_has_the_form_and_precision_of_the_answers():
    made = history(1, {0: ([line(0).half()], Transformer2DModelOutput(sample=line(0)), None)})
    rows, output, nothing = made.forecast(1, TIMES)
    assert (type(rows), rows[0].dtype) == (list, torch.float16)
    assert isinstance(output, Transformer2DModelOutput)
    assert torch.equal(output.sample, line(0))
    assert nothing is None


def test_what_a_pipeline_does_to_an_answer_changes_no_forecast():
    answer = line(0).clone()
    made = history(1, {0: answer})
    answer.zero_()
    assert torch.equal(made.forecast(1, TIMES), line(0))


def test_an_answer_of_unknown_form_is_refused():
    with pytest.raises(NotStackable, match="str"):
        History(1).note(0, "picture", TIMES)
