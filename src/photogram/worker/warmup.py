"""Short generations before the worker says it is ready: allocations, kernels and the stacker's first lesson."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from msgspec.structs import replace

from ..core.card import ModelCard
from ..core.errors import ConfigError, OutOfMemory
from ..core.messages import Failed, Finished, ToHost
from ..core.request import GenerateRequest
from .worker import Worker, run_until_idle

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 2


def warm_up(worker: Worker) -> None:
    """Draw one picture or clip of each size with the fewest steps, at the model's own size first.

    What is drawn is compiled, recorded and timed, and encoders and decoders may run beside other jobs' steps from the
    first job of that size on. Where blocks are compiled or calls recorded two are drawn at once: one row and several
    are two programs, and a call is recorded at its second time.

    A failure is logged, not fatal: clients may well ask for sizes that fit where these do not. Only what the denoiser
    cannot run with at all, a step cache (diffusers offers it for more models than it works for) or being compiled, and
    sizes that the model never draws, raise ConfigError.
    """
    card, config = worker.served.card, worker.config
    sizes = [_checked(card, *size) for size in config.warmup_sizes]
    if card.tasks[0] in ("I2I", "I2V"):
        return  # nothing to be drawn without a picture
    for width, height, frames in [(card.default_width, card.default_height, card.default_frames), *sizes]:
        _draw(worker, width, height, frames)


def _checked(card: ModelCard, width: int, height: int, frames: int | None) -> tuple[int, int, int | None]:
    """Return a size as the model draws it. Raises ConfigError for one that it does not."""
    text = f"--warmup-resolutions {width}x{height}{'' if frames is None else f'x{frames}'}"
    if width % card.size_multiple or height % card.size_multiple:
        raise ConfigError(f"{text}: {card.name} draws multiples of {card.size_multiple}.")
    if card.default_frames is None and frames is not None:
        raise ConfigError(f"{text}: {card.name} draws pictures, not clips.")
    frames = card.default_frames if frames is None else frames
    if frames is not None and (frames - 1) % card.frame_multiple:
        raise ConfigError(f"{text}: {card.name} draws 1 + k * {card.frame_multiple} frames.")
    return width, height, frames


def _draw(worker: Worker, width: int, height: int, frames: int | None) -> None:
    card, tuning = worker.served.card, worker.served.tuning
    messages: list[ToHost] = []
    first = GenerateRequest(
        job_id=f"warm-up-{secrets.token_hex(4)}",
        owner="warm-up",
        task=card.tasks[0],
        prompt="a lighthouse at dawn",
        width=width,
        height=height,
        num_frames=frames,
        fps=card.default_fps,
        num_inference_steps=min(WARM_UP_STEPS, card.default_steps),
        guidance_scale=card.default_guidance,
        negative_prompt=card.default_negative_prompt,
        seed=0,
        extra=card.defaults,
    )
    prepares = tuning.compile or tuning.cuda_graphs
    with worker.heard_by(messages.append):
        worker.submit(first)
        if prepares and worker.config.max_batch_size > 1 and not worker.served.runs_alone:
            worker.submit(replace(first, job_id=f"{first.job_id}-2", prompt="a street in the rain", seed=1))
        run_until_idle(worker)
    for message in messages:
        if isinstance(message, Finished):
            for block in message.blocks:
                Path(block.path).unlink()
            size = f"{width}x{height}{'' if frames is None else f', {frames} frames'}"
            logger.info("warm for %s after %.2f s", size, message.run_s)
        elif isinstance(message, Failed):
            if worker.caches_steps and message.code != OutOfMemory.code:
                raise ConfigError(f"--step-cache: this model does not run with it ({message.message})")
            if tuning.compile and message.code != OutOfMemory.code:
                raise ConfigError(f"--compile: this model does not run with it ({message.message})")
            logger.warning("the warm-up failed: %s", message.message)
