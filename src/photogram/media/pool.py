"""Encoding off the event loop: a few threads, for numpy, zlib and Pillow work outside the interpreter's lock."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import EngineLost, GenerationFailed
from ..core.messages import FrameBlock
from ..core.request import OutputSpec
from .fit import fit
from .frames import discard_frames, take_frames
from .image_file import FILE_TYPES, encode_image
from .inputs import keep_outside
from .provenance import Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """A finished file; `width` and `height` are its pixels."""

    data: bytes
    content_type: str
    width: int
    height: int


class MediaPool:
    """Turns frames in shared memory into files; at most `num_threads` at a time, the others wait in order."""

    def __init__(self, frames_dir: Path, num_threads: int | None = None) -> None:
        self._frames_dir = frames_dir
        threads = num_threads if num_threads is not None else min(4, os.cpu_count() or 1)
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="photogram-media")

    async def encode_picture(
        self, block: FrameBlock, output: OutputSpec, provenance: Provenance | None
    ) -> EncodedImage:
        """Return the block's one frame as a file of exactly the output's size.

        The block's file is gone afterwards, whatever happens, also when the caller is cancelled. Raises
        GenerationFailed for a block that is not one picture and EngineLost once the pool is closed.
        """
        try:
            future = self._executor.submit(_encode, block, self._frames_dir, output, provenance)
        except RuntimeError as error:
            discard_frames(block, self._frames_dir)
            raise EngineLost("the server is stopping; send the request again later.") from error
        try:
            return await asyncio.wrap_future(future)
        finally:
            if future.cancelled():  # it never began, so nobody took the frames
                discard_frames(block, self._frames_dir)

    def discard(self, block: FrameBlock) -> None:
        """Remove the frames of a job that nobody waits for any more."""
        discard_frames(block, self._frames_dir)

    def close(self) -> None:
        """Finish what was handed in and end the threads."""
        self._executor.shutdown(wait=True)


def _encode(block: FrameBlock, frames_dir: Path, output: OutputSpec, provenance: Provenance | None) -> EncodedImage:
    frames_FHWC = take_frames(block, frames_dir)
    if len(frames_FHWC) != 1 or output.format == "mp4":
        raise GenerationFailed(f"{len(frames_FHWC)} frames for a {output.format} file: a picture is one frame.")
    picture_HWC = fit(frames_FHWC[0], output.width, output.height)
    if output.original is not None and output.mask is not None:
        picture_HWC = keep_outside(picture_HWC, Path(output.original), Path(output.mask))
    return EncodedImage(
        data=encode_image(picture_HWC, output.format, output.compression, provenance),
        content_type=FILE_TYPES[output.format].content_type,
        width=output.width,
        height=output.height,
    )
