"""Encoding off the event loop: a few threads, for work that numpy, zlib, Pillow and FFmpeg do outside the lock."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np

from ..core.errors import EngineLost, GenerationFailed
from ..core.messages import FrameBlock, SoundBlock
from ..core.request import OutputSpec
from .clip_file import encode_mp4
from .fit import fit
from .frames import Frames, discard_frames, frames_of, take_sound
from .image_file import FILE_TYPES, encode_image
from .inputs import keep_outside
from .provenance import Provenance
from .sound import KEPT_RATE, Sound, continued
from .stills import STILLS

P = ParamSpec("P")
T = TypeVar("T")
Encoded = TypeVar("Encoded")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """A finished file; `width` and `height` are its pixels."""

    data: bytes
    content_type: str
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedClip:
    """A finished file; `num_frames` counts all that are in it, `fps` of them a second."""

    data: bytes
    content_type: str
    width: int
    height: int
    num_frames: int
    fps: int


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
        return await self._encoded(_encode_picture, block, output, provenance)

    async def encode_clip(
        self, block: FrameBlock, output: OutputSpec, provenance: Provenance | None, sound: SoundBlock | None = None
    ) -> EncodedClip:
        """Return the block's frames as an MP4 file of exactly the output's size and frame rate.

        The blocks' files are gone afterwards, as with `encode_picture`. Raises GenerationFailed for a block that is no
        clip and EngineLost once the pool is closed.
        """
        try:
            return await self._encoded(partial(_encode_clip, sound), block, output, provenance)
        finally:
            if sound is not None:
                discard_frames(sound, self._frames_dir)

    async def still(self, clip: bytes, variant: str) -> bytes:
        """Return a picture of a finished clip: `variant` is a key of `STILLS`."""
        make = STILLS[variant].make
        return await asyncio.wrap_future(self._submit(make, clip))

    async def _encoded(
        self,
        encode: Callable[[FrameBlock, Path, OutputSpec, Provenance | None], Encoded],
        block: FrameBlock,
        output: OutputSpec,
        provenance: Provenance | None,
    ) -> Encoded:
        try:
            future = self._submit(encode, block, self._frames_dir, output, provenance)
        except EngineLost:
            discard_frames(block, self._frames_dir)
            raise
        try:
            return await asyncio.wrap_future(future)
        finally:
            if future.cancelled():  # it never began, so nobody took the frames
                discard_frames(block, self._frames_dir)

    def _submit(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> Future[T]:
        try:
            return self._executor.submit(work, *arguments, **options)
        except RuntimeError as error:
            raise EngineLost("the server is stopping; send the request again later.") from error

    def discard(self, block: FrameBlock | SoundBlock) -> None:
        """Remove the frames or the sound of a job that nobody waits for any more."""
        discard_frames(block, self._frames_dir)

    def close(self) -> None:
        """Finish what was handed in and end the threads."""
        self._executor.shutdown(wait=True)


def _encode_picture(
    block: FrameBlock, frames_dir: Path, output: OutputSpec, provenance: Provenance | None
) -> EncodedImage:
    with frames_of(block, frames_dir) as frames_FHWC:
        if len(frames_FHWC) != 1 or output.format == "mp4":
            raise GenerationFailed(f"{len(frames_FHWC)} frames for a {output.format} file: a picture is one frame.")
        picture_HWC = fit(frames_FHWC[0], output.width, output.height)
        if output.original is not None and output.mask is not None:
            picture_HWC = keep_outside(picture_HWC, Path(output.original), Path(output.mask))
        data = encode_image(picture_HWC, output.format, output.compression, provenance)
    return EncodedImage(
        data=data,
        content_type=FILE_TYPES[output.format].content_type,
        width=output.width,
        height=output.height,
    )


def _encode_clip(
    sound: SoundBlock | None, block: FrameBlock, frames_dir: Path, output: OutputSpec, provenance: Provenance | None
) -> EncodedClip:
    with frames_of(block, frames_dir) as frames_FHWC:
        heard = None if sound is None else take_sound(sound, frames_dir)
        return _clip_of(frames_FHWC, heard, output, provenance)


def _clip_of(
    frames_FHWC: Frames, heard: Sound | None, output: OutputSpec, provenance: Provenance | None
) -> EncodedClip:
    if output.format != "mp4" or output.fps is None or frames_FHWC.shape[3] != 3:
        raise GenerationFailed(
            f"frames of shape {frames_FHWC.shape} for a {output.format} file at {output.fps} frames a second: "
            "a clip is RGB frames for an mp4 file."
        )
    earlier_FHWC: Frames | None = None
    if output.continues is not None:
        earlier_FHWC = np.load(output.continues, mmap_mode="r", allow_pickle=False)
        frames_FHWC = frames_FHWC[1:]
    drawn = (fit(frame_HWC, output.width, output.height) for frame_HWC in frames_FHWC)
    frames = drawn if earlier_FHWC is None else chain(earlier_FHWC, drawn)
    if earlier_FHWC is not None:
        # The first frame that was drawn is the last one of what comes before.
        heard = continued(_earlier_sound(output), heard, (len(earlier_FHWC) - 1) / output.fps)
    data = encode_mp4(frames, output.width, output.height, output.fps, output.compression, provenance, heard)
    return EncodedClip(
        data=data,
        content_type=FILE_TYPES["mp4"].content_type,
        width=output.width,
        height=output.height,
        num_frames=len(frames_FHWC) + (0 if earlier_FHWC is None else len(earlier_FHWC)),
        fps=output.fps,
    )


def _earlier_sound(output: OutputSpec) -> Sound | None:
    """The sound of the clip that the output continues; None where it has none."""
    if output.continues_sound is None:
        return None
    samples_SC = np.load(output.continues_sound, mmap_mode="r", allow_pickle=False)
    return Sound(samples_SC, KEPT_RATE) if len(samples_SC) else None
