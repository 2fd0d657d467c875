"""Events that the ends of jobs owe to webhooks (`jobs/announce`), until they have arrived or are given up."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection, Delete, Update, delete, select, update

from .schema import deliveries
from .store import JobStore


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """An event on its way. `attempts` counts the tries that failed; `body` is sent as it stands."""

    event_id: str
    job_id: str
    url: str
    body: str
    attempts: int


class Outbox:
    """The events that are not delivered yet, in the job store's database."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def due(self, now: float, limit: int) -> tuple[Delivery, ...]:
        """Return up to `limit` events to be sent now, those that have waited longest first. Raises StorageFailed."""
        columns = [deliveries.c[name] for name in Delivery.__struct_fields__]
        query = select(*columns).where(deliveries.c.state == "waiting", deliveries.c.due_at <= now)
        query = query.order_by(deliveries.c.due_at, deliveries.c.position).limit(limit)

        def read(connection: Connection) -> tuple[Delivery, ...]:
            return tuple(Delivery(**row) for row in connection.execute(query).mappings())

        return await self._store.transact(read)

    async def delivered(self, delivery: Delivery) -> None:
        """Forget an event that has arrived."""
        await self._write(delete(deliveries).where(deliveries.c.event_id == delivery.event_id))

    async def put_off(self, delivery: Delivery, error: str, due_at: float | None) -> None:
        """Note that an event did not arrive, and when to try again; None: never, it stays in the table as ``dead``."""
        changes: dict[str, str | float] = {"state": "dead"} if due_at is None else {"due_at": due_at}
        statement = update(deliveries).where(deliveries.c.event_id == delivery.event_id)
        await self._write(statement.values(attempts=deliveries.c.attempts + 1, last_error=error, **changes))

    async def prune(self, before: float) -> None:
        """Forget the dead letters from before a time."""
        await self._write(delete(deliveries).where(deliveries.c.state == "dead", deliveries.c.created_at < before))

    async def _write(self, statement: Delete | Update) -> None:
        await self._store.transact(lambda connection: connection.execute(statement) and None)
