"""The quality modes of a request: how much of the denoiser's work is left out, and where.

`exact` runs every call that the pipeline makes. The others are *lossy*: they leave calls out. What they leave out is
decided here, for every family alike; `worker/fast` does it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .request import QualityMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What one mode leaves out.

    Steps are forecast from those before them where they lie between the first and the last ones, at most
    `forecasts_in_a_row` and only while the error that is expected of a forecast, relative to what it stands for, is at
    most `tolerance`. After a share `guided` of its steps, the first ones at least, a run goes on without guidance.
    `in_fp8` has linear layers compute in fp8 where the server has them so.
    """

    first_share: float = 0.2
    first_steps: int = 4
    last_steps: int = 1
    forecasts_in_a_row: int
    tolerance: float
    guided: float = 1.0
    in_fp8: bool = False

    def num_first(self, num_steps: int) -> int:
        """Return how many steps at the beginning, where a picture's composition is decided, are always run."""
        return max(self.first_steps, math.ceil(self.first_share * num_steps))

    def may_forecast(self, step: int, num_steps: int, in_a_row: int) -> bool:
        """Say whether the step, counted from 0, may be forecast after so many forecasts in a row."""
        is_between = self.num_first(num_steps) <= step < num_steps - self.last_steps
        return is_between and in_a_row < self.forecasts_in_a_row

    def most_forecasts(self, num_steps: int) -> int:
        """Return how many steps of a run are forecast where every forecast is expected to be good enough."""
        count = in_a_row = 0
        for step in range(num_steps):
            forecast = self.may_forecast(step, num_steps, in_a_row)
            count, in_a_row = count + forecast, in_a_row + 1 if forecast else 0
        return count

    def is_guided(self, step: int, num_steps: int) -> bool:
        return step < max(self.num_first(num_steps), math.ceil(self.guided * num_steps))

    @property
    def sentence(self) -> str:
        """What the mode does, for the model's description."""
        row = "every second step" if self.forecasts_in_a_row == 1 else f"up to {self.forecasts_in_a_row} steps in a row"
        first = f"after the first {self.first_share:.0%} (at least {self.first_steps})"
        text = f"{row} forecast {first}, where an error of at most {self.tolerance:.0%} is expected"
        text += "" if self.guided == 1 else f"; no guidance in the last {1 - self.guided:.0%}"
        return text + ("; linear layers in fp8 with --fp8-linears" if self.in_fp8 else "")


RECIPES: Mapping[QualityMode, Recipe | None] = MappingProxyType(
    {
        "exact": None,
        "high": Recipe(forecasts_in_a_row=1, tolerance=0.05, guided=0.9),
        "fast": Recipe(forecasts_in_a_row=2, tolerance=0.15, guided=0.75, in_fp8=True),
    }
)
"""By mode. The figures were chosen by the table in docs/performance.md, which `benchmarks/quality.py` makes."""


def describe_mode(mode: QualityMode) -> str:
    """Return one line that says what the mode does."""
    recipe = RECIPES[mode]
    return "every call of the model is run" if recipe is None else recipe.sentence
