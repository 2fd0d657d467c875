"""From a checkpoint's folder and the settings to its plan, without torch.

`photogram doctor` runs this file as a process of its own, the host being kept from importing the models:

    python -m photogram.models.memory_report '{"memory_bytes": 24000000000, "config": {...}}'
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

import msgspec

from ..core.errors import ConfigError
from ..core.footprint import Footprint
from ..core.memory_question import PlanAnswer, PlanQuestion
from ..core.worker_config import WorkerConfig
from .checkpoint import Checkpoint, find_checkpoint, read_index
from .families import DEFAULTS, FamilyDefaults, checkpoint_defaults
from .footprints import footprint_of, read_config
from .measured_peaks import MeasuredPeaks
from .memory_plan import MemoryPlan, UsualRequest, plan_memory
from .sizes import parts_of
from .two_stages import UPSAMPLER, enlarged, has_upsampler

_FALLBACK_SIDE = 1024


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """A plan, the footprint of the work under it, and what was measured of the model before."""

    plan: MemoryPlan
    footprint: Footprint
    peaks: MeasuredPeaks


def plan_of(
    checkpoint: Checkpoint, config: WorkerConfig, *, memory_bytes: int, host_bytes: int, default_precision: str
) -> CheckpointPlan:
    """Return the plan for a checkpoint on a device with this much memory. Raises ConfigError."""
    index = read_index(checkpoint.folder, config.model_path)
    loaded = {**index, UPSAMPLER: ["diffusers", "ModelMixin"]} if has_upsampler(checkpoint) else index
    try:
        parts = parts_of(
            checkpoint.folder, loaded, variant=config.variant, wanted=config.precisions, default=default_precision
        )
    except ConfigError as error:
        raise ConfigError(f"--model-path '{config.model_path}': {error}") from None
    fused = config.tuning.fused_kernels
    footprints = {tiled: footprint_of(checkpoint.folder, parts, tiled=tiled, fused=fused) for tiled in (False, True)}
    peaks = MeasuredPeaks(checkpoint, config, default_precision)
    plan = plan_memory(
        parts,
        footprints,
        _usual_request(checkpoint, index),
        memory_bytes=memory_bytes,
        host_bytes=host_bytes,
        asked=config.placement,
        # What is compiled or recorded knows weights by their place.
        can_move_denoiser=config.degrees.world_size == 1 and not (config.tuning.compile or config.tuning.cuda_graphs),
        measured=peaks.under,
    )
    return CheckpointPlan(plan, footprints[bool(plan.placement.vae_tiling)], peaks)


def _usual_request(checkpoint: Checkpoint, index: dict[str, object]) -> UsualRequest:
    """Return the size that a request gets which names none, as far as it is known before the pipeline is loaded."""
    family = checkpoint_defaults(
        checkpoint.pipeline_class,
        DEFAULTS.get(checkpoint.pipeline_class, FamilyDefaults()),
        index,
        read_config(checkpoint.folder, "transformer"),
    )
    if has_upsampler(checkpoint):
        family = enlarged(family)
    own = checkpoint.overrides
    return UsualRequest(
        width=own.get("default_width") or family.width or _FALLBACK_SIDE,
        height=own.get("default_height") or family.height or _FALLBACK_SIDE,
        frames=own.get("default_frames") or family.frames,
    )


def _answer(question: PlanQuestion) -> PlanAnswer:
    config = question.config
    try:
        checkpoint = find_checkpoint(
            config.model_path, revision=config.revision, variant=config.variant, download=False
        )
        found = plan_of(
            checkpoint,
            config,
            memory_bytes=question.memory_bytes,
            host_bytes=question.host_bytes,
            default_precision=question.default_precision,
        )
    except ConfigError as error:
        return PlanAnswer(fits=False, lines=(), problem=str(error))
    return PlanAnswer(fits=found.plan.fits, lines=found.plan.reasons)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    answer = _answer(msgspec.json.decode(sys.argv[1], type=PlanQuestion))
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
