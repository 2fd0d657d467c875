"""Finds out how a call looks for two prompts, from which the stacker learns where the batch lies."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .arguments import for_two_prompts
from .fibers import Call, Fiber
from .job import Job
from .loading import ServedPipeline
from .memory import DeviceLost, device_error

logger = logging.getLogger(__name__)


def same_call_for_two(job: Job, call: Call, served: ServedPipeline) -> Call | None:
    """Run the job's own code with two prompts up to the same module's first call, whose forward is not run.

    None where the code takes no two prompts. Raises DeviceLost.
    """
    for arguments in for_two_prompts(job.stage.arguments):
        try:
            return _first_like(call, job, arguments)
        except Exception as error:
            lost = device_error(error, served.device)
            if isinstance(lost, DeviceLost):
                raise lost from error
            logger.info("%s does not take two prompts: %s", type(job.stage.pipeline).__name__, error)
    return None


def _first_like(call: Call, job: Job, arguments: Mapping[str, Any]) -> Call | None:
    """Run the job's pipeline with other arguments to its first denoiser call; None where another comes first."""
    pipeline = job.stage.another_pipeline()
    fiber = Fiber(lambda: pipeline(**arguments), job.loras)
    outcome = fiber.resume()
    try:
        while isinstance(outcome, Call):
            if outcome.module is call.module and outcome.method == call.method:
                return outcome
            if outcome.module.is_denoiser:
                return None
            outcome = fiber.resume(outcome.module.run(outcome, f"{job.job_id}/probe"))
    finally:
        fiber.close()
    return None
