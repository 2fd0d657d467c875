"""Between pixels and the latents that a pipeline's solver steps through.

Each family scales its VAE's latents and lays them out in its own way. What the pipeline does at its end to decode is
undone here, so that a picture or a clip can stand where the solver's sample stands.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.nn import functional

# B batch, C channels, T latent frames (absent for pictures), H/W latent height and width, S tokens, D width

# VAEs whose latents the pipelines scale by what stands in the VAE's configuration, and by nothing else.
_KNOWN_VAES = frozenset(
    {"AutoencoderKL", "AutoencoderDC", "AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderKLWan"}
    | {"AutoencoderKLLTXVideo", "AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15"}
)
_VIDEO_VAES = frozenset({"AutoencoderKLQwenImage"})  # of pictures, which they take as clips of one frame


def knows_latents(pipeline: DiffusionPipeline) -> bool:
    """Say whether a picture can be brought into the pipeline's latents, and its solver can noise it."""
    vae, solver = pipeline.components.get("vae"), pipeline.components.get("scheduler")
    if vae is None or solver is None or type(vae).__name__ not in _KNOWN_VAES:
        return False
    can_noise = any(callable(getattr(type(solver), name, None)) for name in ("scale_noise", "add_noise"))
    return can_noise and _layout(pipeline) is not None


def encode(pipeline: DiffusionPipeline, pixels: torch.Tensor) -> torch.Tensor:
    """Return the latents that the pipeline would decode to `pixels`, in the form that its solver steps.

    `pixels` is (B, 3, H, W), or (B, 3, F, H, W) of a clip, in -1..1 and of the drawn size. Calls the VAE's encoder.
    """
    vae = pipeline.vae
    is_clip_of_one = type(vae).__name__ in _VIDEO_VAES and pixels.dim() == 4
    given = pixels.to(device=pipeline._execution_device, dtype=vae.dtype)
    answer = vae.encode(given.unsqueeze(2) if is_clip_of_one else given)
    latents = answer.latent_dist.mode() if "latent_dist" in answer else answer.latent
    if type(vae).__name__ == "AutoencoderKLFlux2":
        latents = _flux_2_normalised(pipeline, latents)
    else:
        latents = _normalised(vae, latents)
    return lay_out(pipeline, latents.squeeze(2) if is_clip_of_one else latents)


def lay_out(pipeline: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Bring (B, C, [T,] H, W) into the form that the pipeline's solver steps; FLUX.2's latents are patches already."""
    layout = _layout(pipeline)
    assert layout is not None, "asked of a pipeline that `knows_latents` refuses"
    return layout(latents)


def mask_latents(pipeline: DiffusionPipeline, mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return a mask (1, 1, height, width), 1 where the picture is drawn anew, laid out like the latents.

    A latent that the mask's edge crosses is mixed by its share. The result broadcasts against the laid out latents.
    """
    scale = _pixels_per_latent(pipeline)
    size = (height // scale, width // scale)
    small = functional.interpolate(mask, size=size, mode="area")
    if type(pipeline.vae).__name__ == "AutoencoderKLFlux2":
        return lay_out(pipeline, small)
    channels = pipeline.vae.config.get("latent_channels", pipeline.vae.config.get("z_dim", 1))
    return lay_out(pipeline, small.expand(1, channels, *size))


def _pixels_per_latent(pipeline: DiffusionPipeline) -> int:
    names = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
    scale: int = next(vars(pipeline)[name] for name in names if name in vars(pipeline))
    return 2 * scale if type(pipeline.vae).__name__ == "AutoencoderKLFlux2" else scale


def _normalised(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None:
        mean, std = vars(vae).get("_buffers", {}).get("latents_mean"), vars(vae)["_buffers"].get("latents_std")
    scaling = config.get("scaling_factor") or 1.0
    if mean is None:
        return (latents - (config.get("shift_factor") or 0.0)) * scaling
    shape = (1, -1) + (1,) * (latents.dim() - 2)
    mean, std = (torch.as_tensor(value).to(latents).view(shape) for value in (mean, std))
    return (latents - mean) * scaling / std


def _flux_2_normalised(pipeline: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Patches of 2 x 2, by the running statistics of the VAE's batch norm."""
    patches, norm = pipeline._patchify_latents(latents), pipeline.vae.bn
    mean = norm.running_mean.view(1, -1, 1, 1).to(patches)
    std = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + pipeline.vae.config.batch_norm_eps).to(patches)
    return (patches - mean) / std


def _layout(pipeline: DiffusionPipeline) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """How the pipeline packs its latents, told by what its own packing takes; None where that is not known."""
    pack = getattr(type(pipeline), "_pack_latents", None)
    if pack is None:
        return lambda latents: latents
    match list(inspect.signature(pack).parameters):
        case ["latents"]:
            return pack
        case ["latents", "batch_size", "num_channels_latents", "height", "width"]:
            return lambda latents: pack(latents, *latents.shape)
        case ["latents", "patch_size", "patch_size_t"]:
            return lambda latents: pack(
                latents, pipeline.transformer_spatial_patch_size, pipeline.transformer_temporal_patch_size
            )
    return None
