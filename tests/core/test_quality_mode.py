"""What the quality modes may leave out."""

import dataclasses

import pytest

from photogram.core.quality_mode import RECIPES, Recipe, describe_mode

RECIPE = Recipe(first_share=0.2, first_steps=4, last_steps=1, forecasts_in_a_row=2, tolerance=0.1)


def forecast_steps(recipe: Recipe, num_steps: int) -> list[int]:
    """The steps that are forecast where every forecast is good enough."""
    steps: list[int] = []
    in_a_row = 0
    for step in range(num_steps):
        in_a_row = in_a_row + 1 if recipe.may_forecast(step, num_steps, in_a_row) else 0
        if in_a_row:
            steps.append(step)
    return steps


def test_exact_leaves_nothing_out():
    assert RECIPES["exact"] is None


@pytest.mark.parametrize("num_steps", [1, 4, 5, 6, 20, 50, 200])
@pytest.mark.parametrize("mode", ["high", "fast"])
def test_first_and_last_steps_are_always_run(mode, num_steps):
    recipe = RECIPES[mode]
    steps = forecast_steps(recipe, num_steps)
    assert all(recipe.num_first(num_steps) <= step < num_steps - recipe.last_steps for step in steps)
    assert len(steps) == recipe.most_forecasts(num_steps)


def test_no_more_steps_in_a_row_are_forecast_than_the_recipe_says():
    assert forecast_steps(RECIPE, 12) == [4, 5, 7, 8, 10]
    assert forecast_steps(dataclasses.replace(RECIPE, forecasts_in_a_row=1), 12) == [4, 6, 8, 10]
    assert forecast_steps(dataclasses.replace(RECIPE, forecasts_in_a_row=0), 12) == []


def test_fast_may_leave_out_more_than_high():
    for num_steps in (20, 28, 50):
        assert RECIPES["fast"].most_forecasts(num_steps) > RECIPES["high"].most_forecasts(num_steps) > 0


def test_guidance_ends_after_its_share_of_the_steps():
    recipe = dataclasses.replace(RECIPE, guided=0.75)
    assert [recipe.is_guided(step, 8) for step in range(8)] == [True] * 6 + [False] * 2
    assert all(RECIPE.is_guided(step, 8) for step in range(8))


@pytest.mark.parametrize("mode", RECIPES)
def test_every_mode_is_described_in_a_line(mode):
    assert describe_mode(mode)
    assert "\n" not in describe_mode(mode)
