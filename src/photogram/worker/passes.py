"""Runs the calls that a plan names: one alone, several as one pass; in halves where there are two groups of ranks.

The halves are, in this order of preference: the calls of the plan and those that the same jobs will make next in
their step (`guidance`); some of the jobs and the others; the rows of one call, which a pipeline has put together for
its guidance. The first runs exactly the calls that one device would run.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

from .fibers import Call
from .job import Job
from .layout import NotStackable, distance, join, split
from .parallel.leader import RunBoth
from .stacking import Stackable, Stacker, divided, joined, tolerance

logger = logging.getLogger(__name__)


class Passes:
    """Runs calls through the stacker; with `run_both` (as `Group.run_both` does) in halves."""

    def __init__(self, stacker: Stacker, run_both: RunBoth | None) -> None:
        self._stacker = stacker
        self._run_both = run_both
        self._divisible: dict[Hashable, bool] = {}  # by outline, whether rows of one call may be run apart

    @property
    def has_halves(self) -> bool:
        return self._run_both is not None

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Run the jobs' pending calls, which share a key where they are several, and return each one's result."""
        if self._run_both is not None and jobs[0].call.module.is_denoiser:
            try:
                results = self._in_halves(jobs, self._run_both)
            except NotStackable as error:
                logger.info("calls of %s run undivided: %s", jobs[0].call.module.name, error)
                results = None
            if results is not None:
                return results
        return self._whole(jobs)

    def _whole(self, jobs: Sequence[Job]) -> list[Any]:
        if len(jobs) == 1:
            return [jobs[0].call.module.run(jobs[0].call, jobs[0].job_id)]
        return self._stacker.run(
            [job.call for job in jobs], [job.stackable for job in jobs], [job.job_id for job in jobs]
        )

    def _in_halves(self, jobs: Sequence[Job], run_both: RunBoth) -> list[Any] | None:
        """Run the calls in two halves; None where there is no second half."""
        if len(jobs) > 1 and not self._stacker.is_checked(jobs[0].stackable):
            return None
        calls, prepared = [job.call for job in jobs], [job.stackable for job in jobs]
        following = self._following(jobs)
        if following is not None:
            next_calls, next_prepared = following
            first, second = _as_one(calls, prepared), _as_one(next_calls, next_prepared)
            result, next_result = run_both(partial(first.module.run, first, jobs[0].job_id), second, jobs[0].job_id)
            if next_result is not None:
                answers = _parts(next_result, next_prepared)
                for job, call, answer in zip(jobs, next_calls, answers, strict=True):
                    job.foresight.keep(call, answer)
            return _parts(result, prepared)
        if len(jobs) > 1:
            middle = len(jobs) // 2
            halves = [slice(middle), slice(middle, None)]
            first, second = (_as_one(calls[half], prepared[half]) for half in halves)
            results = _both(first, second, jobs[0].job_id, run_both)
            return [
                part for half, result in zip(halves, results, strict=True) for part in _parts(result, prepared[half])
            ]
        return self._rows_apart(jobs[0], run_both)

    def _following(self, jobs: Sequence[Job]) -> tuple[list[Call], list[Stackable | None]] | None:
        """Return what all the jobs will call next in their step, if that too can be one pass."""
        calls = [call for job in jobs if (call := job.foresight.next_call()) is not None]
        if len(calls) < len(jobs):
            return None
        if len(jobs) == 1:
            return calls, [None]
        prepared = [self._stacker.prepare(call, job.digest) for job, call in zip(jobs, calls, strict=True)]
        first = prepared[0]
        if first is None or not self._stacker.is_checked(first):
            return None
        if any(part is None or part.key != first.key for part in prepared):
            return None
        return calls, prepared

    def _rows_apart(self, job: Job, run_both: RunBoth) -> list[Any] | None:
        """Run the first and the second half of one call's rows; the first time of a kind also undivided, to compare."""
        part = job.stackable
        if part is None or part.num_rows < 2 or not self._divisible.get(part.binding.outline, True):
            return None
        result = join(_both(*divided(job.call, part), job.job_id, run_both))
        if part.binding.outline in self._divisible:
            return [result]
        undivided = job.call.module.run(job.call, job.job_id)
        difference = distance(result, undivided)
        fits = difference <= tolerance(undivided, in_fp8=job.call.in_fp8)
        self._divisible[part.binding.outline] = fits
        log = logger.info if fits else logger.warning
        log(
            "the two halves of %s's calls %s: relative difference %.2g",
            job.call.module.name, "run apart" if fits else "stay together", difference,
        )  # fmt: skip
        return [undivided]


def _as_one(calls: Sequence[Call], prepared: Sequence[Stackable | None]) -> Call:
    return calls[0] if len(calls) == 1 else joined(calls, [part for part in prepared if part is not None])


def _parts(result: Any, prepared: Sequence[Stackable | None]) -> list[Any]:
    """Return each call's part of the result of `_as_one`."""
    return [result] if len(prepared) == 1 else split(result, [part.num_rows for part in prepared if part is not None])


def _both(first: Call, second: Call, owner: str, run_both: RunBoth) -> list[Any]:
    result, other = run_both(partial(first.module.run, first, owner), second, owner)
    # What failed over there is run here, to succeed or to say why.
    return [result, second.module.run(second, owner) if other is None else other]
