"""A fiber runs one job's pipeline and stops at each call of a big module.

Fibers are greenlets: plain pipeline code, many calls deep, is suspended without its knowing. They share the
thread, and so its grad mode, autocast state and default device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from .lora.sets import JobLoras, Segments

if TYPE_CHECKING:
    from .modules import BigModule


@dataclass(frozen=True, slots=True, kw_only=True)
class Autocast:
    """The autocast a pipeline had switched on around a call."""

    device_type: str
    dtype: torch.dtype


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """A suspended call: which method of which module, with what, and what was switched on around it."""

    module: BigModule
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cache_context: tuple[str, Mapping[str, Any]] | None = None
    autocast: Autocast | None = None
    remembered: bool = True  # whether an answer from memory will do
    loras: Segments = ()  # of its rows; set when the call is suspended or stacked
    exact: bool = False  # always with merged weights
    in_fp8: bool = False  # as far as the module has layers for it


@dataclass(frozen=True, slots=True)
class Returned:
    """What the pipeline gave back: the fiber's end."""

    value: Any


class Fiber(greenlet):
    """Runs `main` until it returns; `resume` goes on to the next call.

    Created, resumed and closed by the worker's loop only, which is its parent.
    """

    def __init__(self, main: Callable[[], Any], loras: JobLoras, *, in_fp8: bool = False) -> None:
        super().__init__(run=main)
        self.cache_context: tuple[str, Mapping[str, Any]] | None = None
        self._loras = loras
        self.in_fp8 = in_fp8

    @staticmethod
    def current() -> Fiber | None:
        """The fiber this code runs in, or None in the worker's own loop."""
        running = getcurrent()
        return running if isinstance(running, Fiber) else None

    def resume(self, result: Any = None) -> Call | Returned:
        """Answer the pending call (or start) and run to the next one. Raises what the pipeline raises."""
        return self._outcome(self.switch(result) if self else self.switch())

    def fail(self, error: BaseException) -> Call | Returned:
        """Raise `error` where the fiber waits, as if the call had raised it."""
        return self._outcome(self.throw(error))

    def close(self) -> None:
        """End the fiber where it waits and free its memory. GreenletExit is no Exception, so pipelines let it by."""
        if not self.dead:
            self.throw(GreenletExit)

    def _outcome(self, value: Any) -> Call | Returned:
        return Returned(value) if self.dead else value

    def suspend(self, call: Call) -> Any:
        """Hand `call` to the loop and wait for its result. Called inside the fiber."""
        call.cache_context = self.cache_context
        call.loras, call.exact = ((self._loras.of(call.module.name), 1),), self._loras.exact
        call.in_fp8 = self.in_fp8 and call.module.fp8 is not None
        call.autocast = _leave_autocast()
        try:
            return self.parent.switch(call)
        finally:
            if call.autocast is not None:
                _enter_autocast(call.autocast)


def _leave_autocast() -> Autocast | None:
    """Switch autocast off and say what was on: the next fiber must not run under this one's."""
    for device_type in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device_type):
            state = Autocast(device_type=device_type, dtype=torch.get_autocast_dtype(device_type))
            torch.set_autocast_enabled(device_type, False)
            return state
    return None


def _enter_autocast(state: Autocast) -> None:
    torch.set_autocast_dtype(state.device_type, state.dtype)
    torch.set_autocast_enabled(state.device_type, True)
