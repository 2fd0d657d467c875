"""Stored files as HTTP answers: found by their ids alone, whole or in part, from whatever storage holds them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import IO, Literal

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ..core.errors import NotFound, ServiceError
from ..jobs.record import JobKind, JobRecord
from ..jobs.store import JobStore
from ..storage import Storage
from .forms import SPOOL_BYTES
from .problems import answer

_RANGE = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII | re.IGNORECASE)


class RangeNotSatisfiable(ServiceError):
    status = 416
    type = "invalid_request_error"
    code = "range_not_satisfiable"


async def finished_image(store: JobStore, image_id: str, owner: str, variant: int | None) -> JobRecord:
    """Return the record of a picture that can be fetched: `image_id`, or the `variant`-th of its request.

    Raises NotFound for an unknown id, another owner's picture, and one that is not or will never be there.
    """
    record = await _owned(store, image_id, owner, "image")
    if variant is not None and variant != record.index:
        group = await store.group(record.group_id)
        of_index = {one.index: one for one in group}
        if variant not in of_index:
            raise NotFound(f"Image '{image_id}' has no variant {variant}.", param="variant", code="image_not_found")
        record = of_index[variant]
    if record.state == "failed":
        raise NotFound(f"Image '{record.job_id}' failed: {record.error_message}", code="image_failed")
    if record.state == "cancelled":
        raise NotFound(f"Image '{record.job_id}' was cancelled.", code="image_cancelled")
    if record.state != "completed":
        raise NotFound(f"Image '{record.job_id}' is not ready: it is {record.state}.", code="image_not_ready")
    return record


async def owned_video(store: JobStore, video_id: str, owner: str) -> JobRecord:
    """Return the record of a clip, whatever its state. Raises NotFound for an unknown id and another owner's clip."""
    return await _owned(store, video_id, owner, "video")


async def _owned(store: JobStore, job_id: str, owner: str, kind: JobKind) -> JobRecord:
    unknown = NotFound(f"No {kind} {job_id[:100]!r}.", param=f"{kind}_id", code=f"{kind}_not_found")
    try:
        record = await store.get(job_id)
    except NotFound:
        raise unknown from None
    if record.owner != owner or record.kind != kind:
        raise unknown
    return record


async def finished_video(store: JobStore, video_id: str, owner: str) -> JobRecord:
    """Return the record of a clip that can be fetched. Raises NotFound, also where it is not or will never be there."""
    record = await owned_video(store, video_id, owner)
    if record.state == "failed":
        raise NotFound(f"Video '{video_id}' failed: {record.error_message}", code="video_failed")
    if record.state == "cancelled":
        raise NotFound(f"Video '{video_id}' was cancelled.", code="video_failed")
    if record.state != "completed":
        raise NotFound(f"Video '{video_id}' is not ready: it is {record.state}.", code="video_not_ready")
    return record


async def stored_bytes(record: JobRecord, storage: Storage) -> bytes:
    """Return a completed job's whole file. Raises NotFound when it is gone."""
    if record.file_key is None:
        raise NotFound(f"'{record.job_id}' has no file.", code="file_not_found")
    return b"".join([chunk async for chunk in storage.read(record.file_key)])


async def open_content(store: JobStore, storage: Storage, content_id: str, owner: str) -> IO[bytes]:
    """Open a copy of a finished picture or clip of this owner; the caller closes it. Raises NotFound."""
    try:
        record = await store.get(content_id)
    except NotFound:
        record = None
    if record is None or record.owner != owner or record.state != "completed" or record.file_key is None:
        raise NotFound(f"no finished picture or clip {content_id[:100]!r}.", code="content_not_found")
    copy = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - the caller's
    try:
        async for chunk in storage.read(record.file_key):
            copy.write(chunk)
    except BaseException:
        copy.close()
        raise
    return copy


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
    return _ranged(request, key, size, content_type, lambda start, end: storage.read(key, start, end))


def data_answer(request: Request, data: bytes, name: str, content_type: str) -> Response:
    """Return what was made of a file that never changes, under a name of its own, as `file_answer` returns files."""

    async def read(start: int, end: int) -> AsyncIterator[bytes]:
        yield data[start:end]

    return _ranged(request, name, len(data), content_type, read)


def _ranged(
    request: Request, name: str, size: int, content_type: str, read: Callable[[int, int], AsyncIterator[bytes]]
) -> Response:
    etag = f'"{name}"'
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        "cache-control": "private, max-age=31536000, immutable",
        "content-disposition": f'inline; filename="{name}"',
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
    return StreamingResponse(read(start, end), status, headers, content_type)


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
