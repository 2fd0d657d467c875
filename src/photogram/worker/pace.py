"""Keeps the CPU from running far ahead of the device, and times passes without waiting for them.

Launches are asynchronous: without a bound a whole job would be queued on the GPU before anything else got a turn,
and no pre-emption would help. On the CPU a call is over when it returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Passes on the device at once: one runs while the next is launched.
MAX_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class _Pass:
    start: torch.cuda.Event
    end: torch.cuda.Event
    like: Hashable


class Pace:
    """Times passes; at most `MAX_IN_FLIGHT` of them are on the device.

    What a pass took is known on a GPU only when it is over, and by then the next is launched. So the first of its
    like is waited for, and later ones are reported to take what the last finished one of their like did.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        """`clock` gives seconds; a GPU times its passes itself."""
        self._device = device
        self._clock = clock
        self._in_flight: deque[_Pass] = deque()
        self._seconds: dict[Hashable, float] = {}

    def wait_for_room(self) -> None:
        """Wait until fewer than the bound are in flight, and note the seconds of those that are over."""
        while self._in_flight and (len(self._in_flight) >= MAX_IN_FLIGHT or self._in_flight[0].end.query()):
            self._note(self._in_flight.popleft())

    @contextmanager
    def measured(self, like: Hashable, report: Callable[[float], None]) -> Iterator[None]:
        """Time what is launched inside; `report` is given its seconds. Passes of equal `like` cost alike."""
        if self._device.type != "cuda":
            started = self._clock()
            yield
            report(self._clock() - started)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._in_flight.append(_Pass(start, end, like))
        if like not in self._seconds:
            self._note(self._in_flight.pop())
        report(self._seconds[like])

    def release_memory(self) -> None:
        """Give cached device memory back after a pass that did not fit."""
        if self._device.type == "cuda":
            self._in_flight.clear()
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def _note(self, finished: _Pass) -> None:
        finished.end.synchronize()
        self._seconds[finished.like] = finished.start.elapsed_time(finished.end) / 1000
