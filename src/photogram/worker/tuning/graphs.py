"""Replays calls that are bound by the CPU's launches as CUDA graphs.

A graph is one call of one network: its kernels at fixed addresses, started at once. So arguments are copied to where
the graph reads them, results are copied out of where it writes, and a call of any other shape, or with any other plain
value among its arguments, runs as it always did. The weights stay where they are: LoRAs are merged in place, and a
graph reads what is merged at the time.

All graphs share one pool of memory, since calls run one after another and no result is left in it.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch
from torch.utils import _pytree as trees

logger = logging.getLogger(__name__)

# A call whose launches take less of its time than this gains nothing worth the memory.
LAUNCH_BOUND_SHARE = 0.6
# Nor does one of this length: no network launches for so long.
LONGEST_S = 0.5
MAX_GRAPHS = 64
_MAX_KNOWN = 1024

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


class Unrecordable(Exception):
    """A call that can be no graph: what is said is why."""


class Recorder(Protocol):
    """What a device can do: time a call, and record one."""

    def measured(self, run: Callable[[], Any]) -> tuple[Any, float, float]:
        """Run a call; return its result, and the seconds until it was launched and until it was over."""
        ...

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Record a call; what is returned replays it and gives its result, which the next replay overwrites.

        Raises what the call or the device raises where it cannot be recorded.
        """
        ...

    @property
    def held_bytes(self) -> int:
        """Memory that records hold."""
        ...

    def forget(self) -> None:
        """Give the memory back; no record is replayed any more."""
        ...


class Graphs:
    """The graphs of one worker's calls, recorded at a call's second time where they pay and memory is left."""

    def __init__(self, recorder: Recorder, device: torch.device, memory_bytes: int) -> None:
        self._recorder = recorder
        self._device = device
        self._memory_bytes = memory_bytes
        # Whether the device has nothing else to do. What else is on it would be in the times and in the record.
        self.is_quiet: Callable[[], bool] = lambda: True
        self._graphs: dict[Hashable, _Graph] = {}
        self._known: OrderedDict[Hashable, bool] = OrderedDict()  # whether a call like this may still be recorded

    def run(self, name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return `real(*args, **kwargs)`, from a graph where there is one. `name` tells networks apart."""
        tensors: list[torch.Tensor] = []
        try:
            key = (name, _outline((args, kwargs), self._device, tensors))
        except Unrecordable:
            return real(*args, **kwargs)
        graph = self._graphs.get(key)
        if graph is not None:
            return graph(tensors)
        first, may_record = key not in self._known, self._known.get(key, True)
        self._note(key, may_record)
        if first or not may_record or self._is_full() or not self.is_quiet():
            return real(*args, **kwargs)
        result, launched_s, total_s = self._recorder.measured(lambda: real(*args, **kwargs))
        self._note(key, False)
        if total_s <= LONGEST_S and launched_s >= LAUNCH_BOUND_SHARE * total_s:
            self._record(name, key, real, args, kwargs)
        return result

    def forget(self) -> None:
        """Give the memory back. Calls are recorded again when they come again."""
        self._graphs.clear()
        self._known.clear()
        self._recorder.forget()

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def _is_full(self) -> bool:
        return len(self._graphs) >= MAX_GRAPHS or self._recorder.held_bytes >= self._memory_bytes

    def _note(self, key: Hashable, may_record: bool) -> None:
        self._known[key] = may_record
        self._known.move_to_end(key)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    def _record(
        self, name: str, key: Hashable, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        started = time.perf_counter()
        try:
            self._graphs[key] = _Graph(self._recorder, real, args, kwargs, self._device)
        except Exception as error:
            # Whatever a network does that no graph can hold, or memory that was not there, costs it the graph only.
            logger.info("calls of %s run without a graph: %s", name, str(error).partition("\n")[0])
            return
        logger.info(
            "%s: graph %d recorded in %.2f s, %.2f GB held by all",
            name,
            len(self._graphs),
            time.perf_counter() - started,
            self._recorder.held_bytes / 1e9,
        )


class _Graph:
    """One recorded call, and the tensors that it reads its arguments from."""

    def __init__(
        self,
        recorder: Recorder,
        real: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        device: torch.device,
    ) -> None:
        given: list[torch.Tensor] = []
        _outline((args, kwargs), device, given)
        self._inputs = [tensor.clone() for tensor in given]
        own_args, own_kwargs = _with_tensors((args, kwargs), iter(self._inputs))
        self._replay = recorder.record(lambda: real(*own_args, **own_kwargs))

    def __call__(self, tensors: list[torch.Tensor]) -> Any:
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        return trees.tree_map_only(torch.Tensor, torch.clone, self._replay())


class CudaRecorder:
    """Records on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.forget()

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def forget(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._held_bytes = 0

    def measured(self, run: Callable[[], Any]) -> tuple[Any, float, float]:
        torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        result = run()
        launched = time.perf_counter()
        torch.cuda.synchronize(self._device)
        return result, launched - started, time.perf_counter() - started

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        # Libraries make their workspaces and choose their kernels for a stream outside of the record.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads (the link to the host, copies of LoRAs) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = run()
        self._held_bytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        strange = [leaf for leaf in trees.tree_leaves(result) if not isinstance(leaf, (torch.Tensor, *_PLAIN))]
        if strange:
            raise Unrecordable(f"it returns a {type(strange[0]).__name__}")

        def replay() -> Any:
            graph.replay()
            return result

        return replay


# --- arguments ----------------------------------------------------------------------------------------------------


def _outline(value: Any, device: torch.device, tensors: list[torch.Tensor]) -> Hashable:
    """Return what two calls must have in common to be one graph, and append the value's tensors.

    Raises Unrecordable for tensors that are not on the device, which a graph would hold as they were, and for objects
    of other kinds than pipelines pass as plain values.
    """
    kind = type(value)
    if isinstance(value, torch.Tensor):
        if value.device != device:
            raise Unrecordable(f"a tensor on {value.device}")
        tensors.append(value)
        return (value.shape, value.stride(), value.dtype)
    if kind in (list, tuple):
        return (kind, *(_outline(item, device, tensors) for item in value))
    if kind is dict:
        return (kind, *((name, _outline(item, device, tensors)) for name, item in value.items()))
    if kind in _PLAIN:
        return (kind, value)
    raise Unrecordable(f"a {kind.__name__}")


def _with_tensors(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """Return the value with its tensors, in the order of `_outline`, replaced."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(item, tensors) for item in value)
    if type(value) is dict:
        return {name: _with_tensors(item, tensors) for name, item in value.items()}
    return value
