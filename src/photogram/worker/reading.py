"""Reads a checkpoint's pipeline and networks from its folder: what stays on a GPU straight to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

from ..core.errors import ConfigError
from ..core.worker_config import Precisions, WorkerConfig
from ..models.checkpoint import Checkpoint, read_index
from ..models.sizes import precision_of
from ..models.two_stages import UPSAMPLER, has_upsampler
from .networks import read_networks
from .placement import is_offloaded

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pipeline_from_folder(checkpoint: Checkpoint, config: WorkerConfig, device: torch.device) -> DiffusionPipeline:
    """Load the pipeline: what stays on a GPU straight to it, what waits in host memory from the files' mapped pages.

    Raises ConfigError where it cannot be loaded, as all of this file does.
    """
    precisions = precisions_of(checkpoint, config.precisions, device)
    read = networks_from_folder(
        checkpoint, config, precisions, device, lambda name: not is_offloaded(name, config.placement)
    )
    with as_config_error(config):
        return DiffusionPipeline.from_pretrained(
            checkpoint.folder,
            dtype=precisions,
            variant=config.variant,
            use_safetensors=True,
            local_files_only=True,
            **read,
        )


def networks_from_folder(
    checkpoint: Checkpoint,
    config: WorkerConfig,
    precisions: Mapping[str, torch.dtype],
    device: torch.device,
    wanted: Callable[[str], bool],
) -> dict[str, torch.nn.Module]:
    """Read networks straight to a GPU. On a CPU none: `from_pretrained` maps the files there, and all processes share
    the page cache's one copy."""
    if device.type == "cpu":
        return {}
    began = time.perf_counter()
    with as_config_error(config):
        index = read_index(checkpoint.folder, config.model_path)
        read = read_networks(checkpoint.folder, index, precisions, device, wanted=wanted, variant=config.variant)
    num_bytes = sum(tensor.nbytes for network in read.values() for tensor in network.parameters())
    seconds = time.perf_counter() - began
    logger.info("read %.1f GB straight to %s in %.1f s (%s)", num_bytes / 1e9, device, seconds, ", ".join(sorted(read)))
    return read


def upsampler_from_folder(checkpoint: Checkpoint, config: WorkerConfig, device: torch.device) -> torch.nn.Module | None:
    """Load the network that enlarges latents, where the checkpoint has one beside its pipeline."""
    if not has_upsampler(checkpoint):
        return None
    precision = precision_of(UPSAMPLER, config.precisions, checkpoint.pipeline_class, default_precision(device))
    with as_config_error(config):
        network = LTX2LatentUpsamplerModel.from_pretrained(
            checkpoint.folder,
            subfolder=UPSAMPLER,
            torch_dtype=_DTYPES[precision],
            variant=config.variant,
            use_safetensors=True,
            local_files_only=True,
        )
    return network.eval()


@contextmanager
def as_config_error(config: WorkerConfig) -> Iterator[None]:
    """Say in one line why a checkpoint cannot be loaded, whatever the libraries raise."""
    try:
        yield
    except (OSError, ValueError, AttributeError, ImportError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"--model-path '{config.model_path}': cannot be loaded ({reason}).") from error


def default_precision(device: torch.device) -> str:
    return "fp32" if device.type == "cpu" else "bf16"


def precisions_of(checkpoint: Checkpoint, wanted: Precisions, device: torch.device) -> dict[str, torch.dtype]:
    """Precision of each component that the checkpoint names, and as ``default`` that of any other."""
    default = default_precision(device)
    chosen = {"default": _DTYPES[default if wanted.all == "auto" else wanted.all]}
    for name in DiffusionPipeline.load_config(checkpoint.folder, local_files_only=True):
        chosen[name] = _DTYPES[precision_of(name, wanted, checkpoint.pipeline_class, default)]
    return chosen
