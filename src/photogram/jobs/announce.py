"""What the end of a job owes to others: events for a webhook, written in the transaction that ends the job.

So no end is ever without its event, nor an event without its end. `jobs/outbox` keeps the events until
`server/webhooks` has sent them.
"""

from __future__ import annotations

import secrets

import msgspec
from sqlalchemy import Connection, insert

from .record import JobRecord
from .schema import deliveries


def announce(connection: Connection, record: JobRecord) -> None:
    """Queue the event of a finished job whose request or server named a webhook."""
    if record.webhook_url is None or record.finished_at is None:
        return
    event_id = f"evt_{secrets.token_hex(16)}"
    event = {
        "id": event_id,
        "object": "event",
        "created_at": int(record.finished_at),
        "type": f"{record.kind}.{'completed' if record.state == 'completed' else 'failed'}",
        "data": {"id": record.job_id},
    }
    row = {
        "event_id": event_id,
        "job_id": record.job_id,
        "url": record.webhook_url,
        "body": msgspec.json.encode(event).decode(),
        "created_at": record.finished_at,
        "state": "waiting",
        "attempts": 0,
        "due_at": record.finished_at,
    }
    connection.execute(insert(deliveries), row)
