"""Work on the database in a thread of its own, so that the event loop never waits for a disk.

What is asked for while a transaction runs shares the next one: under load the disk is waited for once for many jobs,
and a client alone waits no longer than before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
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
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Any]


class Transactions:
    """Runs works in the order in which they were asked for; each sees what those before it did, and is made or not made
    as a whole."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Taken and kept by the thread: checking out anew costs as much as a small transaction.
        self._connection: Connection | None = None
        self._waiting: SimpleQueue[_Asked | None] = SimpleQueue()  # None: the end
        self._closed = False
        self._thread = Thread(target=self._work_off, name="photogram-store", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[Connection], Result], *, promise: bool = False) -> Result:
        """Return what `work` returns, once it is committed; with `promise`, once it is on the disk.

        A work may be run twice, of which the first is undone, so it must do nothing but to the database. Raises
        Conflict for a key that is there already, StorageFailed when the database fails or is closed, and what the work
        raises.
        """
        if self._closed:
            raise StorageFailed("the job store is closed, the server is stopping.")
        loop = asyncio.get_running_loop()
        asked = _Asked(work, promise, loop, loop.create_future())
        self._waiting.put(asked)
        result: Result = await asked.done
        return result

    async def close(self) -> None:
        """Finish what was asked for and close the database."""
        self._closed = True
        self._waiting.put(None)
        await asyncio.to_thread(self._thread.join)

    # --- in the thread

    def _work_off(self) -> None:
        is_end = False
        while not is_end:
            together: list[_Asked] = []
            asked = self._waiting.get()
            while asked is not None:
                if not asked.done.cancelled():
                    together.append(asked)
                if len(together) == _MAX_TOGETHER:
                    break
                try:
                    asked = self._waiting.get_nowait()
                except Empty:
                    break
            else:
                is_end = True
            if together:
                self._make(together)
        self._let_go()
        self._engine.dispose()

    def _make(self, together: Sequence[_Asked]) -> None:
        answers = self._committed(together)
        if answers is None:
            answers = []
            for asked in together:
                answers += self._committed([asked]) or ()
        loops = {asked.loop for asked in together}
        for loop in loops:
            those = [answer for asked, answer in zip(together, answers, strict=True) if asked.loop is loop]
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(_tell, those)

    def _committed(self, together: Sequence[_Asked]) -> list[_Answer] | None:
        """Run the works in one transaction and return their answers; None, with nothing done, when one of several
        failed."""
        try:
            connection = self._connected()
            connection.begin()
            set_synchronous(connection, promise=any(asked.promise for asked in together))
            try:
                results = [asked.work(connection) for asked in together]
            except Exception:
                connection.rollback()
                if len(together) > 1:
                    return None
                raise
            try:
                connection.commit()
            except Exception:
                # Else the transaction would stay open, for the next one to commit.
                connection.invalidate()
                raise
        except Exception as error:
            self._let_go()
            told = _told(error)
            return [_Answer(asked.done, None, told) for asked in together]
        return [_Answer(asked.done, result, None) for asked, result in zip(together, results, strict=True)]

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = self._engine.connect()
        return self._connection

    def _let_go(self) -> None:
        """Give the connection back to the pool, which makes a new one where it is lost."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(DBAPIError):
                connection.close()


@dataclass(frozen=True, slots=True)
class _Answer:
    done: asyncio.Future[Any]
    result: Any
    error: Exception | None


def _tell(answers: Sequence[_Answer]) -> None:
    """Answer the callers that still wait; on their event loop."""
    for answer in answers:
        if answer.done.done():
            continue
        if answer.error is None:
            answer.done.set_result(answer.result)
        else:
            answer.done.set_exception(answer.error)


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
