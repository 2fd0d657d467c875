"""How many calls of one kind go into a forward pass: the operator's bound, memory, and whether it pays.

Continuous batching (Orca, OSDI 2022) with a look at the price: where a lone call already fills the device, a batch
saves nothing and only makes its first member wait for the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from .cost import CallCosts

_GOOD_RUNS_TO_GROW = 16
_REFUSALS_TO_PROBE = 64
_SAMPLES_TO_KNOW = 2
_MAX_KINDS = 2048


class _KindLimit:
    """What is known of one kind's memory and of the use of batching it."""

    __slots__ = ("bytes_per_call", "good_runs", "is_kept_alone", "limit", "refusals")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.good_runs = 0
        self.refusals = 0
        self.bytes_per_call: int | None = None
        self.is_kept_alone = False


class BatchLimits:
    """The size of the next batch, by kind. All methods are O(max_batch_size)."""

    def __init__(
        self, *, max_batch_size: int, memory_bytes: int | None, min_gain: float, call_costs: CallCosts
    ) -> None:
        self._max_batch_size = max_batch_size
        self._memory_bytes = memory_bytes
        self._min_gain = min_gain
        self._costs = call_costs
        self._kinds: OrderedDict[str, _KindLimit] = OrderedDict()

    def size(self, kind: str, num_waiting: int, bytes_per_call: int | None, beside: str | None = None) -> int:
        """Return how many of `num_waiting` calls to run as one pass, at least 1.

        `beside` is the kind of a call that runs at the same time, and has its part of the memory.
        """
        known = self._kinds.get(kind)
        most = min(num_waiting, self._max_batch_size if known is None else known.limit)
        if bytes_per_call is None and known is not None:
            bytes_per_call = known.bytes_per_call
        if self._memory_bytes is not None and bytes_per_call:
            taken_bytes = 0 if beside is None else self._bytes_of(beside) or 0
            most = min(most, (self._memory_bytes - taken_bytes) // bytes_per_call)
        if most <= 1:
            return 1
        best = self._paying(kind, most)
        if best < most:
            known = self._entry(kind)
            known.refusals += 1
            if known.refusals % _REFUSALS_TO_PROBE == 0:  # prices change: clocks, other programs, a compiled graph
                return most
        return best

    def ran(self, kind: str, num_calls: int, peak_bytes: int | None) -> None:
        """A pass went well. A limit that memory had lowered grows again by one after enough passes at it."""
        if peak_bytes is not None:
            self._entry(kind).bytes_per_call = -(-peak_bytes // num_calls)
        known = self._kinds.get(kind)
        if known is None or known.limit >= self._max_batch_size or num_calls < known.limit:
            return
        known.good_runs += 1
        if known.good_runs >= _GOOD_RUNS_TO_GROW:
            known.limit += 1
            known.good_runs = 0

    def out_of_memory(self, kind: str, num_calls: int) -> None:
        """A pass did not fit: at most half as many next time."""
        known = self._entry(kind)
        known.limit = max(1, min(known.limit, num_calls) // 2)
        known.good_runs = 0

    def fit_together(self, kind: str, others: Iterable[str]) -> bool:
        """Say whether a call of a kind fits beside a call of any of the others, as far as passes have shown."""
        known = self._kinds.get(kind)
        if known is not None and known.is_kept_alone:
            return False
        if self._memory_bytes is None:
            return True
        own = self._bytes_of(kind)
        return own is not None and own + max((self._bytes_of(other) or 0 for other in others), default=0) <= (
            self._memory_bytes
        )

    def keep_alone(self, kind: str) -> None:
        """A call of this kind and what ran beside it did not fit together: no more of that."""
        self._entry(kind).is_kept_alone = True

    def _bytes_of(self, kind: str) -> int | None:
        known = self._kinds.get(kind)
        return None if known is None else known.bytes_per_call

    def _paying(self, kind: str, most: int) -> int:
        """Return the largest size up to `most` of which every further member saves `min_gain` of a lone call."""
        if self._costs.num_samples(kind, most) < _SAMPLES_TO_KNOW:
            return most
        alone_s = self._costs.expected(kind, 1)
        if alone_s is None:
            return most
        best, best_s = 1, alone_s
        for num_calls in range(2, most + 1):
            seconds = self._costs.expected(kind, num_calls)
            if seconds is not None and seconds - best_s <= (1 - self._min_gain) * alone_s * (num_calls - best):
                best, best_s = num_calls, seconds
        return best

    def _entry(self, kind: str) -> _KindLimit:
        known = self._kinds.get(kind)
        if known is None:
            known = self._kinds[kind] = _KindLimit(self._max_batch_size)
            if len(self._kinds) > _MAX_KINDS:
                self._kinds.popitem(last=False)
        return known
