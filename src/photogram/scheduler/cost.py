"""What calls and jobs cost in seconds, learned from the reports of those that ran.

Two tables. `CallCosts` knows forward passes by kind and batch size. `JobCosts` knows the parts of a job (encode, one
step, decode) by the job's kind and size, in seconds as if it ran alone. How many denoiser calls a step takes is not
asked: the time between two reported steps holds them all.

Both are bounded (oldest entry out) and know nothing of policy.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from .job import Job, JobTicket, Phase

_ALPHA = 0.25
_MAX_CALL_KINDS = 2048
_MAX_JOB_KINDS = 512

UNKNOWN_STEP_S_PER_SIZE = 1e-7
"""Seconds per step and unit of size before anything is known. Only the order of unknown jobs hangs on it."""


class Mean:
    """An exponentially weighted mean. The first sample of anything may hold a compilation: it yields to a much
    smaller second one."""

    __slots__ = ("num_samples", "value")

    def __init__(self) -> None:
        self.num_samples = 0
        self.value = 0.0

    def add(self, seconds: float) -> None:
        if self.num_samples == 0 or (self.num_samples == 1 and seconds < self.value / 2):
            self.value = seconds
        else:
            self.value += _ALPHA * (seconds - self.value)
        self.num_samples += 1


class CallCosts:
    """Seconds of a forward pass by kind and batch size. Look-ups cost O(batch sizes seen of that kind)."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[str, dict[int, Mean]] = OrderedDict()
        # What was last seen of each phase, by job size: the guess for a kind that never ran.
        self._phases: dict[Phase, OrderedDict[float, float]] = {}

    def observe(self, kind: str, phase: Phase, num_calls: int, size_hint: float, seconds: float) -> None:
        sizes = self._kinds.get(kind)
        if sizes is None:
            sizes = self._kinds[kind] = {}
            if len(self._kinds) > _MAX_CALL_KINDS:
                self._kinds.popitem(last=False)
        mean = sizes.get(num_calls)
        if mean is None:
            mean = sizes[num_calls] = Mean()
        mean.add(seconds)
        seen = self._phases.setdefault(phase, OrderedDict())
        seen[size_hint] = self.expected(kind, 1) or seconds
        if len(seen) > _MAX_JOB_KINDS:
            seen.popitem(last=False)

    def num_samples(self, kind: str, num_calls: int) -> int:
        mean = self._kinds.get(kind, {}).get(num_calls)
        return 0 if mean is None else mean.num_samples

    def expected(self, kind: str, num_calls: int) -> float | None:
        """Return the seconds of a pass of `num_calls` calls, interpolated between known sizes; None if none is known.

        Beyond the largest known size it grows as between the two largest, or in proportion where one is known;
        below the smallest known size half of the time is taken to be independent of the batch.
        """
        sizes = self._kinds.get(kind)
        if not sizes:
            return None
        exact = sizes.get(num_calls)
        if exact is not None:
            return exact.value
        below = max((n for n in sizes if n < num_calls), default=None)
        above = min((n for n in sizes if n > num_calls), default=None)
        if below is not None and above is not None:
            low, high = sizes[below].value, sizes[above].value
            return low + (high - low) * (num_calls - below) / (above - below)
        if above is not None:
            return sizes[above].value * (0.5 + 0.5 * num_calls / above)
        assert below is not None
        before = max((n for n in sizes if n < below), default=None)
        if before is None:
            return sizes[below].value * num_calls / below
        slope = max(0.0, (sizes[below].value - sizes[before].value) / (below - before))
        return sizes[below].value + slope * (num_calls - below)

    def guess(self, phase: Phase, num_calls: int, size_hint: float) -> float | None:
        """Return seconds for a kind that never ran: the nearest known size of that phase, in proportion."""
        seen = self._phases.get(phase)
        if not seen:
            return None
        nearest = _nearest(tuple(seen), size_hint)
        return seen[nearest] * num_calls * (1.0 if phase == "encode" else size_hint / nearest)


@dataclass(slots=True)
class _Parts:
    encode: Mean
    step: Mean
    decode: Mean
    told_s: float = 0.0  # the price of a step when `version` last moved for it


class JobCosts:
    """Seconds of the parts of a job, by its kind and size.

    `version` moves when some price changed by more than a tenth: estimates made before are then out of date.
    """

    def __init__(self) -> None:
        self._parts: OrderedDict[tuple[str, float], _Parts] = OrderedDict()
        self._guesses: dict[tuple[str, float], tuple[_Parts, float] | None] = {}
        self.version = 0

    def has_measured(self, ticket: JobTicket) -> bool:
        """True once a step of a job of this very kind and size was seen."""
        parts = self._parts.get((ticket.kind, ticket.size_hint))
        return parts is not None and parts.step.num_samples > 0

    def knows(self, ticket: JobTicket) -> bool:
        """True once a step of some job was seen from which this one's can be told."""
        return self._find(ticket.kind, ticket.size_hint) is not None

    def rates(self, ticket: JobTicket) -> tuple[float, float, float]:
        """Return the seconds of (encode, one step, decode), scaled from the nearest known size where need be."""
        found = self._find(ticket.kind, ticket.size_hint)
        if found is None:
            return 0.0, UNKNOWN_STEP_S_PER_SIZE * ticket.size_hint, 0.0
        parts, scale = found
        return parts.encode.value, parts.step.value * scale, parts.decode.value * scale

    def remaining_s(self, job: Job) -> float:
        """Return the seconds that the job still needs, if it ran alone."""
        encode_s, step_s, decode_s = self.rates(job.ticket)
        left = max(0.0, decode_s - job.decode_s)
        if job.step == 0 and job.unstepped_s == 0:
            left += max(0.0, encode_s - job.encode_s)
        if job.num_steps > job.step:
            left += max(0.0, step_s * (job.num_steps - job.step) - job.unstepped_s)
        return left

    def stepped(self, job: Job, num_steps: int) -> None:
        """Learn from a job that has just made `num_steps` steps with `unstepped_s` seconds of calls."""
        seconds = job.unstepped_s / num_steps
        if seconds <= 0:
            return
        parts = self._entry(job.ticket)
        parts.step.add(seconds)
        if abs(parts.step.value - parts.told_s) > 0.1 * parts.told_s:
            parts.told_s = parts.step.value
            self.version += 1

    def finished(self, job: Job) -> None:
        """Learn from a job that came to its end."""
        parts = self._entry(job.ticket)
        parts.encode.add(job.encode_s)
        parts.decode.add(job.decode_s)

    def _entry(self, ticket: JobTicket) -> _Parts:
        key = (ticket.kind, ticket.size_hint)
        parts = self._parts.get(key)
        if parts is None:
            parts = self._parts[key] = _Parts(Mean(), Mean(), Mean())
            if len(self._parts) > _MAX_JOB_KINDS:
                self._parts.popitem(last=False)
            self._guesses.clear()
        return parts

    def _find(self, kind: str, size_hint: float) -> tuple[_Parts, float] | None:
        key = (kind, size_hint)
        parts = self._parts.get(key)
        if parts is not None and parts.step.num_samples:
            return parts, 1.0
        if key not in self._guesses:
            if len(self._guesses) > 4 * _MAX_JOB_KINDS:
                self._guesses.clear()
            self._guesses[key] = self._search(kind, size_hint)
        return self._guesses[key]

    def _search(self, kind: str, size_hint: float) -> tuple[_Parts, float] | None:
        known = [key for key, parts in self._parts.items() if parts.step.num_samples]
        alike = [key for key in known if key[0] == kind] or known
        if not alike:
            return None
        nearest = min(alike, key=lambda key: abs(math.log(key[1] / size_hint)))
        return self._parts[nearest], size_hint / nearest[1]


def _nearest(sizes: tuple[float, ...], size_hint: float) -> float:
    return min(sizes, key=lambda size: abs(math.log(size / size_hint)))
