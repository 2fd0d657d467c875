"""Where the time of one step over several ranks goes: computing, exchanging, waiting for either.

Read off a trace of torch's profiler: on a GPU its kernels, of which NCCL's are the exchange; on a CPU operators.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_EXCHANGE = ("nccl", "gloo:", "c10d::")


class Span(NamedTuple):
    """One kernel or operator; times in microseconds."""

    name: str
    start: float
    end: float

    @property
    def is_exchange(self) -> bool:
        return self.name.lower().startswith(_EXCHANGE)


def profiled(run: Callable[[], object], device: torch.device, num_layers: int) -> dict[str, Any]:
    """Run a step under the profiler and return the shares of its time; `run` ends with the device idle."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as trace:
        run()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in trace.events() or ()
        # On a GPU's line names that a span of kernels was given stand beside the kernels.
        if event.device_type == wanted and not (event.is_user_annotation if on_gpu else event.cpu_children)
    ]
    return shares(spans, num_layers)


def shares(spans: Iterable[Span], num_layers: int) -> dict[str, Any]:
    """Return what part of the time from the first span to the last one is the exchange's, how much of it nothing
    else is computed in, what part nothing at all runs in, and how many spans there are a layer."""
    every = list(spans)
    if not every:
        return {}
    exchanges, others = ([one for one in every if one.is_exchange is kind] for kind in (True, False))
    whole = max(one.end for one in every) - min(one.start for one in every)
    busy, computing = _covered(every), _covered(others)
    return {
        "exchange_share": _covered(exchanges) / whole,
        "exposed_exchange_share": (busy - computing) / whole,
        "idle_share": 1 - busy / whole,
        "launches_a_layer": len(every) / num_layers,
        "exchanges_a_layer": len(exchanges) / num_layers,
        "slowest": [[name, round(time_us / whole, 3)] for name, time_us in _longest(every, 8)],
    }


def _covered(spans: list[Span]) -> float:
    """The time in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda one: one.start):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _longest(spans: list[Span], count: int) -> list[tuple[str, float]]:
    times: dict[str, float] = {}
    for one in spans:
        times[one.name[:80]] = times.get(one.name[:80], 0.0) + one.end - one.start
    return sorted(times.items(), key=lambda item: -item[1])[:count]
