"""Forms: multipart parts read from a stream within bounds, and flat names such as ``a[b]`` as nested values.

Knows nothing of HTTP requests or of what the fields mean.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ..core.errors import RequestError, StorageFailed, TooLarge
from ..core.request import JSONValue

MAX_NESTING = 4
# Uploads beyond this go to a temporary file.
SPOOL_BYTES = 1 << 20
# OpenAI's SDK sends an image given as (None, bytes) as a part without a file name.
_PICTURE_NAMES = ("image", "mask", "input_reference", "video")


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """Bounds of one request body. `body_bytes` holds for JSON and urlencoded bodies and for all texts of a form."""

    body_bytes: int = 32 << 20
    upload_bytes: int = 50_000_000
    num_uploads: int = 17
    num_parts: int = 512
    chunk_gap_s: float = 60.0
    bytes_per_s: float = 10_000.0  # on the average, after the first `chunk_gap_s` seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file part. Whoever holds it closes `file`, which stands at its start."""

    name: str
    filename: str | None
    content_type: str | None
    file: IO[bytes]
    size_bytes: int


Pairs = list[tuple[str, str]]


@dataclass(slots=True)
class _Part:
    name: str
    filename: str | None
    content_type: str | None
    file: IO[bytes]
    size_bytes: int = 0


@dataclass(slots=True)
class _Reader:
    """Collects the parser's callbacks into texts and uploads; refuses a part as soon as it is over its bound."""

    limits: BodyLimits
    texts: Pairs = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)
    ended: bool = False
    _headers: dict[str, bytes] = field(default_factory=dict)
    _header_name: bytearray = field(default_factory=bytearray)
    _header_value: bytearray = field(default_factory=bytearray)
    _part: _Part | None = None
    _num_parts: int = 0
    _text_bytes: int = 0

    def parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def close(self) -> None:
        for upload in self.uploads:
            upload.file.close()
        if self._part is not None:
            self._part.file.close()

    def _part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > self.limits.num_parts:
            raise RequestError(f"The form has too many parts; at most {self.limits.num_parts} are allowed.")
        self._headers = {}

    def _header_end(self) -> None:
        self._headers[bytes(self._header_name).lower().decode("latin-1")] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        if b"name" not in options:
            raise RequestError("A part of the form has no name.")
        name = options[b"name"].decode("utf-8", "replace")
        filename = options.get(b"filename")
        if filename is not None and len(self.uploads) >= self.limits.num_uploads:
            raise RequestError(f"Too many files; at most {self.limits.num_uploads} are allowed.", param=name)
        content_type = self._headers.get("content-type")
        self._part = _Part(
            name=name,
            filename=None if filename is None else filename.decode("utf-8", "replace"),
            content_type=None if content_type is None else content_type.decode("latin-1"),
            file=tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES),  # noqa: SIM115 - closed with its part
        )

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        assert part is not None
        part.size_bytes += end - start
        if part.filename is None:
            self._text_bytes += end - start
            if self._text_bytes > self.limits.body_bytes:
                raise TooLarge(f"The texts of the form exceed {self.limits.body_bytes} bytes.", param=part.name)
        elif part.size_bytes > self.limits.upload_bytes:
            raise TooLarge(f"'{part.name}' exceeds {self.limits.upload_bytes} bytes.", param=part.name)
        try:
            part.file.write(data[start:end])
        except OSError as error:
            raise StorageFailed(f"'{part.name}' could not be kept: {error.strerror}.", param=part.name) from error

    def _part_end(self) -> None:
        part, self._part = self._part, None
        assert part is not None
        part.file.seek(0)
        text: str | None = None
        if part.filename is None:
            try:
                text = part.file.read().decode()
            except UnicodeDecodeError:
                if not part.name.startswith(_PICTURE_NAMES):
                    part.file.close()
                    raise RequestError(f"'{part.name}' is not valid UTF-8.", param=part.name) from None
            part.file.seek(0)
        if text is not None:
            part.file.close()
            self.texts.append((part.name, text))
            return
        self.uploads.append(
            Upload(
                name=part.name,
                filename=part.filename,
                content_type=part.content_type,
                file=part.file,
                size_bytes=part.size_bytes,
            )
        )

    def _end(self) -> None:
        self.ended = True


async def read_multipart(
    content_type: str, chunks: AsyncIterator[bytes], limits: BodyLimits
) -> tuple[Pairs, tuple[Upload, ...]]:
    """Return the texts and files of a multipart stream.

    Raises RequestError for a malformed form or too many parts, TooLarge for a part over its bound; nothing stays open
    then.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise RequestError("The multipart body's Content-Type names no boundary.")
    reader = _Reader(limits)
    try:
        parser = reader.parser(boundary)
        async for chunk in chunks:
            parser.write(chunk)
        parser.finalize()
        if not reader.ended:
            raise RequestError("The multipart body ends before its last boundary.")
    except FormParserError as error:
        reader.close()
        raise RequestError(f"The multipart body is malformed: {error}.") from None
    except BaseException:
        reader.close()
        raise
    return reader.texts, tuple(reader.uploads)


def nest(pairs: Iterable[tuple[str, str]]) -> dict[str, JSONValue]:
    """Return flat pairs as an object: ``key[]`` and repeated keys as lists, ``a[b]`` as objects.

    ``loras[][path]`` fills the first object of the list that has no `path` yet.
    Raises RequestError for names that contradict each other or nest too deeply.
    """
    root: dict[str, JSONValue] = {}
    for name, text in pairs:
        head, keys = _segments(name)
        _put(root, head, keys, text, name)
    return root


def _segments(name: str) -> tuple[str, list[str]]:
    match = re.fullmatch(r"([^\[\]]+)((?:\[[^\[\]]*\])+)", name)
    if match is None:
        return name, []
    keys = re.findall(r"\[([^\[\]]*)\]", match.group(2))
    if len(keys) > MAX_NESTING:
        raise RequestError(f"'{name[:100]}' is nested more than {MAX_NESTING} levels deep.", param=match.group(1))
    # An index says no more than the order of arrival, which is kept anyway.
    return match.group(1), ["" if key.isdecimal() else key for key in keys]


def _put(into: dict[str, JSONValue], key: str, rest: list[str], text: str, name: str) -> None:
    present = into.get(key)
    if not rest:
        if present is None:
            into[key] = text
        elif isinstance(present, list):
            present.append(text)
        elif isinstance(present, str):
            into[key] = [present, text]
        else:
            raise RequestError(f"'{name}' is given both as a value and as an object.", param=name)
        return
    if rest[0] != "":
        inner = into.setdefault(key, {})
        if not isinstance(inner, dict):
            raise RequestError(f"'{name}' is given both as a value and as an object.", param=name)
        _put(inner, rest[0], rest[1:], text, name)
        return
    items = into.setdefault(key, [])
    if isinstance(items, str):
        items = into[key] = [items]
    if not isinstance(items, list):
        raise RequestError(f"'{name}' is given both as a list and as an object.", param=name)
    if len(rest) == 1:
        items.append(text)
        return
    target = next((item for item in items if isinstance(item, dict) and rest[1] not in item), None)
    if target is None or rest[1] == "":
        target = {}
        items.append(target)
    _put(target, rest[1], rest[2:], text, name)
