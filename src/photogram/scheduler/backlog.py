"""The jobs that wait to be started, many thousands if need be, in an order that costs no call its time.

Jobs of one owner, one priority and about one size (a factor of two) rank by arrival, so they stand in one line and
only the heads of the lines compete. Of the heads, a short list of the best is kept; newcomers at the head of a line
join it at once, and the rest are looked at again at intervals that grow with their number.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from .job import Job

_SHORTLIST = 16
_SECONDS_PER_HEAD = 20e-6  # a look at a head takes about 1 us, so looking takes at most a twentieth of the time

Line = tuple[str, int, int]


class Backlog:
    """Lines of queued jobs. `add` and `remove` are O(1); `shortlist` is O(lines), spread over time as above."""

    def __init__(self) -> None:
        self._lines: dict[Line, OrderedDict[str, Job]] = {}
        self._line_of: dict[str, Line] = {}
        self._best: dict[str, Job] = {}
        self._scanned_at = -math.inf

    def __len__(self) -> int:
        return len(self._line_of)

    def add(self, job: Job) -> None:
        """Queue a job whose `size_s` was estimated."""
        line = (job.owner.name, job.priority, math.frexp(job.size_s)[1])
        self._line_of[job.ticket.job_id] = line
        waiting = self._lines.get(line)
        if waiting is None:
            self._lines[line] = OrderedDict({job.ticket.job_id: job})
            self._best[job.ticket.job_id] = job
        else:
            waiting[job.ticket.job_id] = job

    def remove(self, job: Job) -> None:
        """Take a queued job out; the next in its line becomes a candidate."""
        job_id = job.ticket.job_id
        line = self._line_of.pop(job_id)
        waiting = self._lines[line]
        del waiting[job_id]
        was_listed = self._best.pop(job_id, None) is not None
        if not waiting:
            del self._lines[line]
        elif was_listed:
            head = next(iter(waiting.values()))
            self._best[head.ticket.job_id] = head

    def shortlist(self, now: float, *orders: Callable[[Job], Any]) -> list[Job]:
        """Return the candidates to start next, a few dozen at most: the best heads by each order."""
        due = now - self._scanned_at >= _SECONDS_PER_HEAD * len(self._lines)
        if (due and len(self._best) < len(self._lines)) or (not self._best and self._lines):
            self._keep_best([next(iter(line.values())) for line in self._lines.values()], orders)
            self._scanned_at = now
        elif len(self._best) > 2 * _SHORTLIST:
            self._keep_best(list(self._best.values()), orders)
        return list(self._best.values())

    def lines(self) -> Iterator[tuple[Job, Job, int]]:
        """Give (head, last, number of jobs) of every line."""
        for line in self._lines.values():
            yield next(iter(line.values())), next(reversed(line.values())), len(line)

    def is_in_line_of(self, job: Job, head: Job) -> bool:
        """True if both stand in one line."""
        return self._line_of.get(job.ticket.job_id) == self._line_of[head.ticket.job_id]

    def _keep_best(self, heads: list[Job], orders: tuple[Callable[[Job], Any], ...]) -> None:
        self._best = {
            job.ticket.job_id: job
            for order in orders
            for job in heapq.nlargest(_SHORTLIST // len(orders), heads, key=order)
        }
