"""Work on the database in a thread of its own, so that the event loop never waits for a disk.

What is asked for while a transaction runs shares the next one: under load the disk is waited for once for many jobs,
and a client alone waits no longer than before.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError

from ..core.errors import Conflict, StorageFailed
from .schema import set_synchronous

Result = TypeVar("Result")

_MAX_TOGETHER = 64  # works in one transaction: the last one's answer waits for all of them


@dataclass(frozen=True, slots=True)
class _Asked:
    work: Callable[[Connection], Any]
    promise: bool
    done: Future[Any] = field(default_factory=Future)


class Transactions:
    """Runs works in the order in which they were asked for; each sees what those before it did, and is made or not made
    as a whole."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[_Asked] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="photogram-store")

    async def run(self, work: Callable[[Connection], Result], *, promise: bool = False) -> Result:
        """Return what `work` returns, once it is committed; with `promise`, once it is on the disk.

        A work may be run twice, of which the first is undone, so it must do nothing but to the database. Raises
        Conflict for a key that is there already, StorageFailed when the database fails or is closed, and what the work
        raises.
        """
        asked = _Asked(work, promise)
        self._waiting.append(asked)
        try:
            self._thread.submit(self._work_off)
        except RuntimeError as error:
            self._waiting.remove(asked)
            raise StorageFailed("the job store is closed, the server is stopping.") from error
        result: Result = await asyncio.wrap_future(asked.done)
        return result

    async def close(self) -> None:
        """Finish what was asked for and close the database."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.dispose)
        self._thread.shutdown(wait=True)

    def _work_off(self) -> None:
        together: list[_Asked] = []
        while self._waiting and len(together) < _MAX_TOGETHER:
            asked = self._waiting.popleft()
            if asked.done.set_running_or_notify_cancel():
                together.append(asked)
        if together and not self._committed(together):
            for asked in together:
                self._committed([asked])

    def _committed(self, together: Sequence[_Asked]) -> bool:
        """Run the works in one transaction and answer them. False, with nothing done, when one of several failed."""
        try:
            with self._engine.connect() as connection:
                set_synchronous(connection, promise=any(asked.promise for asked in together))
                try:
                    results = [asked.work(connection) for asked in together]
                except Exception:
                    if len(together) > 1:
                        return False
                    raise
                try:
                    connection.commit()
                except Exception:
                    # Else the pool would keep the connection with the transaction open, for the next one to commit.
                    connection.invalidate()
                    raise
        except Exception as error:
            for asked in together:
                asked.done.set_exception(_told(error))
            return True
        for asked, result in zip(together, results, strict=True):
            asked.done.set_result(result)
        return True


def _told(error: Exception) -> Exception:
    """Return what the caller is told of a failure."""
    told: Exception = error
    if isinstance(error, IntegrityError):
        told = Conflict(f"the job exists already, or its idempotency key was used ({error.orig}).")
    elif isinstance(error, DBAPIError):
        told = StorageFailed(f"the job store failed: {error.orig}.")
    elif isinstance(error, msgspec.MsgspecError):
        told = StorageFailed(f"the job store holds a job that cannot be read: {error}.")
    if told is not error:
        told.__cause__ = error
    return told
