"""Foretells the second call of a guided step, so that it can run at the same time as the first.

A pipeline with guidance makes two calls a step, one after the other, that differ in the prompt alone. What differed
between the two calls of the last step is taken from the second of them, all else from the first call of this step. The
foretold call is run on other devices meanwhile, and its result handed over once the pipeline really makes that call,
with equal arguments: what was foretold wrongly costs time that nobody else would have used, and nothing else.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from .fibers import Call

logger = logging.getLogger(__name__)

# Beyond this a step is not what was thought of; the arguments of its calls would only take memory.
_MAX_CALLS = 4


class Foresight:
    """What one job's denoiser was called with in this step and the last, and what is foretold of this one."""

    def __init__(self) -> None:
        self._position = -1  # of the solver
        self._last: list[Call] = []
        self._calls: list[Call] = []
        self._differs: Any = None  # of the second call's arguments, where they are its own; None: not learned
        self._foretold: Call | None = None
        self._answer: Any = None

    def note(self, call: Call, position: int) -> None:
        """Note that the job makes this call; `position` counts the calls of its solver."""
        if position != self._position:
            self._last, self._calls, self._position = self._calls, [], position
            self._foretold = self._answer = None
        if len(self._calls) < _MAX_CALLS:
            self._calls.append(call)

    def next_call(self) -> Call | None:
        """Return the call that should follow the pending one in this step; None where nothing is known of it."""
        index = len(self._calls) - 1
        if index < 0 or index % 2 or len(self._last) < index + 2:
            return None
        first, second, now = self._last[index], self._last[index + 1], self._calls[index]
        if first.module is not second.module or not first.method == second.method == now.method:
            return None
        if self._differs is None:
            self._differs = _difference(_arguments(first), _arguments(second))
        try:
            args, kwargs = _mixed(self._differs, _arguments(now), _arguments(second))
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
        )

    def keep(self, foretold: Call, answer: Any) -> None:
        """Keep the answer to a call that was run before the pipeline has made it."""
        self._foretold, self._answer = foretold, answer

    def answer(self, call: Call) -> Any:
        """Return the kept answer where the call that was just noted is the foretold one, None otherwise."""
        foretold, answer = self._foretold, self._answer
        self._foretold = self._answer = None
        if foretold is None:
            return None
        is_it = (
            call.module is foretold.module
            and call.method == foretold.method
            and call.autocast == foretold.autocast
            and _equal(_arguments(call), _arguments(foretold))
        )
        if not is_it:
            self._differs = None
            logger.debug("a call of %s was foretold wrongly", call.module.name)
            return None
        return answer


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
