"""Loads a pipeline for serving: weights, precision, device, and the few fields a served pipeline must not share."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.models.cache_utils import CacheMixin

from ..core.card import ModelCard
from ..core.config import WorkerConfig
from ..core.errors import ConfigError
from ..core.request import GenerateRequest
from ..models.checkpoint import Checkpoint, find_checkpoint
from ..models.derive import derive_card
from ..models.families import CHANGES_ITS_DENOISER, DEFAULTS
from ..models.latents import knows_latents
from ..models.uses import Route, Use, pipelines_by_use, route
from .long_prompts import read_in_chunks, reads_in_chunks
from .lora.conversion import lora_modules
from .lora.serving import ModuleServing
from .modules import BigModule, big_modules

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPipeline:
    """A loaded pipeline whose networks are suspension points, what else its components can be, and its card."""

    pipeline: DiffusionPipeline
    by_use: Mapping[Use, DiffusionPipeline]
    modules: Mapping[str, BigModule]
    card: ModelCard
    device: torch.device
    runs_alone: bool  # its code changes the shared denoiser, so jobs run one by one

    def route(self, request: GenerateRequest) -> Route:
        """Return how the request is served. Raises RequestError where the model cannot."""
        return route(request, frozenset(self.by_use), knows_latents(self.pipeline))

    def for_job(self, request: GenerateRequest) -> DiffusionPipeline:
        """Return the pipeline that serves the request: the same networks, with fields, solvers and guiders of its own.

        Solvers count their own calls and guiders keep the halves of a step, so two jobs may share neither.
        """
        own = copy.copy(self.by_use[self.route(request).use])
        for name, component in own.components.items():
            if isinstance(component, SchedulerMixin):
                setattr(own, name, type(component).from_config(component.config))
            elif isinstance(component, BaseGuidance):
                setattr(own, name, copy.deepcopy(component))
        own.set_progress_bar_config(disable=True)
        if reads_in_chunks(own):
            read_in_chunks(own)
        return own


def choose_device(wanted: str) -> torch.device:
    """Return the device to serve on. Raises ConfigError for one that is not there."""
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= count:
            raise ConfigError(f"--device '{wanted}': this machine has {count} CUDA devices.")
        return torch.device("cuda", index)
    return device


def load(config: WorkerConfig, say: Callable[[str], None]) -> ServedPipeline:
    """Load the configured model. Raises ConfigError, in one line, when it can never be served.

    `say` is told each stage.
    """
    # A checkpoint's own code is never run; diffusers reads this before it looks.
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    device = choose_device(config.device)
    say(f"finding {config.model_path}")
    checkpoint = find_checkpoint(config.model_path, revision=config.revision, variant=config.variant)
    say(f"loading {checkpoint.name} ({checkpoint.pipeline_class})")
    return prepare(_from_folder(checkpoint, config, device), checkpoint, config, device)


def prepare(
    pipeline: DiffusionPipeline, checkpoint: Checkpoint, config: WorkerConfig, device: torch.device
) -> ServedPipeline:
    """Make a loaded pipeline ready to be served: on its device, with a card, its networks suspension points.

    The pipeline is changed and must not be used by itself afterwards.
    """
    pipeline = pipeline.to(device)
    by_use = pipelines_by_use(pipeline)
    card = derive_card(
        checkpoint,
        pipeline,
        uses=frozenset(by_use),
        served_name=config.served_model_name,
        device=device,
        device_name=device_name(device),
    )
    if config.step_cache == "first-block":
        _enable_step_cache(pipeline, config.step_cache_threshold)
    card = msgspec.structs.replace(card, lora_modules=lora_modules(pipeline))
    modules = big_modules(pipeline)
    for name in card.lora_modules:
        modules[name].loras = ModuleServing(name, modules[name].module, device)
    runs_alone = any(changes_its_denoiser(type(one)) for one in by_use.values())
    for one in {id(one): one for one in by_use.values()}.values():
        one.__class__ = _on_device(type(one), device)
    return ServedPipeline(
        pipeline=pipeline, by_use=by_use, modules=modules, card=card, device=device, runs_alone=runs_alone
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def changes_its_denoiser(pipeline_class: type) -> bool:
    """Say whether a pipeline's own code swaps parts of its denoiser while it runs."""
    source = inspect.getsource(pipeline_class)
    return any(word in source for word in CHANGES_ITS_DENOISER)


def _from_folder(checkpoint: Checkpoint, config: WorkerConfig, device: torch.device) -> DiffusionPipeline:
    try:
        return DiffusionPipeline.from_pretrained(
            checkpoint.folder,
            dtype=_precisions(checkpoint.pipeline_class, config.precision, device),
            variant=config.variant,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, AttributeError, ImportError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"--model-path '{config.model_path}': cannot be loaded ({reason}).") from error


def _precisions(pipeline_class: str, wanted: str, device: torch.device) -> Any:
    if wanted == "fp32" or (wanted == "auto" and device.type == "cpu"):
        return torch.float32
    family = DEFAULTS.get(pipeline_class)
    full = dict.fromkeys(family.fp32, torch.float32) if family is not None else {}
    return full | {"default": torch.bfloat16 if wanted == "auto" else _DTYPES[wanted]}


def _enable_step_cache(pipeline: DiffusionPipeline, threshold: float) -> None:
    found = [part for part in pipeline.components.values() if isinstance(part, CacheMixin)]
    if not found:
        raise ConfigError("--step-cache first-block: this model's denoiser has no step cache in diffusers.")
    for denoiser in found:
        denoiser.enable_cache(FirstBlockCacheConfig(threshold=threshold))


def _on_device(pipeline_class: type[DiffusionPipeline], device: torch.device) -> type[DiffusionPipeline]:
    """A subclass whose device is the worker's.

    diffusers takes a pipeline's device from its first network: with a text encoder parked elsewhere the whole job
    would run there.
    """
    here = property(lambda self: device)
    return type(pipeline_class.__name__, (pipeline_class,), {"device": here, "_execution_device": here})
