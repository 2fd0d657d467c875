"""Stored files as HTTP answers: whole or in part, from whatever storage holds them."""

from __future__ import annotations

import re
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ..core.errors import NotFound, ServiceError
from ..jobs.record import JobRecord
from ..storage import Storage
from .problems import answer

_RANGE = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII | re.IGNORECASE)


class RangeNotSatisfiable(ServiceError):
    status = 416
    type = "invalid_request_error"
    code = "range_not_satisfiable"


async def file_answer(request: Request, record: JobRecord, storage: Storage) -> Response:
    """Return a completed job's file: 200, 206 for a range, 304 for a client that has it, 416 beyond its end.

    A file never changes once its job is completed, so its name serves as its tag. Raises NotFound when it is gone.
    """
    key, content_type = record.file_key, record.content_type
    if key is None or content_type is None:
        raise NotFound(f"'{record.job_id}' has no file.", code="file_not_found")
    try:
        size = await storage.size(key)
    except NotFound:
        raise NotFound(f"The file of '{record.job_id}' is gone.", code="file_not_found") from None
    etag = f'"{key}"'
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        "cache-control": "private, max-age=31536000, immutable",
        "content-disposition": f'inline; filename="{key}"',
        "x-content-type-options": "nosniff",
    }
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    start, end, status = 0, size, 200
    wanted = request.headers.get("range")
    if wanted is not None and request.headers.get("if-range", etag) == etag:
        span = _span(wanted, size)
        if isinstance(span, str):
            refusal = answer(RangeNotSatisfiable(f"Range {wanted[:60]!r} lies outside the file's {size} bytes."))
            refusal.headers["content-range"] = f"bytes */{size}"
            return refusal
        if span is not None:
            start, end = span
            status = 206
            headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=content_type)
    return StreamingResponse(storage.read(key, start, end), status, headers, content_type)


def _span(wanted: str, size: int) -> tuple[int, int] | Literal["unsatisfiable"] | None:
    """Return the first byte and the one after the last; None for a header that may be ignored (several ranges, or
    no range at all), ``unsatisfiable`` for one outside the file."""
    match = _RANGE.fullmatch(wanted.strip())
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.group(1), match.group(2)
    if first == "":
        length = min(int(last), size)
        return (size - length, size) if length else "unsatisfiable"
    start = int(first)
    if last != "" and int(last) < start:
        return None
    return (start, min(size, int(last) + 1 if last else size)) if start < size else "unsatisfiable"
