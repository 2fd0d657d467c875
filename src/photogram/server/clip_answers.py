"""A clip's job as OpenAI's video object."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from ..core.messages import Progress
from ..core.request import JSONValue
from ..jobs.record import JobRecord, JobState
from .clip_schemas import Video, VideoError, VideoEvent
from .lengths import spoken
from .resolve import ClipCall

Status = Literal["queued", "in_progress", "completed", "failed"]

_STATUS: dict[JobState, Status] = {
    "queued": "queued",
    "running": "in_progress",
    "encoding": "in_progress",
    "completed": "completed",
    "failed": "failed",
    "cancelled": "failed",
}
_EVENT_TYPES: dict[Status, Literal["video.queued", "video.in_progress", "video.completed", "video.failed"]] = {
    "queued": "video.queued",
    "in_progress": "video.in_progress",
    "completed": "video.completed",
    "failed": "video.failed",
}
_ALMOST = 99  # percent: 100 is said of a clip that can be fetched
_REMEMBERED = 10_000
_POLL_MS = (200, 1000, 5000)
"""When to ask again: at least, while nothing is known, and at most."""


def facts_of(call: ClipCall) -> dict[str, JSONValue]:
    """Return what a clip's row keeps for its object beyond the request."""
    facts: dict[str, JSONValue] = {}
    if call.length.earlier:
        facts["num_frames"] = call.length.num_frames
    if call.remixed_from is not None:
        facts["remixed_from_video_id"] = call.remixed_from
    if call.warnings:
        facts["warnings"] = list(call.warnings)
    return facts


def frames_of(record: JobRecord) -> int:
    """Return the frames in a clip's file."""
    num_frames = record.facts.get("num_frames", record.request.num_frames or 1)
    assert isinstance(num_frames, int)
    return num_frames


class VideoAnswers:
    """Makes video objects. It remembers what progress was told of a clip, so that none is ever told to be less."""

    def __init__(self, keep_s: float | None) -> None:
        """`keep_s` is how long finished clips are kept, None for ever."""
        self._keep_s = keep_s
        self._told: OrderedDict[str, int] = OrderedDict()

    def video(self, record: JobRecord, progress: Progress | None = None) -> Video:
        request, output = record.request, record.output
        status = _STATUS[record.state]
        is_done = status == "completed"
        finished_at = record.finished_at if is_done else None
        fps, num_frames = output.fps or 1, frames_of(record)
        return Video(
            id=record.job_id,
            model=record.model,
            status=status,
            progress=self.percent(record, progress),
            created_at=int(record.created_at),
            completed_at=None if finished_at is None else int(finished_at),
            expires_at=None if finished_at is None or self._keep_s is None else int(finished_at + self._keep_s),
            prompt=request.prompt,
            size=f"{output.width}x{output.height}",
            seconds=spoken(num_frames / fps),
            remixed_from_video_id=record.facts.get("remixed_from_video_id"),
            error=_error(record),
            seed=request.seed,
            fps=fps,
            num_frames=num_frames,
            generated_size=f"{request.width}x{request.height}",
            quality_mode=request.quality_mode,
            eta_s=None if progress is None or record.is_finished else progress.eta_s,
            warnings=(*record.facts.get("warnings", ()), *record.warnings),
        )

    def event(self, record: JobRecord, progress: Progress | None) -> VideoEvent:
        video = self.video(record, progress)
        return VideoEvent(type=_EVENT_TYPES[video.status], video=video)

    def percent(self, record: JobRecord, progress: Progress | None) -> int:
        """Return the progress to tell, 0 to 100."""
        if record.state == "completed":
            return 100
        known = _ALMOST if record.state == "encoding" else 0 if progress is None else int(progress.fraction * 100)
        told = self._told.get(record.job_id, 0)
        # A failed clip keeps what was told of it last.
        percent = told if record.is_finished else max(told, min(known, _ALMOST))
        self._told[record.job_id] = percent
        self._told.move_to_end(record.job_id)
        if len(self._told) > _REMEMBERED:
            self._told.popitem(last=False)
        return percent


def poll_after_ms(progress: Progress | None) -> int:
    """Return when it is worth asking again: a tenth of what is left."""
    least, unknown, most = _POLL_MS
    if progress is None or progress.eta_s is None:
        return unknown
    return min(max(least, round(progress.eta_s * 100)), most)


def _error(record: JobRecord) -> VideoError | None:
    if record.state == "cancelled":
        return VideoError(code="cancelled", message="The video was cancelled.")
    if record.state != "failed":
        return None
    return VideoError(
        code=record.error_code or "generation_failed",
        message=record.error_message or "The video could not be made.",
        param=record.error_param,
    )
