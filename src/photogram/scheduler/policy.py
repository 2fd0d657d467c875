"""Who goes first: the settings and the comparisons that every decision is made by.

Each owner sends the best of its jobs, then the owners' best are compared; the greater tuple goes first.

*Within an owner* (`Policy.standing`, with the phase):

1. Priority, aged. Higher priorities strictly first. Every `ageing_s` in the system lifts a job by one level, up to
   the highest priority that competes, so nothing starves (Kleinrock's time-dependent priorities, 1964). The period
   is at least `ageing_sizes` times the longest job at hand, so that on a slow machine a long job does not outrank
   short ones merely for being long.
2. Overdue: four such periods or more. Under lasting overload the order becomes first-come.
3. Whether the weights need no switch, for a while after one (`held.py`).
4. Phase. Decode calls first (they end a job and free its memory), then starts and encode calls while `EarlyBudget`
   covers them, so that newcomers can join the others' batches (vLLM's prefill first, SOSP 2023; the bound is the
   lesson of Sarathi-Serve, OSDI 2024: prefills must not stall running jobs).
5. Response ratio over remaining time: (1 + time in the system / size) / remaining ** `bias`. The numerator is
   highest response ratio next (Brinch Hansen, 1971): short jobs gain rank quickly, long ones surely, and of equal
   ones the older is ahead. The denominator is a softened shortest remaining processing time (Schrage, 1968): it
   lets short jobs overtake between two calls and jobs finish that are nearly done. Without it (`bias` 0) the short
   jobs of the mixed workload in `tests/scheduler/test_mixed_load.py` take 2.5 times as long.

*Between owners*: priority, needing no switch, phase, then the least virtual finish time, as `fairness.py` tells. How
old an owner's backlog is has no say there. The places of a shared pass are given out one by one in the same way, each
place that an owner gets counting at once.

Calls of the last call's key count as `stickiness` times better, against needless switching of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .fairness import FairShare
from .job import Job

Standing = tuple[int, int, float]

_OVERDUE_PERIODS = 4

DECODE, START, ENCODE, DENOISE = 3, 2, 1, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Settings of the scheduler. Raises ValueError naming the setting that is out of range.

    max_batch_size: calls per forward pass, at most.
    max_live_jobs: jobs started and not finished, at most.
    reserved_jobs: live places kept for jobs that rank above all live ones; None is one in eight.
    memory_bytes: memory that one forward pass may take; None is no bound.
    order: "fair" is the policy; "fifo" is arrival order with the same batching, to compare with.
    fairness_slack_s: seconds by which an owner may lag behind its share before it goes before shorter jobs.
    fairness_sizes: the same in multiples of the longest job at hand; the greater one holds.
    ageing_s: seconds in the system that lift a job by one priority, at least.
    ageing_sizes: the same in multiples of the longest job at hand.
    bias: how strongly shorter jobs are preferred, 0 to 1.
    stickiness: factor on the rank of calls like the last one, against needless switching of weights.
    early_share: share of the time that starts and encode calls may take from running jobs.
    early_burst_s: seconds of it that may be taken at once.
    min_batch_gain: share of a lone call's time that each further member of a batch must save.
    """

    order: Literal["fair", "fifo"] = "fair"
    max_batch_size: int = 8
    max_live_jobs: int = 32
    reserved_jobs: int | None = None
    memory_bytes: int | None = None
    fairness_slack_s: float = 10.0
    fairness_sizes: float = 2.0
    ageing_s: float = 300.0
    ageing_sizes: float = 5.0
    bias: float = 0.8
    stickiness: float = 1.3
    early_share: float = 0.2
    early_burst_s: float = 0.5
    min_batch_gain: float = 0.15

    def __post_init__(self) -> None:
        for name, value in (("max_batch_size", self.max_batch_size), ("max_live_jobs", self.max_live_jobs)):
            if value < 1:
                raise ValueError(f"{name} {value}: must be at least 1.")
        if self.reserved_jobs is not None and not 0 <= self.reserved_jobs < self.max_live_jobs:
            raise ValueError(f"reserved_jobs {self.reserved_jobs}: must be from 0 to below {self.max_live_jobs}.")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ValueError(f"memory_bytes {self.memory_bytes}: must be at least 1.")
        for name, seconds in (("fairness_slack_s", self.fairness_slack_s), ("ageing_s", self.ageing_s)):
            if not seconds > 0:
                raise ValueError(f"{name} {seconds}: must be above 0.")
        for name, share in (
            ("bias", self.bias),
            ("early_share", self.early_share),
            ("min_batch_gain", self.min_batch_gain),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} {share}: must be between 0 and 1.")
        if not self.stickiness >= 1:
            raise ValueError(f"stickiness {self.stickiness}: must be at least 1.")
        for name, amount in (("ageing_sizes", self.ageing_sizes), ("early_burst_s", self.early_burst_s)):
            if not amount >= 0:
                raise ValueError(f"{name} {amount}: must not be negative.")

    @property
    def reserve(self) -> int:
        """Live places that only a job ranking above all live ones may take."""
        if self.reserved_jobs is not None:
            return self.reserved_jobs
        return 0 if self.max_live_jobs == 1 else max(1, self.max_live_jobs // 8)


class EarlyBudget:
    """Seconds that starts and encode calls may take ahead of their turn: a bucket filled by all other work."""

    def __init__(self, share: float, burst_s: float) -> None:
        self._share = share
        self._burst_s = burst_s
        self._left_s = burst_s

    def covers(self, seconds: float | None) -> bool:
        """True while the budget pays for a call this long; an unknown length is tried."""
        return self._left_s > 0 and (seconds is None or seconds <= self._left_s)

    def spend(self, seconds: float) -> None:
        self._left_s = max(-self._burst_s, self._left_s - seconds)

    def earn(self, seconds: float) -> None:
        """Other work ran for so long."""
        self._left_s = min(self._burst_s, self._left_s + self._share * seconds)


class Policy:
    """The comparison of jobs. `ageing_s` is common to all jobs at one moment, else ageing would not end starvation."""

    def __init__(self, config: SchedulerConfig, shares: FairShare) -> None:
        self._config = config
        self._shares = shares
        self.ageing_s = config.ageing_s

    def note_longest(self, size_s: float) -> None:
        """Set the ageing period and the owners' slack from the longest job at hand."""
        self.ageing_s = max(self._config.ageing_s, self._config.ageing_sizes * size_s)
        self._shares.slack_s = max(self._config.fairness_slack_s, self._config.fairness_sizes * size_s)

    def rate(self, job: Job, size_s: float, remaining_s: float) -> None:
        """Write the job's estimates down, with the part of its rank that only they decide."""
        job.remaining_s = max(remaining_s, 1e-4)
        job.size_s = max(size_s, 1e-4)
        job.urgency = job.remaining_s**-self._config.bias

    def standing(self, job: Job, now: float, top: int) -> Standing:
        """Return what jobs are compared by; `top` is the highest priority among those compared."""
        if self._config.order == "fifo":
            return 0, 0, -float(job.sequence)
        present_s = now - job.ticket.arrived_at
        age = int(present_s / self.ageing_s)
        level = max(job.priority, min(job.priority + age, top))
        return level, age // _OVERDUE_PERIODS, (1.0 + present_s / job.size_s) * job.urgency
