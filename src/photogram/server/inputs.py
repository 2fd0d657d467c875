"""Input pictures of a request: found in its parts and fields, opened wherever they are, checked, and laid out.

Uploads, data URLs, http(s) URLs, files by id and this server's own pictures all end as PNG files of the server's own in
one folder for each request, under random names. Knows nothing of what is made of them.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO
from urllib.parse import unquote_to_bytes, urlsplit

from ..core.errors import NotFound, RequestError, TooLarge
from ..core.request import JSONValue
from ..jobs import inputs as input_folders
from ..media.decoder_pool import DecoderPool
from ..net.client import Outbound
from .body import Body
from .fields import shown
from .forms import SPOOL_BYTES, Upload
from .sizes import Size

MAX_INPUTS = 16
IMAGE_FIELDS = ("image", "images", "url")

_OWN_CONTENT = re.compile(r"(?:/v1)?/(?:images|videos)/((?:img|video)_[0-9a-f]{32})/content")
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.=+-]+)*),(.*)", re.DOTALL | re.ASCII)

OpenById = Callable[[str, str], Awaitable[IO[bytes]]]
"""Opens what an id names for an owner: a finished picture or clip, or an uploaded file. Raises NotFound."""
Source = tuple[str, IO[bytes]]
"""How errors name a picture, and its bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The pictures of one request as PNG files of the server's own, the first one's size, and the mask's file.

    `ignored` names fields that meant no picture, and uploads that no field of the request is for.
    """

    folder: Path
    paths: tuple[Path, ...]
    first: Size
    mask: Path | None = None
    ignored: tuple[str, ...] = ()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Intake:
    """Takes in what clients send or name. One per server."""

    def __init__(
        self,
        root: Path,
        decoders: DecoderPool,
        outbound: Outbound | None,
        *,
        max_bytes: int,
        open_content: OpenById,
        open_file: OpenById,
        public_url: str | None = None,
    ) -> None:
        """`root` is the folder for the inputs; without `outbound`, nothing is fetched from other servers."""
        self._root = root
        self._decoders = decoders
        self._outbound = outbound
        self._max_bytes = max_bytes
        self._open_content = open_content
        self._open_file = open_file
        self._public_host = urlsplit(public_url).netloc if public_url else None

    async def pictures(
        self, body: Body, owner: str, host: str, *, fields: Sequence[str] = IMAGE_FIELDS, with_mask: bool = True
    ) -> Inputs | None:
        """Take the pictures, and the mask, out of a request's uploads and fields; None where it has none.

        The fields are removed from the body, the uploads stay open. `host` is the request's Host header: URLs of it are
        this server's own. A value that means no picture is let go beside a usable picture and named in `ignored`.
        Raises RequestError, NotFound or TooLarge, naming the field.
        """
        uploads = [upload for upload in body.uploads if upload.name.partition("[")[0] in fields]
        masks = [upload for upload in body.uploads if with_mask and upload.name == "mask"]
        unknown = [upload.name for upload in body.uploads if upload not in uploads and upload not in masks]
        named = [(name, value) for name in fields for value in _values(body.fields.pop(name, None))]
        mask_field = body.fields.pop("mask", None) if with_mask else None
        with ExitStack() as opened:
            found = await self._open_all(named, owner, host, opened)
            sources = [(upload.name.partition("[")[0], upload.file) for upload in uploads]
            sources += [(name, file) for (name, _), file in zip(named, found, strict=True) if file is not None]
            ignored = [
                name
                for (name, value), file in zip(named, found, strict=True)
                if file is None and not _names_upload(value, uploads)
            ]
            if not sources:
                if named:
                    raise _no_picture(named[0][0], named[0][1])
                return None
            if len(sources) > MAX_INPUTS:
                raise RequestError(f"{len(sources)} images: at most {MAX_INPUTS} are allowed.", param=sources[0][0])
            mask = masks[0].file if masks else await self._open_mask(mask_field, owner, host, opened)
            inputs = await lay_out(sources, mask, input_folders.new(self._root), self._decoders)
        return replace(inputs, ignored=tuple(dict.fromkeys((*unknown, *ignored))))

    async def open(self, name: str, value: JSONValue, owner: str, host: str) -> IO[bytes] | None:
        """Open what a field's value means: the caller closes it. None for a text that means nothing to open.

        `value` is a data URL, an http(s) URL, the path of this server's content, or ``{"image_url": ...}``,
        ``{"file_id": ...}``. Raises RequestError, NotFound or TooLarge, naming the field.
        """
        if isinstance(value, dict):
            keys = [key for key in ("image_url", "file_id") if value.get(key) is not None]
            if len(keys) != 1:
                raise RequestError(
                    f"'{name}': an object needs either 'image_url' or 'file_id'.", param=name, code="invalid_value"
                )
            if keys[0] == "file_id":
                return await self._by_id(name, value["file_id"], owner, self._open_file)
            value = value["image_url"]
            value = value.get("url") if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise RequestError(f"'{name}' must be a picture, not {shown(value)}.", param=name, code="invalid_type")
        own = self._own_content(value, host)
        if own is not None:
            return await self._by_id(name, own, owner, self._open_content)
        if value[:5].lower() == "data:":
            return self._of_data_url(name, value)
        if re.match(r"https?:", value, re.IGNORECASE):
            if self._outbound is None:
                message = f"'{name}': this server fetches nothing from other servers (--no-fetch-urls)."
                raise RequestError(message, param=name, code="unsupported_image_url")
            return await self._outbound.fetch(value, name, max_bytes=self._max_bytes)
        return None

    async def _open_all(
        self, named: Sequence[tuple[str, JSONValue]], owner: str, host: str, opened: ExitStack
    ) -> list[IO[bytes] | None]:
        """Open every value, side by side, for other servers take their time."""
        if len(named) > MAX_INPUTS:
            raise RequestError(f"{len(named)} images: at most {MAX_INPUTS} are allowed.", param=named[0][0])
        found = await asyncio.gather(
            *(self.open(name, value, owner, host) for name, value in named), return_exceptions=True
        )
        files: list[IO[bytes] | None] = []
        for one in found:
            if not isinstance(one, BaseException):
                files.append(opened.enter_context(one) if one is not None else None)
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return files

    async def _open_mask(self, value: JSONValue, owner: str, host: str, opened: ExitStack) -> IO[bytes] | None:
        if value is None or value == "":
            return None
        file = await self.open("mask", value, owner, host)
        if file is None:
            raise _no_picture("mask", value)
        return opened.enter_context(file)

    async def _by_id(self, name: str, value: JSONValue, owner: str, open_by_id: OpenById) -> IO[bytes]:
        if not isinstance(value, str):
            raise RequestError(f"'{name}': an id is a text, not {shown(value)}.", param=name, code="invalid_type")
        try:
            return await open_by_id(value, owner)
        except NotFound as error:
            raise NotFound(f"'{name}': {error.message}", param=name, code=error.code) from None

    def _own_content(self, value: str, host: str) -> str | None:
        """Return the id in the path of a picture or clip of this server's, with or without its own host before it."""
        path = value.partition("?")[0]
        for prefix in (
            f"http://{host}",
            f"https://{host}",
            f"http://{self._public_host}",
            f"https://{self._public_host}",
        ):
            if path.startswith(f"{prefix}/"):
                path = path[len(prefix) :]
                break
        match = _OWN_CONTENT.fullmatch(path)
        return match.group(1) if match else None

    def _of_data_url(self, name: str, url: str) -> IO[bytes]:
        match = _DATA_URL.fullmatch(url)
        try:
            if match is None:
                raise ValueError
            is_base64 = match.group(2).lower().endswith(";base64")
            data = base64.b64decode(match.group(3), validate=True) if is_base64 else unquote_to_bytes(match.group(3))
        except (ValueError, binascii.Error):
            raise RequestError(f"'{name}': not a valid data URL.", param=name, code="invalid_base64_image") from None
        if len(data) > self._max_bytes:
            raise TooLarge(f"'{name}' exceeds {self._max_bytes} bytes (--max-upload-mb).", param=name)
        file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - the caller's
        file.write(data)
        return file


async def lay_out(sources: Sequence[Source], mask: IO[bytes] | None, folder: Path, decoders: DecoderPool) -> Inputs:
    """Check every picture and write them into a new folder; nothing is left where one is refused or the disk is full.

    When this returns the files survive a power cut. Raises RequestError and StorageFailed.
    """
    single = len(sources) == 1
    try:
        input_folders.make(folder)
        paths: list[Path] = []
        sizes: list[Size] = []
        for number, (name, file) in enumerate(sources):
            paths.append(folder / f"{number}.png")
            what = f"'{name}'" if single else f"'{name}' {number + 1}"
            sizes.append(Size(*await decoders.picture(file, paths[-1], what, name)))
        mask_path = folder / "mask.png" if mask is not None else None
        if mask is not None and mask_path is not None:
            await decoders.mask(mask, mask_path, (sizes[0].width, sizes[0].height))
        input_folders.sync(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Inputs(folder=folder, paths=tuple(paths), first=sizes[0], mask=mask_path)


async def from_files(names: Sequence[str], *, root: Path, decoders: DecoderPool) -> Inputs:
    """Take the pictures of a command line. Raises RequestError for a file that cannot be read or is no picture."""
    with ExitStack() as stack:
        sources: list[Source] = []
        for name in names:
            try:
                sources.append((f"--image {name}", stack.enter_context(Path(name).open("rb"))))
            except OSError as error:
                raise RequestError(f"--image '{name}': {error.strerror}.", param="image") from None
        return await lay_out(sources, None, input_folders.new(root), decoders)


def _values(value: JSONValue) -> list[JSONValue]:
    """A field's values, one by one; objects are opened where they are used."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list) else [value]


def _names_upload(value: JSONValue, uploads: Sequence[Upload]) -> bool:
    return isinstance(value, str) and any(value == upload.filename for upload in uploads)


def _no_picture(name: str, value: JSONValue) -> RequestError:
    return RequestError(
        f"'{name}': {shown(value)} is no picture: send a file, a data URL, an http(s) URL, a file id, or the path of a "
        "picture that this server made.",
        param=name,
        code="invalid_image_url",
    )
