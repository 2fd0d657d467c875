"""The pictures of one request, for the one who waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from ..core.errors import ServiceError
from .live import LiveJob, Made, Moved, Outcome


class Group:
    """What happens to the jobs of one call, until each has its picture.

    Several groups may follow the same jobs: a request that is repeated under its idempotency key waits beside the
    first. `done` are pictures that were finished before.
    """

    def __init__(
        self, jobs: Sequence[LiveJob], give_up: Callable[[LiveJob], None], *, done: Sequence[Made] = ()
    ) -> None:
        self._jobs = jobs
        self._give_up = give_up
        self._num_awaited = len(jobs) + len(done)
        self._outcomes: asyncio.Queue[Outcome | ServiceError] = asyncio.Queue()
        for picture in done:
            self._outcomes.put_nowait(picture)
        for job in jobs:
            job.follow(self._outcomes.put_nowait)

    def leave(self) -> None:
        """Wait no longer, and give up the jobs that were made for this client alone. Harmless when all are done."""
        for job in self._jobs:
            job.unfollow(self._outcomes.put_nowait)
            if not job.record.outlives_client:
                self._give_up(job)

    async def outcomes(self) -> AsyncIterator[Outcome]:
        """Yield what happens until each job has its `Made`. Raises the ServiceError of the first that fails."""
        num_made = 0
        while num_made < self._num_awaited:
            outcome = await self._outcomes.get()
            if isinstance(outcome, ServiceError):
                raise outcome
            if isinstance(outcome, Moved):
                continue
            num_made += isinstance(outcome, Made)
            yield outcome

    async def all_made(self) -> list[Made]:
        """Return the pictures in the order of their seeds. Raises the ServiceError of the first that fails."""
        made = [outcome async for outcome in self.outcomes() if isinstance(outcome, Made)]
        return sorted(made, key=lambda one: one.index)
