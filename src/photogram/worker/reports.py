"""What the host hears of jobs: how far they are, their pictures, their ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..core.errors import GenerationFailed, RequestError, ServiceError
from ..core.messages import Failed, Finished, Preview, Progress, ToHost
from ..core.request import GenerateRequest
from ..models.derive import token_side
from .frame_store import Drawn, FrameStore
from .job import Job
from .loading import ServedPipeline
from .tokens import count_tokens

logger = logging.getLogger(__name__)

# Shares of a job's progress that lie before the first step and after the last.
ENCODE_SHARE, DECODE_SHARE = 0.03, 0.05


class Reports:
    """Puts what becomes of jobs into messages, each of which `emit` is given."""

    def __init__(self, served: ServedPipeline, frames_dir: str, emit: Callable[[ToHost], None]) -> None:
        self.frames = FrameStore(frames_dir)
        self._served = served
        self._emit = emit

    @contextmanager
    def heard_by(self, emit: Callable[[ToHost], None]) -> Iterator[None]:
        """Send messages elsewhere for a while (the warm-up's are not for the host)."""
        self._emit, hosts = emit, self._emit
        try:
            yield
        finally:
            self._emit = hosts

    def send(self, message: ToHost) -> None:
        self._emit(message)

    def progress(self, job: Job, eta_s: Callable[[], float | None]) -> None:
        """Tell how far the job is, once for each step: with guidance a step can be several calls."""
        done, num_steps = job.watch.steps_done, job.num_steps
        if job.reported == (job.phase, done):
            return
        job.reported = (job.phase, done)
        share = {"encode": 0.0, "denoise": ENCODE_SHARE, "decode": 1 - DECODE_SHARE}[job.phase]
        if job.phase == "denoise":
            share += (1 - ENCODE_SHARE - DECODE_SHARE) * min(1.0, done / num_steps)
        job.fraction = max(job.fraction, share)
        self._emit(
            Progress(
                job_id=job.job_id,
                phase=job.phase,
                step=done,
                num_steps=num_steps,
                fraction=job.fraction,
                eta_s=eta_s(),
            )
        )

    def preview(self, job: Job, drawn: Drawn) -> None:
        self._emit(Preview(job.job_id, job.num_previews, drawn.frames))
        job.num_previews += 1

    def finished(self, job: Job, drawn: Drawn, run_s: float) -> None:
        prompt_tokens, warnings = count_tokens(self._served.pipeline, job.stage.arguments)
        left_out = job.shortcuts.num_answered
        logger.info(
            "%s done: %d steps in %.2f s (%s), %d of %d calls shared, largest batch %d%s",
            job.job_id,
            job.watch.steps_done,
            run_s,
            job.stages,
            job.calls_shared,
            job.calls_run,
            job.largest_batch,
            f", {job.request.quality_mode}: {left_out} calls left out" if left_out else "",
        )
        self._emit(
            Finished(
                job_id=job.job_id,
                frames=drawn.frames,
                prompt_tokens=prompt_tokens,
                image_tokens=self._image_tokens(job.request),
                run_s=run_s,
                warnings=tuple(warnings),
                sound=drawn.sound,
            )
        )

    def _image_tokens(self, request: GenerateRequest) -> int:
        """Tokens of the picture as the denoiser sees it: one for each square of `token_side` and latent frame."""
        side = token_side(self._served.pipeline)
        latent_frames = 1 + ((request.num_frames or 1) - 1) // self._served.card.frame_multiple
        return (request.width // side) * (request.height // side) * latent_frames


def failure(job_id: str, error: Exception, job: Job | None) -> Failed:
    """Return what is said of a job that failed; `job` is None for one that could not even be prepared."""
    if isinstance(error, ServiceError):
        return Failed(job_id, error.code, error.message, error.param)
    # What a pipeline says of its arguments before any network has run is said of the request.
    if isinstance(error, ValueError | TypeError) and (job is None or job.calls_run == 0):
        return Failed(job_id, RequestError.code, f"The pipeline refused the request: {error}")
    logger.error("%s failed", job_id, exc_info=error)
    return Failed(job_id, GenerationFailed.code, f"The pipeline failed: {type(error).__name__}: {error}")
