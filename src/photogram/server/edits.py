"""Input pictures of an edit: found in the request, checked, laid out for the worker, and removed afterwards."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import math
import re
import secrets
import shutil
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO
from urllib.parse import unquote_to_bytes

from ..core.card import ModelCard
from ..core.errors import RequestError, StorageFailed
from ..core.request import JSONValue, Task
from ..media.inputs import read_mask, read_picture
from .body import Body
from .fields import shown
from .forms import Upload
from .sizes import Size

INPUTS = "inputs"
"""Folder, under the data folder, of pictures that running edits need."""
MAX_INPUTS = 16
EDIT_TASKS: tuple[Task, ...] = ("TI2I", "I2I")

_IMAGE_FIELDS = ("image", "images", "url")
_OWN_CONTENT = re.compile(r"(?:/v1)?/images/(img_[0-9a-f]{32})/content(?:\?.*)?")
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.=+-]+)*),(.*)", re.DOTALL | re.ASCII)

FindImage = Callable[[str], Awaitable[bytes]]
"""Gives the bytes of a finished picture of this server's by its id. Raises NotFound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The pictures of one edit as PNG files of the server's own, the first one's size, and the mask's file."""

    folder: Path
    paths: tuple[Path, ...]
    first: Size
    mask: Path | None = None
    ignored: tuple[str, ...] = ()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def edit_task(card: ModelCard, num_images: int) -> Task:
    """Return the card's task that changes pictures. Raises RequestError where it has none, or takes fewer pictures."""
    task = next((task for task in EDIT_TASKS if task in card.tasks), None)
    if task is None or card.max_input_images == 0:
        raise RequestError(f"Model '{card.name}' takes no input pictures.", param="image", code="unsupported_by_model")
    if num_images > card.max_input_images:
        raise RequestError(
            f"{num_images} images: model '{card.name}' takes at most {card.max_input_images}.", param="image"
        )
    return task


def like(first: Size, card: ModelCard) -> str:
    """Return the size to draw when none is asked for: the first picture's aspect at the model's usual pixel count."""
    scale = math.sqrt(card.default_width * card.default_height / (first.width * first.height))
    sides = (
        max(card.min_side, round(side * scale / card.size_multiple) * card.size_multiple)
        for side in (first.width, first.height)
    )
    return str(Size(*sides))


async def gather(body: Body, *, root: Path, max_pixels: int, find_image: FindImage) -> Inputs:
    """Take the pictures out of a request's uploads and fields and write them as PNG files under `root`.

    The fields are removed from the body. Raises RequestError, naming the field, where there is no usable picture.
    """
    ignored: list[str] = []
    uploads = [upload for upload in body.uploads if upload.name.partition("[")[0] in _IMAGE_FIELDS]
    masks = [upload for upload in body.uploads if upload.name == "mask"]
    unknown = [upload.name for upload in body.uploads if upload not in uploads and upload not in masks]
    named = [(name, value) for name in _IMAGE_FIELDS for value in _values(body.fields.pop(name, None))]
    mask_field = body.fields.pop("mask", None)
    sources: list[tuple[str, IO[bytes]]] = [("image", upload.file) for upload in uploads]
    for name, value in named:
        found = await _source(name, value, find_image)
        if found is not None:
            sources.append((name, found))
        elif not _names_upload(value, uploads):
            ignored.append(name)
    if not sources:
        param = named[0][0] if named else "image"
        raise RequestError(
            f"Missing required parameter: '{param}': an input picture as a file, a data URL, or the path of a picture "
            "that this server made.",
            param=param,
            code="missing_required_parameter" if not named else "invalid_image_url",
        )
    if len(sources) > MAX_INPUTS:
        raise RequestError(f"{len(sources)} images: at most {MAX_INPUTS} are allowed.", param="image")
    mask = masks[0].file if masks else await _mask_source(mask_field, find_image)
    single = len(sources) == 1
    labelled = [(f"'{name}'" if single else f"'{name}' {i + 1}", file) for i, (name, file) in enumerate(sources)]
    inputs = await asyncio.to_thread(_write, labelled, mask, root / secrets.token_hex(16), max_pixels)
    return replace(inputs, ignored=tuple(dict.fromkeys((*unknown, *ignored))))


def from_files(names: Sequence[str], *, root: Path, max_pixels: int) -> Inputs:
    """Take the pictures of a command line. Raises RequestError for a file that cannot be read or is no picture."""
    with ExitStack() as stack:
        sources: list[tuple[str, IO[bytes]]] = []
        for name in names:
            try:
                sources.append((f"--image '{name}'", stack.enter_context(Path(name).open("rb"))))
            except OSError as error:
                raise RequestError(f"--image '{name}': {error.strerror}.", param="image") from None
        return _write(sources, None, root / secrets.token_hex(16), max_pixels)


def _values(value: JSONValue) -> list[JSONValue]:
    """A field's values, one by one; OpenAI's objects are opened where they are used."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list) else [value]


def _names_upload(value: JSONValue, uploads: Sequence[Upload]) -> bool:
    return isinstance(value, str) and any(value == upload.filename for upload in uploads)


async def _source(name: str, value: JSONValue, find_image: FindImage) -> IO[bytes] | None:
    """The bytes that a field means; None for a value that means no picture (a placeholder, a repeated name)."""
    if isinstance(value, dict):
        keys = [key for key in ("image_url", "file_id") if value.get(key) is not None]
        if len(keys) != 1 or keys[0] == "file_id":
            raise RequestError(
                f"'{name}': an object needs 'image_url'; files by id are not served.", param=name, code="invalid_value"
            )
        value = value["image_url"]
        value = value.get("url") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise RequestError(f"'{name}' must be a picture, not {shown(value)}.", param=name, code="invalid_type")
    own = _OWN_CONTENT.fullmatch(value)
    if own:
        return io.BytesIO(await find_image(own.group(1)))
    if value.startswith("data:"):
        return io.BytesIO(_data_url(name, value))
    if re.match(r"https?://", value, re.IGNORECASE):
        raise RequestError(
            f"'{name}': pictures are not fetched from other servers; send a file or a data URL.",
            param=name,
            code="unsupported_image_url",
        )
    return None


async def _mask_source(value: JSONValue, find_image: FindImage) -> IO[bytes] | None:
    if value is None or value == "":
        return None
    found = await _source("mask", value, find_image)
    if found is None:
        raise RequestError(f"'mask' must be a picture, not {shown(value)}.", param="mask", code="invalid_image_url")
    return found


def _data_url(name: str, url: str) -> bytes:
    match = _DATA_URL.fullmatch(url)
    try:
        if match is None:
            raise ValueError
        if ";base64" in match.group(2):
            return base64.b64decode(match.group(3), validate=True)
        return unquote_to_bytes(match.group(3))
    except (ValueError, binascii.Error):
        raise RequestError(f"'{name}': not a valid data URL.", param=name, code="invalid_base64_image") from None


def _write(sources: Sequence[tuple[str, IO[bytes]]], mask: IO[bytes] | None, folder: Path, max_pixels: int) -> Inputs:
    """Check every picture and write them; nothing is left behind where one is refused or the disk is full."""
    pictures = [read_picture(source, name, max_pixels=max_pixels) for name, source in sources]
    edited = read_mask(mask, pictures[0].size, max_pixels=max_pixels) if mask is not None else None
    paths = tuple(folder / f"{number}.png" for number in range(len(pictures)))
    mask_path = folder / "mask.png" if edited is not None else None
    try:
        folder.mkdir(mode=0o700, parents=True)
        for path, picture in zip(paths, pictures, strict=True):
            picture.save(path, "PNG", compress_level=1)
        if edited is not None:
            edited.save(folder / "mask.png", "PNG", compress_level=1)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise StorageFailed(f"The input pictures could not be kept: {error.strerror}.") from error
    return Inputs(folder=folder, paths=paths, first=Size(*pictures[0].size), mask=mask_path)
