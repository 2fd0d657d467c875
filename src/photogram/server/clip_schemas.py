"""The shapes of the answers of the Videos API, and the table of the fields that a clip's request may have."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Literal

import msgspec

from ..core.request import QualityMode
from ..net.address import AllowedHosts, parse_url
from .fields import Field, Values
from .schemas import image_fields

MAX_PAGE = 100
MAX_FPS = 60
MAX_CLIP_S = 600
MAX_PREVIEWS = 3

_AS_FOR_PICTURES = (
    "model", "size", "width", "height", "negative_prompt", "seed", "num_inference_steps", "guidance_scale",
    "true_cfg_scale", "quality", "quality_mode", "output_quality", "output_compression", "priority", "loras",
    "deterministic", "task_type",
)  # fmt: skip
_OTHERWISE = {
    "negative_prompt": "What the clip shall not show.",
    "output_quality": "Preset of output_compression: 100, 90, 55, 35, 50.",
    "output_compression": "0 smallest file, 100 best quality; wins over output_quality.",
}


@cache
def clip_fields(max_steps: int) -> tuple[Field, ...]:
    """Every field of `POST /v1/videos` that means something here, without those that carry pictures and clips."""
    shared = {field.name: field for field in image_fields(max_steps)}
    return (
        Field(name="prompt", kind="str", high=shared["prompt"].high, help="What the clip shows. Required."),
        Field(name="seconds", kind="float", low=0.01, high=MAX_CLIP_S, help="Duration; default: the model's."),
        Field(name="fps", kind="int", low=1, high=MAX_FPS, help="Frames a second; default: the model's."),
        Field(name="num_frames", kind="int", low=1, help="Length in frames, instead of seconds."),
        *(replace(shared[name], help=_OTHERWISE.get(name, shared[name].help)) for name in _AS_FOR_PICTURES),
        Field(
            name="strength",
            kind="float",
            low=0,
            high=1,
            help="How far a remix or an edit may go from the clip; default: the model's, or 0.7.",
        ),
        Field(name="output_format", kind="word", words=("mp4",), help="mp4."),
        Field(
            name="partial_images",
            kind="int",
            low=0,
            high=MAX_PREVIEWS,
            help="Pictures of the unfinished work for who watches the events; default 0.",
        ),
        Field(name="webhook_url", kind="str", high=2048, help="Is told of the clip's end, in place of --webhook-url."),
        Field(name="n", kind="int", aliases=("num_outputs_per_prompt",), low=1, high=1, help="1: a request, a clip."),
    )


PAGE_FIELDS = (
    Field(name="limit", kind="int", low=0, high=MAX_PAGE, help="Videos on a page; default 20."),
    Field(name="order", kind="word", words=("asc", "desc"), help="By acceptance; default desc, the newest first."),
    Field(name="after", kind="str", high=100, help="Id of the video before the page: the last page's last_id."),
)

PICTURE_FIELDS = ("input_reference", "reference_url")
CLIP_FIELD = "video"
CLIP_FILE_FIELDS = {
    "input_reference": "Picture that the clip begins with: a file, a data URL, an http(s) URL, or an object with "
    "image_url or file_id.",
    "reference_url": "The same as input_reference.",
    "video": "Clip to begin with, for edits and extensions: a file (MP4, MOV, WebM), or an object with the id of a "
    "video of this server.",
}


def webhook_url(values: Values, allowed: AllowedHosts) -> str | None:
    """Return who is told of the clip's end besides its owner. Raises UrlRefused for what would never be told."""
    url = values.text("webhook_url") or None
    if url is not None:
        parse_url(url, allowed, "webhook_url")
    return url


class VideoError(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    message: str
    param: str | None = None


class Video(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's video object, every field present, and what else is known of the clip.

    `size` is the file's and `generated_size` the one that was drawn; `eta_s` is in seconds, null while nothing is
    known. `seconds` and `num_frames` are what the file has, not what was asked for.
    """

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: str | None
    error: VideoError | None
    seed: int
    fps: int
    num_frames: int
    generated_size: str
    quality_mode: QualityMode
    eta_s: float | None
    warnings: tuple[str, ...] = ()


class VideoList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class VideoProgress(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/videos/{id}/events`: how far the clip is."""

    type: Literal["video.progress"] = "video.progress"
    id: str
    progress: int
    phase: str
    step: int
    num_steps: int
    eta_s: float | None


class VideoPreview(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/videos/{id}/events`: a picture of the unfinished clip, JPEG."""

    type: Literal["video.preview"] = "video.preview"
    id: str
    partial_image_index: int
    output_format: Literal["jpeg"] = "jpeg"
    b64_json: bytes


class VideoEvent(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/videos/{id}/events`: the clip has another status; completed and failed are the last."""

    type: Literal["video.queued", "video.in_progress", "video.completed", "video.failed"]
    video: Video
