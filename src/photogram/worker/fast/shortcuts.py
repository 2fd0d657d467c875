"""Which denoiser calls of one job are answered without being run, as its quality mode allows.

It stands where every call of a job passes by, so that it works for any family, with stacking, LoRAs, several devices,
offloading and compiled networks: a call that is answered here never reaches them. Jobs of all modes share passes, as
the calls that are run are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.quality_mode import Recipe
from ..fibers import Call
from ..layout import NotStackable
from .forecast import History, copied

# A straight line. A parabola follows the curve better and the noise in it worse: see docs/log.md.
NUM_POINTS = 2

# Of one kind in one step. Beyond it the solver is not where it is looked for, and steps are not what they seem.
MAX_CALLS = 8

# What diffusers' pipelines call the two calls of a guided step; the first is the prompt's.
GUIDED_CALL, UNGUIDED_CALL = "cond", "uncond"


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a job's solver stands: steps are counted from 0, and `times` are its timesteps, one for each step.

    They fall from step to step. They are empty until the solver has been called once.
    """

    step: int
    times: Sequence[float]


class Shortcuts:
    """Answers calls of one job's run of a pipeline. `answer` is asked of every denoiser call, in their order."""

    def __init__(self, recipe: Recipe | None) -> None:
        """A job with no recipe has every call run."""
        self._recipe = recipe
        self._histories: dict[Hashable, History] = {}
        self._shapes: dict[Hashable, Hashable] = {}
        self._step = -1
        self._calls: Counter[Hashable] = Counter()  # of this step, by module and context
        self._kinds: list[Hashable] = []  # of the calls of this step
        self._in_a_row = 0
        self._forecasts = False  # whether this step's calls are
        self._pending: Hashable = None  # the kind of the call that is to be run
        self._prompted: tuple[str, Any] | None = None  # the module that answered to the prompt in this step, and what
        self.num_forecast = 0
        self.num_unguided = 0

    @property
    def num_answered(self) -> int:
        """Calls that were answered without being run."""
        return self.num_forecast + self.num_unguided

    def answer(self, call: Call, moment: Moment | None) -> tuple[bool, Any]:
        """Return whether the call need not be run, and its answer. `moment` is None where no step is under way."""
        self._pending = None
        if self._recipe is None or moment is None or call.method != "forward":
            return False, None
        if moment.step != self._step:
            self._begin_step(self._recipe, moment)
        context = _context(call)
        if context == UNGUIDED_CALL and self.leaves_out_guidance(moment) and self._prompted is not None:
            module, answer = self._prompted
            # With the prompt's answer in its place guidance comes to nothing: u + g (c - u) with u = c.
            if module == call.module.name:
                self.num_unguided += 1
                return True, copied(answer)
        count = self._calls[call.module.name, context]
        self._calls[call.module.name, context] += 1
        if count >= MAX_CALLS:
            return False, None
        kind, shapes = (call.module.name, context, count), _shapes((call.args, call.kwargs))
        self._kinds.append(kind)
        if self._shapes.get(kind) != shapes:
            self._histories.pop(kind, None)
            self._shapes[kind] = shapes
        history = self._histories.get(kind)
        if self._forecasts and history is not None and history.is_measured:
            self.num_forecast += 1
            forecast = history.forecast(moment.step, moment.times)
            self._remember_prompted(call, forecast)
            return True, forecast
        self._pending = kind
        return False, None

    def note(self, call: Call, moment: Moment | None, answer: Any) -> None:
        """Remember what the call, for which there was no answer, was answered when it was run."""
        kind, self._pending = self._pending, None
        if kind is None or moment is None:
            return
        history = self._histories.setdefault(kind, History(NUM_POINTS))
        try:
            history.note(moment.step, answer, moment.times)
        except NotStackable:
            self._recipe = None
            return
        self._remember_prompted(call, answer)

    def leaves_out_guidance(self, moment: Moment | None) -> bool:
        """Say whether this step is one without guidance: its second call is answered as the first was."""
        if self._recipe is None or moment is None or not moment.times:
            return False
        return not self._recipe.is_guided(moment.step, len(moment.times))

    def _remember_prompted(self, call: Call, answer: Any) -> None:
        if _context(call) == GUIDED_CALL:
            self._prompted = call.module.name, answer

    def _begin_step(self, recipe: Recipe, moment: Moment) -> None:
        before, self._kinds = self._kinds, []
        self._in_a_row = self._in_a_row + 1 if self._forecasts else 0
        self._step, self._prompted = moment.step, None
        self._calls.clear()
        self._forecasts = self._may_forecast(recipe, moment, before)

    def _may_forecast(self, recipe: Recipe, moment: Moment, before: Sequence[Hashable]) -> bool:
        """Decide once for all calls of a step, so that the halves of its guidance are of one kind.

        By those of the kinds called in the step `before`: a network that takes no more part is no measure.
        """
        if not recipe.may_forecast(moment.step, len(moment.times), self._in_a_row):
            return False
        histories = [self._histories.get(kind) for kind in before]
        measured = [history for history in histories if history is not None and history.is_measured]
        if not measured or len(measured) < len(histories):
            return False
        errors = torch.stack([history.expected_error(moment.step, moment.times) for history in measured])
        return bool(errors.max() <= recipe.tolerance)


def _context(call: Call) -> str | None:
    """The name that the pipeline gives to this call of its step, where it gives one."""
    return None if call.cache_context is None else call.cache_context[0]


def _shapes(value: Any) -> Hashable:
    """Shapes of all tensors among a call's arguments: where they change, the answers before are of another kind."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return tuple((name, _shapes(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_shapes, value))
    return None
