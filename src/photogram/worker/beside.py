"""Work beside the loop: launched by a thread of its own and, on a GPU, on a stream of its own.

A decoder of clips is thousands of launches, and frames are a hundred megabytes to be copied and written down. In the
loop's thread and stream both stand before every other job's next step.

What makes two streams right is kept here. Work begins once all is done that the loop had launched when it handed the
work over, so what it reads is there, and no memory is written that the loop may still read. The thread waits for the
device before it says that it is done, and the loop keeps hold of the work until it has taken its result: so what it
reads is not freed under it. And the allocator is told that the loop's stream uses the results, which are of the other
stream's memory: it hands none of it out again before the loop's launches are through with it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Streams(Protocol):
    """What a device has to do so that work in two threads is in order."""

    def mark(self) -> Any:
        """Return where the loop's stream is now."""
        ...

    def after(self, mark: Any) -> AbstractContextManager[object]:
        """In the other thread: launch what is inside on the other stream, after `mark`; at its end wait for it."""
        ...

    def take_over(self, result: Any) -> None:
        """Let the loop's stream, from now on, use tensors that were made on the other one."""
        ...


class HostStreams:
    """For a CPU, where what has returned is done."""

    def mark(self) -> None:
        return None

    def after(self, mark: None) -> AbstractContextManager[object]:
        return nullcontext()

    def take_over(self, result: Any) -> None:
        return None


class CudaStreams:
    """A second stream of one GPU beside the loop's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._other = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def after(self, mark: torch.cuda.Event) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._other):
            self._other.wait_event(mark)
            try:
                yield
            finally:  # after a failure too: what it has launched reads the loop's tensors
                self._other.synchronize()

    def take_over(self, result: Any) -> None:
        stream = torch.cuda.current_stream(self._device)
        for tensor in tensors_in(result):
            if tensor.device == self._device:
                tensor.record_stream(stream)


def streams_of(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else HostStreams()


@dataclass(frozen=True, slots=True)
class _Handed:
    work: Callable[[], Any]
    then: Callable[[Future[Any]], None]
    future: Future[Any]


class Lane:
    """Runs work one after another beside the loop, and gives each result back to the loop.

    All methods are the loop's. `wake` is called from the other thread when there is a result to `take`.
    """

    def __init__(self, streams: Streams, wake: Callable[[], None], name: str) -> None:
        self._streams = streams
        self._wake = wake
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)  # started by the first work
        self._handed: deque[_Handed] = deque()

    @property
    def is_busy(self) -> bool:
        """Say whether there is work whose result was not taken."""
        return bool(self._handed)

    def begin(self, work: Callable[[], Any], then: Callable[[Future[Any]], None]) -> None:
        """Hand work over; `take` calls `then` with what became of it."""
        future = self._thread.submit(_run, work, self._streams, self._streams.mark())
        self._handed.append(_Handed(work, then, future))
        future.add_done_callback(lambda _: self._wake())

    def take(self, *, wait: bool = False) -> bool:
        """Give the loop what is done, in the order in which it was handed over; False where nothing is.

        With `wait` it waits for all.
        """
        taken = False
        while self._handed and (wait or self._handed[0].future.done()):
            first = self._handed[0]
            if first.future.exception() is None:
                self._streams.take_over(first.future.result())
            self._handed.popleft()
            first.then(first.future)
            taken = True
        return taken


class AtOnce:
    """In the place of a lane where nothing is gained by one: work is done when it is handed over."""

    is_busy = False

    def begin(self, work: Callable[[], Any], then: Callable[[Future[Any]], None]) -> None:
        future: Future[Any] = Future()
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        then(future)

    def take(self, *, wait: bool = False) -> bool:
        return False


class Shared:
    """One context for all that are inside at a time: what it sets is set for the whole process, and two threads that
    each set it and put it back would put back the other's."""

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._num_inside = 0
        self._open = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._num_inside == 0:
                self._open.enter_context(self._make())
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if self._num_inside == 0:
                    self._open.close()


def _run(work: Callable[[], Any], streams: Streams, mark: Any) -> Any:
    # What is not of a process but of a thread, as the loop has it.
    with torch.inference_mode(), streams.after(mark):
        return work()


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Give the tensors in what networks return: outputs by name, tuples, distributions, caches of keys and values."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    else:
        parts = []
    for part in (*parts, *getattr(value, "__dict__", {}).values()):
        yield from tensors_in(part, seen)
