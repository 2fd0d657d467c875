"""Bodies: JSON, multipart or urlencoded, and the query string, as one plain object plus the uploaded files.

Knows nothing of which fields there are. A body is refused as soon as it is over its bound, before it is in memory.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import parse_qsl

import msgspec
from starlette.requests import Request

from ..core.errors import RequestError, ServiceError, TooLarge
from ..core.request import JSONValue
from .fields import shown
from .forms import BodyLimits, Pairs, Upload, nest, read_multipart

MAX_FIELDS = 512
ENVELOPES = ("extra_body", "extra_params", "extra_json", "extra_args")
"""Objects, or JSON texts of objects, whose fields count as fields of the body."""
# Azure's clients add it to every request.
_MEANINGLESS_QUERY = frozenset({"api-version"})


class SlowBody(ServiceError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    should_retry = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """What a request says. `shadowed` names query fields and envelope fields that the body says otherwise.

    A context manager, which closes the uploads.
    """

    fields: dict[str, JSONValue]
    uploads: tuple[Upload, ...] = ()
    shadowed: tuple[str, ...] = ()

    def __enter__(self) -> Body:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for upload in self.uploads:
            upload.file.close()


async def read_body(request: Request, limits: BodyLimits) -> Body:
    """Return the request's body merged with its query string.

    Raises RequestError for what is no object, TooLarge beyond the limits, SlowBody for a client that stops sending.
    """
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    uploads: tuple[Upload, ...] = ()
    if kind == "multipart/form-data":
        total = limits.body_bytes + limits.num_uploads * limits.upload_bytes
        _refuse_announced(request, total)
        pairs, uploads = await read_multipart(content_type, _chunks(request, limits, total), limits)
    try:
        if kind == "multipart/form-data":
            fields = nest(pairs)
        else:
            _refuse_announced(request, limits.body_bytes)
            data = b"".join([chunk async for chunk in _chunks(request, limits, limits.body_bytes)])
            fields = parse_plain(data, is_form=kind == "application/x-www-form-urlencoded")
        shadowed = _merge_query(fields, request.scope["query_string"]) + open_envelopes(fields)
    except BaseException:
        for upload in uploads:
            upload.file.close()
        raise
    return Body(fields=fields, uploads=uploads, shadowed=tuple(shadowed))


def parse_plain(data: bytes, *, is_form: bool) -> dict[str, JSONValue]:
    """Return a JSON or urlencoded body as an object. An empty one is an empty object.

    A body that says it is a form but starts like a JSON object is read as JSON: curl's ``-d '{...}'`` says so.
    """
    stripped = data.strip()
    if not stripped:
        return {}
    if is_form and not stripped.startswith((b"{", b"[")):
        return nest(_pairs(stripped, "body"))
    return _object(stripped.removeprefix(b"\xef\xbb\xbf"), "The body")


def open_envelopes(fields: dict[str, JSONValue]) -> list[str]:
    """Move the fields of ``extra_body`` and its like to the top; what the body says itself stays.

    Returns the names of the fields that were said otherwise. Raises RequestError for an envelope that is no object.
    """
    shadowed: list[str] = []
    for envelope in ENVELOPES:
        inside = fields.pop(envelope, None)
        if isinstance(inside, str):
            inside = _object(inside.encode("utf-8", "replace"), f"'{envelope}'", envelope) if inside.strip() else None
        if inside is None:
            continue
        if not isinstance(inside, dict):
            raise RequestError(f"'{envelope}' must be an object, not {shown(inside)}.", param=envelope)
        for name, value in inside.items():
            if fields.get(name) is None:
                fields[name] = value
            elif fields[name] != value:
                shadowed.append(name)
    return shadowed


def _object(data: bytes, what: str, param: str | None = None) -> dict[str, JSONValue]:
    try:
        value = msgspec.json.decode(data)
    except RecursionError:
        raise RequestError(f"{what} is nested too deeply.", param=param, code="invalid_json") from None
    except UnicodeDecodeError:
        raise RequestError(f"{what} is not valid UTF-8.", param=param, code="invalid_json") from None
    except msgspec.MsgspecError as error:
        raise RequestError(f"{what} is not valid JSON: {_reason(error)}.", param=param, code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(f"{what} must be a JSON object, not {shown(value)}.", param=param, code="invalid_json")
    return value


def _reason(error: msgspec.MsgspecError) -> str:
    text = str(error).removeprefix("JSON is malformed: ").rstrip(".")
    return re.sub(r"[^\x20-\x7e]", "?", text)


def _pairs(data: bytes, what: str) -> Pairs:
    try:
        text = data.decode()
        return parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except UnicodeError:
        raise RequestError(f"The {what} is not valid percent-encoded UTF-8.") from None
    except ValueError:
        raise RequestError(f"The {what} has too many fields; at most {MAX_FIELDS} are allowed.") from None


def _merge_query(fields: dict[str, JSONValue], query: bytes) -> list[str]:
    shadowed: list[str] = []
    pairs = [pair for pair in _pairs(query, "query string") if pair[0] not in _MEANINGLESS_QUERY]
    for name, value in nest(pairs).items():
        if fields.get(name) is None:
            fields[name] = value
        elif fields[name] != value:
            shadowed.append(name)
    return shadowed


def _refuse_announced(request: Request, limit: int) -> None:
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise TooLarge(f"The body has {length[:20]} bytes; at most {limit} are allowed.")


async def _chunks(request: Request, limits: BodyLimits, limit: int) -> AsyncIterator[bytes]:
    """Yield the body, at most `limit` bytes of it."""
    received = 0
    more = True
    began = time.monotonic()
    while more:
        # The longest gap, and the slowest rate: one byte at a time would else last for ever.
        left_s = limits.chunk_gap_s + received / limits.bytes_per_s - (time.monotonic() - began)
        try:
            async with asyncio.timeout(min(limits.chunk_gap_s, left_s)):
                message = await request.receive()
        except TimeoutError:
            raise SlowBody(
                f"The body came too slowly: nothing for {limits.chunk_gap_s:g} s, or less than "
                f"{limits.bytes_per_s:g} bytes a second."
            ) from None
        if message["type"] == "http.disconnect":
            raise RequestError("The client went away while sending the body.")
        chunk, more = message.get("body", b""), message.get("more_body", False)
        received += len(chunk)
        if received > limit:
            raise TooLarge(f"The body exceeds {limit} bytes.")
        yield chunk
