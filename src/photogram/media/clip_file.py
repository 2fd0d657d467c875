"""Frames into the bytes of an MP4 file: H.264 in 4:2:0, as every browser and phone plays it, and AAC sound.

The same arguments give the same bytes on any machine. Knows nothing of how frames are fitted to a size.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from ..core.errors import GenerationFailed
from .fit import Picture
from .provenance import Provenance, clip_texts, xmp_packet
from .sound import Sound

# x264's decisions depend on its number of threads, so it is a constant and not the machine's.
_THREADS = 4
# Macroblock-tree rate control gives other bytes at every run on processors with AVX-512; it would save a sixth. Looking
# ahead for cuts and for where B-frames pay takes a quarter of the time, and makes clips neither smaller nor better.
_X264 = {"preset": "superfast", "x264-params": "mbtree=0:scenecut=0:b-adapt=0"}
_KEYFRAME_S = 2
# Without its flags swscale takes a shortcut for colours that is off by a tenth of a level.
SCALING = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
)
_AAC_BITS, _AAC_SAMPLES = 192_000, 1024  # a second, and to a frame
_XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")


def crf(compression: int) -> int:
    """Return x264's constant rate factor for 0 (smallest file) to 100 (best picture): 51 to 1, and 25 for 50.

    Factor 0 would be lossless, in a profile of H.264 that browsers do not play.
    """
    return max(1, (100 - compression) * 51 // 100)


def encode_mp4(
    frames: Iterable[Picture],
    width: int,
    height: int,
    fps: int,
    compression: int,
    provenance: Provenance | None = None,
    sound: Sound | None = None,
) -> bytes:
    """Return RGB frames (H, W, 3) of one size as an MP4 file that plays while it loads.

    Width and height must be even, because four pixels share one colour. Sound lasts as long as the frames: what is
    beyond is cut off, what is missing is silence. With `provenance` None nothing is written of how the clip was made.
    Raises GenerationFailed for what the file cannot hold.
    """
    if width % 2 or height % 2:
        raise GenerationFailed(f"a clip of {width}x{height}: the sides of an mp4 file must be even.")
    try:
        data = _encoded(frames, width, height, fps, compression, provenance, sound)
    except av.FFmpegError as error:
        raise GenerationFailed(f"a clip of {width}x{height} could not be encoded: {error.strerror}.") from error
    return data if provenance is None else data + _xmp_box(provenance)


def _encoded(
    frames: Iterable[Picture],
    width: int,
    height: int,
    fps: int,
    compression: int,
    provenance: Provenance | None,
    sound: Sound | None,
) -> bytes:
    file = io.BytesIO()
    # The index is moved to the front at the end, for which the muxer reads back what it has written.
    container = av.open(
        file,
        "w",
        format="mp4",
        # Sound is written last and interleaved with what waits for it, however long that is.
        options={"movflags": "+faststart", "max_interleave_delta": "0"},
        io_open=lambda url, flags, options: io.BytesIO(file.getvalue()),
    )
    with container:
        if provenance is not None:
            container.metadata.update(clip_texts(provenance))
        video = _video_stream(container, width, height, fps, compression)
        audio = None if sound is None else _audio_stream(container, sound)
        num_frames = 0
        for frame in _yuv(frames):
            frame.pts = num_frames
            container.mux(video.encode(frame))
            num_frames += 1
        container.mux(video.encode(None))
        if sound is not None and audio is not None:
            _write_sound(container, audio, sound, num_frames * sound.rate // fps)
    return file.getvalue()


def _video_stream(container: OutputContainer, width: int, height: int, fps: int, compression: int) -> VideoStream:
    options = {"crf": str(crf(compression)), **_X264}
    stream = container.add_stream("libx264", rate=fps, options=options)
    assert isinstance(stream, VideoStream)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    context.thread_count = _THREADS
    context.gop_size = _KEYFRAME_S * fps
    return stream


def _yuv(frames: Iterable[Picture]) -> Iterator[av.VideoFrame]:
    reformatter = VideoReformatter()
    for picture_HWC in frames:
        rgb = av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(picture_HWC), "rgb24")
        yield reformatter.reformat(
            rgb,
            format="yuv420p",
            src_colorspace=Colorspace.ITU709,
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=SCALING,
        )


def _audio_stream(container: OutputContainer, sound: Sound) -> AudioStream:
    layout = "mono" if sound.samples.shape[1] == 1 else "stereo"
    stream = container.add_stream("aac", rate=sound.rate, layout=layout, format="fltp")
    assert isinstance(stream, AudioStream)
    stream.bit_rate = _AAC_BITS
    return stream


def _write_sound(container: OutputContainer, stream: AudioStream, sound: Sound, num_samples: int) -> None:
    heard = np.clip(sound.samples[:num_samples].T, -1, 1)
    heard = np.pad(heard, ((0, 0), (0, num_samples - heard.shape[1])))
    for start in range(0, heard.shape[1], _AAC_SAMPLES):
        planes = np.ascontiguousarray(heard[:, start : start + _AAC_SAMPLES], np.float32)
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=stream.layout.name)
        frame.sample_rate, frame.pts = sound.rate, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _xmp_box(provenance: Provenance) -> bytes:
    """The box that XMP has in an MP4 file; players skip it."""
    packet = xmp_packet(provenance)
    return struct.pack(">I4s", 8 + len(_XMP_UUID) + len(packet), b"uuid") + _XMP_UUID + packet
