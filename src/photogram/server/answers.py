"""Structs as HTTP answers, and texts as header values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from starlette.responses import Response

MAX_HEADER = 1000


def json_answer(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, headers=headers, media_type="application/json")


def header_text(texts: Iterable[str], separator: str = ", ") -> str:
    """Return texts of clients as one header value: printable ASCII, of bounded length."""
    joined = separator.join(texts)
    plain = "".join(letter if " " <= letter <= "~" else "?" for letter in joined[: MAX_HEADER + 1])
    return plain if len(plain) <= MAX_HEADER else plain[: MAX_HEADER - 3] + "..."
