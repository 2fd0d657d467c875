"""Unfinished jobs in memory: how far each is, and who wants to hear of it.

A job has any number of followers: the open requests that wait for pictures, the streams of events of a clip. None of
them owns the job. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from ..core.errors import JOB_ERRORS, GenerationFailed, ServiceError
from ..core.messages import Failed, Finished, JobEvent, Progress
from ..core.stage_clock import StageClock
from ..jobs.record import JobRecord, JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """A picture of unfinished work; `number` counts them for one job, from 0."""

    index: int
    number: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    index: int
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """The job has reached a state; `record` is how it is now."""

    record: JobRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A finished picture, which is stored already. `data` is the file's bytes."""

    index: int
    image_id: str
    seed: int
    generated_size: str
    data: bytes
    prompt_tokens: int
    image_tokens: int
    warnings: tuple[str, ...]


Outcome = Partial | Stepped | Moved | Made
Follower = Callable[[Outcome | ServiceError], None]
"""Hears what happens to a job. After a `Moved` to a final state, a `Made` or an error nothing more comes of worth."""


def made(record: JobRecord, data: bytes) -> Made:
    """Return what a completed picture's request is answered with."""
    return Made(
        index=record.index,
        image_id=record.job_id,
        seed=record.request.seed,
        generated_size=f"{record.request.width}x{record.request.height}",
        data=data,
        prompt_tokens=record.prompt_tokens or 0,
        image_tokens=record.image_tokens or 0,
        warnings=record.warnings,
    )


def job_error(code: str, message: str, param: str | None = None) -> ServiceError:
    """Return the error that a failed job's client gets."""
    return JOB_ERRORS.get(code, GenerationFailed)(message, param=param, code=code)


class LiveJob:
    """One job from its acceptance, or from the server's start, to its end here.

    Once it is `halted` it is not to be finished here, for it `is_unwanted` (and perhaps `is_deleted`: its row goes,
    too) or is left to the next server.
    """

    def __init__(self, record: JobRecord, began: float) -> None:
        self.record = record
        self.began = began
        self.progress: Progress | None = None
        self.stages = StageClock()  # the worker's phases, what comes before them, and the making of the file
        self.stages.enter("queued", began)
        self.num_previews = 0
        self.unwritten: dict[str, Any] = {}  # by column, of a job whose row says nothing between its two ends
        self.is_unwanted = False
        self.is_deleted = False
        self.halted = asyncio.Event()
        self.in_engine = False  # from its submission to the engine's last word on it
        self._events: asyncio.Queue[JobEvent] = asyncio.Queue()
        self._followers: dict[Follower, None] = {}
        self._over = asyncio.Event()

    @property
    def job_id(self) -> str:
        return self.record.job_id

    @property
    def is_followed(self) -> bool:
        return bool(self._followers)

    def listen(self, event: JobEvent) -> None:
        """The engine's listener."""
        self._events.put_nowait(event)

    async def next_event(self) -> JobEvent:
        event = await self._events.get()
        self.in_engine = not isinstance(event, Finished | Failed)
        return event

    def step(self, progress: Progress) -> None:
        """Note and tell how far the job is. Begun again on another worker it is not further back than it was."""
        if self.progress is not None and progress.fraction < self.progress.fraction:
            progress = msgspec.structs.replace(progress, fraction=self.progress.fraction)
        self.progress = progress
        self.tell(Stepped(index=self.record.index, progress=progress))

    def move(self, record: JobRecord) -> None:
        self.record = record
        self.tell(Moved(record=record))

    def pass_through(self, to: JobState, known: Mapping[str, Any]) -> None:
        """Be in a state that is not written, with what became known, which its row is told with its end."""
        self.unwritten.update(known)
        changes = dict(known)
        if to == "running":
            self.unwritten["started_at"] = changes["started_at"] = time.time()
            changes["attempts"] = self.record.attempts + 1
        self.move(msgspec.structs.replace(self.record, state=to, **changes))

    def tell(self, outcome: Outcome | ServiceError) -> None:
        for follower in list(self._followers):
            follower(outcome)

    def halt(self, *, is_unwanted: bool, is_deleted: bool = False) -> None:
        """Say that the job is not to go on here. Its attendant notices at its next event."""
        self.is_unwanted |= is_unwanted
        self.is_deleted |= is_deleted
        self.halted.set()

    def end(self) -> None:
        """The job is over here: it has a final state, or the next server has it."""
        self._over.set()

    async def wait_over(self) -> None:
        await self._over.wait()

    def follow(self, follower: Follower) -> None:
        self._followers[follower] = None

    def unfollow(self, follower: Follower) -> None:
        self._followers.pop(follower, None)

    @contextmanager
    def followed(self) -> Iterator[AsyncIterator[Outcome]]:
        """What happens from now on, to the final state. Raises the ServiceError of an end that is none for the row."""
        heard: asyncio.Queue[Outcome | ServiceError] = asyncio.Queue()
        self.follow(heard.put_nowait)
        try:
            yield _until_final(heard)
        finally:
            self.unfollow(heard.put_nowait)


async def _until_final(heard: asyncio.Queue[Outcome | ServiceError]) -> AsyncIterator[Outcome]:
    while True:
        outcome = await heard.get()
        if isinstance(outcome, ServiceError):
            raise outcome
        yield outcome
        if isinstance(outcome, Moved) and outcome.record.is_finished:
            return
