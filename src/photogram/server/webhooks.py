"""Tells webhooks how clips ended: signed, tried again with growing pauses, and never to an address of this network.

The events come from a durable outbox, so a restart loses none; one may arrive twice, with the same `webhook-id`. The
signature is that of the Standard Webhooks (HMAC-SHA256 of id, time and body), which OpenAI's SDKs verify.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from ..core.errors import ServiceError, StorageFailed
from ..jobs.outbox import Delivery, Outbox
from ..net.client import Answer

log = logging.getLogger(__name__)

TIMEOUT_S = 15.0
PAUSES_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0)
"""Before each further try; after the last one the event is given up."""
DEAD_LETTERS_S = 30 * 86400.0
"""How long the outbox keeps an event that was given up."""
_LOOK_EVERY_S = 0.5
_AT_ONCE = 16
_GONE = 410


class Poster(Protocol):
    """`Outbound` (net/client.py)."""

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, param: str, timeout_s: float
    ) -> Answer: ...


class Webhooks:
    """Empties the outbox; `run` until cancelled."""

    def __init__(
        self,
        outbox: Outbox,
        outbound: Poster,
        key: bytes | None,
        *,
        pauses_s: tuple[float, ...] = PAUSES_S,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Without a `key` events are sent unsigned."""
        self._outbox = outbox
        self._outbound = outbound
        self._key = key
        self._pauses_s = pauses_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._sending: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        await self._forget_dead_letters()
        try:
            while True:
                await self._begin_due()
                await asyncio.sleep(_LOOK_EVERY_S)
        finally:
            for task in list(self._sending.values()):
                task.cancel()

    async def _begin_due(self) -> None:
        """Begin to send what is due; a receiver that is slow holds up only its own events."""
        try:
            due = await self._outbox.due(self._clock(), _AT_ONCE)
        except StorageFailed as error:
            log.warning("webhooks wait for the job store: %s", error.message)
            return
        for delivery in due:
            if delivery.event_id not in self._sending and len(self._sending) < _AT_ONCE:
                task = asyncio.create_task(self._deliver(delivery))
                self._sending[delivery.event_id] = task

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            await self._note(delivery, await self._send(delivery))
        except StorageFailed as error:
            # Its row still says that it is due: the receiver hears it again, under the same id.
            log.warning("event %s: what became of it could not be written: %s", delivery.event_id, error.message)
        finally:
            del self._sending[delivery.event_id]

    async def _note(self, delivery: Delivery, refusal: tuple[str, bool] | None) -> None:
        if refusal is None:
            log.info("event %s of job %s was delivered", delivery.event_id, delivery.job_id)
            await self._outbox.delivered(delivery)
            return
        reason, is_final = refusal
        if is_final or delivery.attempts >= len(self._pauses_s):
            tries = delivery.attempts + 1
            log.error(
                "event %s of job %s is given up after %d tries: %s", delivery.event_id, delivery.job_id, tries, reason
            )
            await self._outbox.put_off(delivery, reason, None)
            return
        pause_s = self._pauses_s[delivery.attempts]
        log.warning("event %s of job %s: %s; next try in %g s", delivery.event_id, delivery.job_id, reason, pause_s)
        await self._outbox.put_off(delivery, reason, self._clock() + pause_s)

    async def _send(self, delivery: Delivery) -> tuple[str, bool] | None:
        """Post an event; return why it did not arrive, and whether it never will. A redirect is not followed."""
        body = delivery.body.encode()
        headers = {"content-type": "application/json", **signed(delivery.event_id, body, self._key, self._clock())}
        try:
            answer = await self._outbound.post(
                delivery.url, body, headers, param="webhook_url", timeout_s=self._timeout_s
            )
        except ServiceError as error:
            return error.message, False
        if 200 <= answer.status < 300:
            return None
        return f"the webhook answered {answer.status}", answer.status == _GONE

    async def _forget_dead_letters(self) -> None:
        try:
            await self._outbox.prune(self._clock() - DEAD_LETTERS_S)
        except StorageFailed as error:
            log.warning("old undelivered events were not removed: %s", error.message)


def signed(event_id: str, body: bytes, key: bytes | None, now: float) -> dict[str, str]:
    """Return the headers that tell an event apart, and prove whose it is where there is a key."""
    timestamp = str(int(now))
    headers = {"webhook-id": event_id, "webhook-timestamp": timestamp}
    if key is not None:
        content = f"{event_id}.{timestamp}.".encode() + body
        digest = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
        headers["webhook-signature"] = f"v1,{digest}"
    return headers
