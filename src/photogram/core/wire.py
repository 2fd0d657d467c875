"""Messages as bytes: a four-byte big-endian length, then msgpack."""

from __future__ import annotations

import msgspec

from .messages import ToHost, ToWorker

HEADER_BYTES = 4
MAX_MESSAGE_BYTES = 64 << 20

_encoder = msgspec.msgpack.Encoder()
to_worker = msgspec.msgpack.Decoder(ToWorker)
to_host = msgspec.msgpack.Decoder(ToHost)


def pack(message: ToWorker | ToHost) -> bytes:
    """Return the message as one frame. Raises ValueError beyond 64 MiB."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def body_length(header: bytes) -> int:
    """Return how many bytes follow a header. Raises ValueError for a length no message has."""
    length = int.from_bytes(header, "big")
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    return length
