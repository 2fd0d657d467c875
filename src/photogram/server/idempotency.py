"""`Idempotency-Key`: how a request that is sent again is told from a new one.

The body counts as it was read, not as it was spelled: another boundary or order of fields is the same request.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import IO

import msgspec
from starlette.requests import Request

from ..core.errors import RequestError
from .body import Body
from .service import Idempotency

HEADER = "Idempotency-Key"
_KEY = re.compile(r"[ -~]{1,255}")
_CHUNK_BYTES = 1 << 20


async def idempotency_of(request: Request, body: Body) -> Idempotency | None:
    """Return the request's key with the digest of what it asks for; None without a key.

    To be called before anything is taken out of the body. Raises RequestError for a key that is none.
    """
    key = request.headers.get(HEADER)
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise RequestError(f"{HEADER}: must be 1 to 255 printable ASCII characters.", param=HEADER)
    return Idempotency(key=key, fingerprint=await asyncio.to_thread(_fingerprint, request.url.path, body))


def _fingerprint(path: str, body: Body) -> str:
    route = path.removeprefix("/v1")
    uploads = [(upload.name, _digest(upload.file)) for upload in body.uploads]
    return hashlib.sha256(msgspec.json.encode([route, body.fields, uploads], order="deterministic")).hexdigest()


def _digest(file: IO[bytes]) -> str:
    """Return the digest of an upload, and leave it at its start."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    file.seek(0)
    return digest.hexdigest()
