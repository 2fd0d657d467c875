"""Pictures and clips that a clip begins with: found in a request, known, and laid out for the worker.

What a request brings lies in one folder, under names of the server's own.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..core.card import ModelCard
from ..core.errors import RequestError
from ..core.request import JSONValue
from ..jobs import inputs as input_folders
from ..jobs.record import JobRecord
from ..jobs.store import JobStore
from ..media import first_frame
from ..media.decoder import ClipForm
from ..media.decoder_pool import DecoderPool
from ..storage import Storage
from .beginnings import Beginning, Start, clip_task
from .body import Body
from .clip_answers import frames_of
from .clip_schemas import CLIP_FIELD, PICTURE_FIELDS
from .fields import shown
from .files import finished_video, open_content
from .inputs import Intake
from .resolve import ClipCall
from .sizes import Size

MAX_DECODED_BYTES = 4 << 30
"""Of a clip's frames on the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a clip begins with, and the clip's file. A context manager, which closes the file.

    `ignored` names fields that meant nothing. The folder is the caller's to `remove` until a job has it.
    """

    beginning: Beginning
    file: IO[bytes] | None = None
    ignored: tuple[str, ...] = ()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def remove(self) -> None:
        shutil.rmtree(self.beginning.folder, ignore_errors=True)


class ClipSources:
    """Finds and lays out beginnings. One per server."""

    def __init__(
        self, root: Path, intake: Intake, decoders: DecoderPool, store: JobStore, storage: Storage, max_pixels: int
    ) -> None:
        """`root` is the folder for the inputs; `max_pixels` bounds the frames of a clip."""
        self._root = root
        self._intake = intake
        self._decoders = decoders
        self._store = store
        self._storage = storage
        self._max_pixels = max_pixels

    async def picture(self, body: Body, owner: str, host: str, card: ModelCard) -> Found | None:
        """Take the picture out of a request for a clip; None where it has none.

        Raises RequestError naming the field, before anything is fetched where the model takes no picture.
        """
        present = _present(body, PICTURE_FIELDS)
        if not present:
            return None
        clip_task(card, "picture", present[0])
        inputs = await self._intake.pictures(body, owner, host, fields=PICTURE_FIELDS, with_mask=False)
        if inputs is None:
            return None
        if len(inputs.paths) > 1:
            inputs.remove()
            raise RequestError(
                f"'{present[0]}': {len(inputs.paths)} pictures; a clip begins with one.", param=present[0]
            )
        beginning = Beginning(start="picture", param=present[0], folder=inputs.folder, size=inputs.first)
        return Found(beginning=beginning, ignored=inputs.ignored)

    async def clip(self, body: Body, owner: str, host: str, card: ModelCard, start: Start) -> Found:
        """Take the clip out of a request for an edit or an extension.

        Raises RequestError or NotFound naming the field, before anything is read where the model cannot.
        """
        clip_task(card, start, CLIP_FIELD)
        value = body.fields.pop(CLIP_FIELD, None)
        video_id = _video_id(value)
        if video_id is not None:
            return await self._own(await finished_video(self._store, video_id, owner), start, CLIP_FIELD)
        uploads = [upload for upload in body.uploads if upload.name.partition("[")[0] == CLIP_FIELD]
        if len(uploads) > 1:
            raise RequestError(f"'{CLIP_FIELD}': {len(uploads)} clips; one is wanted.", param=CLIP_FIELD)
        with ExitStack() as opened:
            file = uploads[0].file if uploads else await self._intake.open(CLIP_FIELD, value, owner, host)
            if file is None:
                raise RequestError(
                    f"Missing required parameter: '{CLIP_FIELD}': a clip as a file, or the id of a video of this "
                    "server.",
                    param=CLIP_FIELD,
                    code="missing_required_parameter",
                )
            opened.callback(file.close)
            facts = await self._decoders.probe(file, f"'{CLIP_FIELD}'", CLIP_FIELD, max_pixels=self._max_pixels)
            opened.pop_all()
        beginning = Beginning(
            start=start,
            param=CLIP_FIELD,
            folder=input_folders.new(self._root),
            size=Size(facts.width, facts.height),
            num_frames=facts.num_frames,
            fps=facts.fps,
        )
        return Found(beginning=beginning, file=file)

    async def original(self, record: JobRecord, card: ModelCard) -> Found:
        """Take a finished clip of this server's, for a remix. Raises RequestError where the model cannot."""
        clip_task(card, "redraw", "video_id")
        return await self._own(record, "redraw", "video_id")

    async def _own(self, record: JobRecord, start: Start, param: str) -> Found:
        file = await open_content(self._store, self._storage, record.job_id, record.owner)
        beginning = Beginning(
            start=start,
            param=param,
            folder=input_folders.new(self._root),
            size=Size(record.output.width, record.output.height),
            num_frames=frames_of(record),
            fps=float(record.output.fps or 1),
            video_id=record.job_id,
        )
        return Found(beginning=beginning, file=file)

    async def lay_out(self, found: Found, call: ClipCall) -> None:
        """Write what the worker and the encoder need into the folder; when this returns it survives a power cut.

        Raises RequestError for a clip that cannot be decoded or is too large, and StorageFailed.
        """
        beginning, request, output = found.beginning, call.drawing.request, call.drawing.output
        if beginning.start == "picture":
            picture = beginning.folder / "0.png"
            await asyncio.to_thread(first_frame.of_picture, picture, beginning.picture, request.width, request.height)
        elif beginning.start == "redraw":
            await self._write_clip(found, Size(request.width, request.height), call.length.fps, call.length.drawn)
        else:
            await self._write_clip(found, Size(output.width, output.height), call.length.fps, call.length.earlier)
            await asyncio.to_thread(
                first_frame.of_clip_end, beginning.clip, beginning.picture, request.width, request.height
            )
        await asyncio.to_thread(input_folders.sync, beginning.folder)

    async def _write_clip(self, found: Found, size: Size, fps: int, num_frames: int) -> None:
        beginning = found.beginning
        assert found.file is not None
        form = ClipForm(width=size.width, height=size.height, num_frames=num_frames, fps=fps)
        if form.size_bytes > MAX_DECODED_BYTES:
            raise RequestError(
                f"'{beginning.param}': {num_frames} frames of {size} are over {MAX_DECODED_BYTES >> 30} GiB.",
                param=beginning.param,
                code="video_too_long",
            )
        await asyncio.to_thread(input_folders.make, beginning.folder)
        what, param, most = f"'{beginning.param}'", beginning.param, self._max_pixels
        await self._decoders.clip(found.file, beginning.clip, what, param, max_pixels=most, form=form)
        if beginning.start == "extend":
            await self._decoders.sound(found.file, beginning.sound, what, param, max_pixels=most, form=form)


def _present(body: Body, fields: Sequence[str]) -> list[str]:
    """The fields of these that a request has, as a text or an upload."""
    uploads = {upload.name.partition("[")[0] for upload in body.uploads}
    return [name for name in fields if name in uploads or body.fields.get(name) not in (None, "", [])]


def _video_id(value: JSONValue) -> str | None:
    """The id of one of this server's videos, in OpenAI's object or alone."""
    if isinstance(value, dict) and "id" in value:
        value = value["id"]
        if not isinstance(value, str):
            raise RequestError(f"'video[id]' must be an id, not {shown(value)}.", param=CLIP_FIELD, code="invalid_type")
        return value
    return value if isinstance(value, str) and value.startswith("video_") else None
