"""Clips as files: opened only when they are known to be harmless, read upright and as RGB.

The type is told by the bytes; the size is checked before anything is decoded; only formats that name no other files
and well-known codecs are opened.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from typing import IO

import av
import msgspec
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from ..core.errors import RequestError
from .clip_file import SCALING
from .fit import Picture, cover
from .sound import KEPT_CHANNELS, KEPT_RATE, Keeper, Samples

# FFmpeg's decoders, with the codecs' names.
CODECS = {"h264": "H.264", "hevc": "HEVC", "vp8": "VP8", "vp9": "VP9", "av1": "AV1", "libdav1d": "AV1",
          "mpeg4": "MPEG-4"}  # fmt: skip
SOUND_CODECS = {"aac": "AAC", "mp3": "MP3", "opus": "Opus", "vorbis": "Vorbis", "flac": "FLAC", "alac": "ALAC",
                "ac3": "AC-3", "eac3": "E-AC-3"}  # fmt: skip
_PCM = "pcm_"  # the beginning of the names of uncompressed sound
MIN_SIDE = 16
MAX_PACKETS = 100_000
_THREADS = 2
_HD_HEIGHT = 720
# H.273's matrix coefficients as swscale names them.
_COLORSPACES = {1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601, 6: Colorspace.ITU601,
                7: Colorspace.SMPTE240M, 9: Colorspace.BT2020}  # fmt: skip


class ClipFacts(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a clip is, upright: pixels, frames, and frames a second on average."""

    width: int
    height: int
    num_frames: int
    fps: float

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps


def probe_clip(source: IO[bytes], what: str, *, max_pixels: int, param: str = "video") -> ClipFacts:
    """Return what an MP4, MOV, WebM or Matroska clip is, without decoding it; every frame's place is read.

    `what` names it in errors. Raises RequestError for anything else, and for frames of more than `max_pixels`.
    """
    with _opened(source, what, param) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > max_pixels:
            raise RequestError(
                f"{what} is {width}x{height}: over {max_pixels} pixels (--max-video-pixels).",
                param=param,
                code="video_too_large",
            )
        if min(width, height) < MIN_SIDE:
            raise RequestError(f"{what} is {width}x{height}: a side must have at least {MIN_SIDE} pixels.", param=param)
        times: list[int] = []
        for packet in container.demux(stream):
            if packet.pts is not None:
                times.append(packet.pts)
            if len(times) > MAX_PACKETS:
                raise RequestError(f"{what} has over {MAX_PACKETS} frames.", param=param, code="video_too_long")
        if not times or stream.time_base is None:
            raise RequestError(f"{what} has no frames.", param=param, code="invalid_video")
        span = (max(times) - min(times)) * stream.time_base
        fps = Fraction(len(times) - 1) / span if span else stream.average_rate or Fraction(1)
        turned = _first_frame(container, stream).rotation % 180 != 0
    if turned:
        width, height = height, width
    return ClipFacts(width=width, height=height, num_frames=len(times), fps=float(fps))


def write_frames(
    source: IO[bytes],
    what: str,
    target: IO[bytes],
    *,
    width: int,
    height: int,
    fps: int,
    num_frames: int,
    max_pixels: int,
    param: str = "video",
) -> None:
    """Write the clip's beginning as a NumPy file of uint8 RGB, shape (F, H, W, 3): at `fps`, covering the size and
    cropped evenly. Where it is shorter its last frame stays.

    Frame i is the one that is shown at i / fps. Raises RequestError when the clip cannot be decoded.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_frames, height, width, 3)}
    np.lib.format.write_array_header_1_0(target, header)
    written = 0
    with _opened(source, what, param) as (container, stream):
        for picture_HWC, until in _shown_until(container, stream, what, param, fps, max_pixels):
            until = num_frames if until is None else min(until, num_frames)
            if until > written:
                data = cover(picture_HWC, width, height).tobytes()
                for _ in range(until - written):
                    target.write(data)
                written = until
            if written == num_frames:
                break
    if written < num_frames:
        raise RequestError(f"{what} has no frame that can be decoded.", param=param, code="invalid_video")


def _shown_until(
    container: InputContainer, stream: VideoStream, what: str, param: str, fps: int, max_pixels: int
) -> Iterator[tuple[Picture, int | None]]:
    """Yield each frame with the number of frames at `fps` that begin before the next one; None for the last."""
    shown: av.VideoFrame | None = None
    start = Fraction(0)
    for frame in container.decode(stream):
        if frame.width * frame.height > max_pixels:
            raise RequestError(f"{what} grows over {max_pixels} pixels.", param=param, code="video_too_large")
        if frame.pts is None or frame.time_base is None:
            continue
        time = frame.pts * frame.time_base
        if shown is None:
            start = time
        else:
            # A hundredth of a frame is rounding.
            yield _upright(shown), -int(-((time - start) * fps - Fraction(1, 100)) // 1)
        shown = frame
    if shown is not None:
        yield _upright(shown), None


def write_sound(source: IO[bytes], what: str, target: IO[bytes], *, seconds: float, param: str = "video") -> None:
    """Write the clip's sound as a NumPy file of 32-bit floats in the kept form (`sound`), shape (samples, 2).

    It begins with the first frame and lasts `seconds`: what is beyond is left out, what is missing is silence. A clip
    without sound gives no samples. `target` is an empty file. Raises RequestError for sound that cannot be decoded.
    """
    with _opened(source, what, param) as (container, video):
        stream = next(iter(container.streams.audio), None)
        num_samples = 0 if stream is None else round(seconds * KEPT_RATE)
        header = {"descr": "<f4", "fortran_order": False, "shape": (num_samples, KEPT_CHANNELS)}
        np.lib.format.write_array_header_1_0(target, header)
        if stream is None:
            return
        sample_bytes = KEPT_CHANNELS * np.dtype(np.float32).itemsize
        end = target.tell() + num_samples * sample_bytes
        codec = None if stream.codec_context is None else stream.codec_context.codec.canonical_name
        if codec not in SOUND_CODECS and not (codec or "").startswith(_PCM):
            known = ", ".join((*SOUND_CODECS.values(), "PCM"))
            raise RequestError(
                f"{what}: its sound is {codec or 'of no known kind'}; {known} are read.",
                param=param,
                code="unsupported_video",
            )
        first = _first_frame(container, video)
        begins = Fraction(0) if first.pts is None or first.time_base is None else first.pts * first.time_base
        container.seek(0)
        written = 0
        for position, samples_SC in _samples(container, stream, begins):
            # What lies before the first frame or was heard already, a gap, and what lies beyond the end.
            samples_SC = samples_SC[max(0, written - position) :]
            gap = min(max(0, position - written), num_samples - written)
            samples_SC = samples_SC[: num_samples - written - gap]
            target.seek(gap * sample_bytes, io.SEEK_CUR)  # a hole in a file reads as zeros
            target.write(np.ascontiguousarray(samples_SC, "<f4").tobytes())
            written += gap + len(samples_SC)
            if written == num_samples:
                break
        target.truncate(end)


def _samples(container: InputContainer, stream: AudioStream, begins: Fraction) -> Iterator[tuple[int, Samples]]:
    """Yield a clip's sound in pieces (samples, channels), each with its place, in samples after `begins` seconds."""
    keeper = Keeper(stream.channels)
    for frame in chain(container.decode(stream), (None,)):
        for time, samples_SC in keeper.taken(frame):
            if time is not None:
                yield round((time - begins) * KEPT_RATE), samples_SC


def evenly_spaced(data: bytes, num: int) -> list[Picture]:
    """Return up to `num` frames of a clip, in order and equally far apart, in its own size; one is its middle."""
    with _opened(io.BytesIO(data), "the clip", "video") as (container, stream):
        total = max(1, stream.frames)
        num = min(num, total)
        wanted = {(2 * index + 1) * total // (2 * num) for index in range(num)}
        return [_upright(frame) for index, frame in enumerate(container.decode(stream)) if index in wanted]


@contextmanager
def _opened(source: IO[bytes], what: str, param: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream. What FFmpeg finds wrong with it is a RequestError."""
    refusal = RequestError(f"{what}: no readable MP4, MOV or WebM clip.", param=param, code="invalid_video")
    try:
        source.seek(0)
        head = source.read(12)
        source.seek(0)
        # Named outright: a demuxer chosen by FFmpeg could be one that opens further files or addresses.
        format = "mov" if head[4:8] == b"ftyp" else "matroska" if head[:4] == b"\x1aE\xdf\xa3" else None
        if format is None:
            raise refusal
        with av.open(source, "r", format=format, io_open=_refuse_to_open) as container:
            stream = next(iter(container.streams.video), None)
            # FFmpeg gives no context for a codec that it does not know.
            codec = None if stream is None or stream.codec_context is None else stream.codec_context.name
            if stream is None or codec not in CODECS:
                known = ", ".join(dict.fromkeys(CODECS.values()))
                raise RequestError(
                    f"{what}: has {codec or 'no known video'}; {known} are read.", param=param, code="unsupported_video"
                )
            stream.codec_context.thread_count = _THREADS
            yield container, stream
    except (av.FFmpegError, ValueError, ArithmeticError, MemoryError, EOFError):
        raise refusal from None


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> None:
    raise ValueError("a clip may not name other files")


def _first_frame(container: InputContainer, stream: VideoStream) -> av.VideoFrame:
    container.seek(0)
    return next(iter(container.decode(stream)))


def _upright(frame: av.VideoFrame) -> Picture:
    space = _COLORSPACES.get(frame.colorspace, Colorspace.ITU709 if frame.height >= _HD_HEIGHT else Colorspace.ITU601)
    range_ = ColorRange.JPEG if frame.color_range == ColorRange.JPEG else ColorRange.MPEG
    rgb = VideoReformatter().reformat(
        frame,
        format="rgb24",
        src_colorspace=space,
        dst_colorspace=space,
        src_color_range=range_,
        dst_color_range=ColorRange.JPEG,
        interpolation=SCALING,
    )
    picture: Picture = np.asarray(rgb.to_ndarray(), np.uint8)
    return np.rot90(picture, frame.rotation // 90 % 4) if frame.rotation else picture
