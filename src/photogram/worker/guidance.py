"""Foretells the second call of a guided step, so that it can run at the same time as the first.

A pipeline with guidance makes two calls a step, one after the other, that differ in the prompt alone. What differed
between the two calls of the last step is taken from the second of them, all else from the first call of this step. The
foretold call is run on other devices meanwhile, and its result handed over once the pipeline really makes that call,
with equal arguments: what was foretold wrongly costs time that nobody else would have used, and nothing else.

A job's first step has no step before it. What is its second call's own is mostly the negative prompt, encoded, and
jobs of one kind mostly have the same: it is taken from the last job of the kind (`Habits`), and compared like all else.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from torch.utils import _pytree as trees

from ..core.request import GenerateRequest
from .fibers import Call

logger = logging.getLogger(__name__)

# Beyond this a step is not what was thought of; the arguments of its calls would only take memory.
_MAX_CALLS = 4
# Encoded prompts are some megabytes, on the device; a second call with more of its own is not worth keeping.
_MAX_KINDS = 8
_MAX_KEPT_BYTES = 16_000_000


def kind_of(request: GenerateRequest) -> Hashable:
    """Return what jobs have in common whose second calls have the same of their own."""
    return (
        request.task,
        request.negative_prompt,
        request.guidance_scale,
        request.loras,
        len(request.images),
        msgspec.json.encode(request.extra, order="deterministic"),
    )


@dataclass(frozen=True, slots=True)
class Habit:
    """What is its own of a second call, and with what else it is made."""

    differs: Any  # as `_difference` says it
    second: Call  # its arguments without those of the first call


class Habits:
    """What the second calls of earlier jobs had of their own, by kind of job. One worker's; lives as long as it."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Habit | None] = OrderedDict()  # None: not to be relied on

    def of(self, kind: Hashable, call: Call) -> Habit | None:
        """Return the habit of a kind whose first call is like this one."""
        habit = self._known.get(kind)
        if habit is None or habit.second.module is not call.module or habit.second.method != call.method:
            return None
        return habit

    def learn(self, kind: Hashable, differs: Any, second: Call) -> None:
        """Keep what is its own of a second call, unless that is too large or was wrong before."""
        if kind in self._known and self._known[kind] is None:
            return
        args, kwargs = _own(differs, _arguments(second))
        if _size_bytes((args, kwargs)) > _MAX_KEPT_BYTES:
            return
        self._keep(kind, Habit(differs, replace(second, args=args, kwargs=kwargs)))

    def distrust(self, kind: Hashable) -> None:
        """Note that a second call came otherwise, as where it also depends on the prompt: nothing is foretold by
        this kind's habit any more."""
        self._keep(kind, None)

    def _keep(self, kind: Hashable, habit: Habit | None) -> None:
        self._known[kind] = habit
        self._known.move_to_end(kind)
        if len(self._known) > _MAX_KINDS:
            self._known.popitem(last=False)


class Foresight:
    """What one job's denoiser was called with in this step and the last, and what is foretold of this one."""

    def __init__(self, habits: Habits, kind: Hashable) -> None:
        self._habits = habits
        self._kind = kind
        self._is_by_habit = False
        self._position = -1  # of the solver
        self._last: list[Call] = []
        self._calls: list[Call] = []
        self._differs: Any = None  # of the second call's arguments, where they are its own; None: not learned
        self._foretold: Call | None = None
        self._answer: Any = None

    def note(self, call: Call, position: int) -> None:
        """Note that the job makes this call; `position` counts the calls of its solver."""
        if position != self._position:
            self._wronged()  # the second call did not come at all
            self._last, self._calls, self._position = self._calls, [], position
        if len(self._calls) < _MAX_CALLS:
            self._calls.append(call)

    def next_call(self) -> Call | None:
        """Return the call that should follow the pending one in this step; None where nothing is known of it."""
        index = len(self._calls) - 1
        if index < 0 or index % 2:
            return None
        now = self._calls[index]
        if not self._last:
            habit = self._habits.of(self._kind, now) if index == 0 else None
            if habit is None:
                return None
            self._is_by_habit = True
            return self._made(now, habit.differs, habit.second)
        if len(self._last) < index + 2:
            return None
        first, second = self._last[index], self._last[index + 1]
        if first.module is not second.module or not first.method == second.method == now.method:
            return None
        if self._differs is None:
            self._differs = _difference(_arguments(first), _arguments(second))
            self._habits.learn(self._kind, self._differs, second)
        self._is_by_habit = False
        return self._made(now, self._differs, second)

    def _made(self, now: Call, differs: Any, second: Call) -> Call | None:
        """The call that has of `second` what differs, and all else of the pending one."""
        try:
            args, kwargs = _mixed(differs, _arguments(now), _arguments(second))
        except (KeyError, IndexError, TypeError, ValueError):  # the calls are not of one form
            self._differs = None
            return None
        return Call(
            module=now.module,
            method=now.method,
            args=args,
            kwargs=kwargs,
            cache_context=second.cache_context,
            autocast=second.autocast,
            loras=now.loras,
            exact=now.exact,
            in_fp8=now.in_fp8,
        )

    def keep(self, foretold: Call, answer: Any) -> None:
        """Keep the answer to a call that was run before the pipeline has made it."""
        self._foretold, self._answer = foretold, answer

    def answer(self, call: Call) -> Any:
        """Return the kept answer where the call that was just noted is the foretold one, None otherwise."""
        foretold, answer = self._foretold, self._answer
        if foretold is None:
            return None
        is_it = (
            call.module is foretold.module
            and call.method == foretold.method
            and call.autocast == foretold.autocast
            and _equal(_arguments(call), _arguments(foretold))
        )
        if not is_it:
            self._wronged()
            logger.debug("a call of %s was foretold wrongly", call.module.name)
            return None
        self._foretold = self._answer = None
        return answer

    def _wronged(self) -> None:
        """Drop what was foretold and not asked for, and what it was foretold by."""
        if self._foretold is None:
            return
        if self._is_by_habit:
            self._habits.distrust(self._kind)
        self._differs = self._foretold = self._answer = None


def _arguments(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return call.args, call.kwargs


def _equal(a: Any, b: Any) -> bool:
    """Say whether two arguments are equal by value. Objects that are the same are not looked into: between the calls
    of one step nothing is changed in place."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a == b)


def _difference(first: Any, second: Any) -> Any:
    """Return where two calls' arguments differ: True or False, or a list or dict of them by place."""
    if isinstance(first, list | tuple) and type(first) is type(second) and len(first) == len(second):
        return [_difference(a, b) for a, b in zip(first, second, strict=True)]
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {key: _difference(first[key], second[key]) for key in first}
    return not _equal(first, second)


def _mixed(differs: Any, now: Any, second: Any) -> Any:
    """Take from `second` what differs and all else from `now`. Raises where they are not of the form learned."""
    if isinstance(differs, bool):
        return second if differs else now
    if isinstance(differs, dict):
        if differs.keys() != now.keys():
            raise KeyError("other arguments")
        return {key: _mixed(one, now[key], second[key]) for key, one in differs.items()}
    return type(now)(_mixed(one, a, b) for one, a, b in zip(differs, now, second, strict=True))


def _own(differs: Any, second: Any) -> Any:
    """Return a second call's arguments without what it shares with the first."""
    if isinstance(differs, bool):
        return second if differs else None
    if isinstance(differs, dict):
        return {key: _own(one, second[key]) for key, one in differs.items()}
    return type(second)(_own(one, value) for one, value in zip(differs, second, strict=True))


def _size_bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in trees.tree_leaves(value) if isinstance(leaf, torch.Tensor))
