"""One short generation before the worker says it is ready: allocations, kernels and the stacker's first lesson."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from msgspec.structs import replace

from ..core.errors import ConfigError, OutOfMemory
from ..core.messages import Failed, Finished, ToHost
from ..core.request import GenerateRequest
from .worker import Worker, run_until_idle

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 2


def warm_up(worker: Worker) -> None:
    """Draw one picture or clip at the default size with the fewest steps; a failure is logged, not fatal.

    Where blocks are compiled or calls recorded, two at once: one row and several are two programs, and a call is
    recorded at its second time. Clients may well ask for sizes that fit where the default does not. Only what the
    denoiser cannot run with at all, a step cache (diffusers offers it for more models than it works for) or being
    compiled, raises ConfigError.
    """
    card = worker.served.card
    if card.tasks[0] in ("I2I", "I2V"):
        return  # nothing to be drawn without a picture
    tuning = worker.served.tuning
    compiles, prepares = tuning.compile, tuning.compile or tuning.cuda_graphs
    messages: list[ToHost] = []
    first = GenerateRequest(
        job_id=f"warm-up-{secrets.token_hex(4)}",
        owner="warm-up",
        task=card.tasks[0],
        prompt="a lighthouse at dawn",
        width=card.default_width,
        height=card.default_height,
        num_frames=card.default_frames,
        fps=card.default_fps,
        num_inference_steps=min(WARM_UP_STEPS, card.default_steps),
        guidance_scale=card.default_guidance,
        seed=0,
        extra=card.defaults,
    )
    with worker.heard_by(messages.append):
        worker.submit(first)
        if prepares and worker.config.max_batch_size > 1 and not worker.served.runs_alone:
            worker.submit(replace(first, job_id=f"{first.job_id}-2", prompt="a street in the rain", seed=1))
        run_until_idle(worker)
    for message in messages:
        if isinstance(message, Finished):
            for block in message.blocks:
                Path(block.path).unlink()
            logger.info("warm after %.2f s", message.run_s)
        elif isinstance(message, Failed):
            if worker.caches_steps and message.code != OutOfMemory.code:
                raise ConfigError(f"--step-cache: this model does not run with it ({message.message})")
            if compiles and message.code != OutOfMemory.code:
                raise ConfigError(f"--compile: this model does not run with it ({message.message})")
            logger.warning("the warm-up failed: %s", message.message)
