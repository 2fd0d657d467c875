"""What the host counts while it works: requests and jobs, in plain numbers on the event loop.

A request costs some dictionary look-ups here, without locks; how the numbers are shown is `server/metrics`'s.
Nothing is counted under a name that a client can invent.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence

from ..core.messages import Progress
from ..jobs.record import JobKind, JobState
from .live import LiveJob

REQUEST_BOUNDS_S = (0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)
JOB_BOUNDS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)

NO_ROUTE = "none"
"""Stands for the route of a request that reached no endpoint: an unknown path or method, a missing key."""
CLIENT_GONE = 499
"""Stands for the status of a request that ended without an answer."""


class Distribution:
    """How many values were at most each of the `bounds`, which rise; the last of `counts` is of those beyond all."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, num: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += num
        self.sum += value * num


class RequestTally:
    """Requests by route (its pattern, never the path), method and status, and the seconds to the end of the answer."""

    def __init__(self) -> None:
        self.num_active = 0
        self.num_ended: Counter[tuple[str, str, int]] = Counter()
        self.seconds: defaultdict[tuple[str, str], Distribution] = defaultdict(lambda: Distribution(REQUEST_BOUNDS_S))

    def began(self) -> None:
        self.num_active += 1

    def ended(self, route: str, method: str, status: int | None, seconds: float) -> None:
        self.num_active -= 1
        self.num_ended[route, method, CLIENT_GONE if status is None else status] += 1
        self.seconds[route, method].add(seconds)


class JobTally:
    """Jobs by kind: how many came, how they ended, how long they took, and the steps made for them."""

    def __init__(self) -> None:
        self.num_accepted: Counter[JobKind] = Counter()
        self.num_finished: Counter[tuple[JobKind, JobState]] = Counter()
        self.num_failures: Counter[tuple[JobKind, str]] = Counter()
        self.num_steps: Counter[JobKind] = Counter()
        self.seconds: defaultdict[JobKind, Distribution] = defaultdict(lambda: Distribution(JOB_BOUNDS_S))
        self.stage_seconds: defaultdict[tuple[JobKind, str], Distribution] = defaultdict(
            lambda: Distribution(JOB_BOUNDS_S)
        )

    def accepted(self, job: LiveJob) -> None:
        self.num_accepted[job.record.kind] += 1

    def progressed(self, job: LiveJob, progress: Progress) -> None:
        """Count the steps since the job's last report, which it still has. Steps made again on another worker were
        made, too."""
        before = 0 if job.progress is None else job.progress.step
        self.num_steps[job.record.kind] += progress.step - before if progress.step >= before else progress.step

    def ended(self, job: LiveJob, now: float) -> None:
        """The job is over here. One that is left to the next server has not ended."""
        kind, state = job.record.kind, job.record.state
        if not job.record.is_finished:
            if not job.is_unwanted:
                return
            state = "cancelled"  # deleted before it was done
        self.num_finished[kind, state] += 1
        if state == "failed":
            self.num_failures[kind, job.record.error_code or "unknown"] += 1
        if state == "completed":
            self.seconds[kind].add(now - job.began)
        job.stages.enter(None, now)
        for stage, seconds in job.stages.seconds.items():
            self.stage_seconds[kind, stage].add(seconds)
