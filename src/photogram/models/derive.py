"""A model's card, from the pipeline's own signature and configuration, the family's table and the folder's own file.

This is where diffusers' conventions are read: names of parameters, attributes that tell scale factors. What is not
found takes the most common value.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import torch
from diffusers import DiffusionPipeline

from ..core.card import ModelCard, ParameterKind
from ..core.errors import ConfigError
from ..core.request import Task
from .checkpoint import CARD_FILE, Checkpoint
from .families import DEFAULTS, SWITCHES_NEED, FamilyDefaults, checkpoint_defaults
from .latents import knows_latents
from .two_stages import SCALE, TWO_STAGES, UPSAMPLER, enlarged
from .uses import Use

# Set by the server itself, or meaningless to a client.
_RESERVED = frozenset(
    {"self", "prompt", "negative_prompt", "image", "images", "height", "width", "num_inference_steps", "generator"}
    | {"num_images_per_prompt", "num_videos_per_prompt", "output_type", "return_dict", "num_frames", "frame_rate"}
    | {"video", "mask_image", "strength", "batch_size", "max_area", "use_resolution_binning"}
)
_RESERVED_PARTS = ("embeds", "callback", "_kwargs", "attention_mask", "latents", "ip_adapter", "image")

EDIT_STRENGTH = 0.7
"""Of an edit that names no strength, by a model that draws the picture anew: enough for the prompt to show, and the
picture's composition stays."""

_KINDS: Mapping[type, ParameterKind] = {bool: "bool", int: "int", float: "float", str: "str"}


def guidance_parameter(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """Return the name under which the pipeline takes the strength of the prompt.

    With `true_cfg_scale` above 1 by default (Qwen-Image) that is it; FLUX.1 has both and means the other one.
    """
    true_cfg = parameters.get("true_cfg_scale")
    if true_cfg is not None and isinstance(true_cfg.default, int | float) and true_cfg.default > 1:
        return "true_cfg_scale"
    return "guidance_scale" if "guidance_scale" in parameters else None


def derive_card(
    checkpoint: Checkpoint,
    pipeline: DiffusionPipeline,
    *,
    served_name: str | None,
    device: torch.device,
    device_name: str,
    uses: frozenset[Use],
    num_gpus: int = 1,
    num_replicas: int = 1,
    upsampler: torch.nn.Module | None = None,
    families: Mapping[str, FamilyDefaults] = DEFAULTS,
) -> ModelCard:
    """Return the card of a loaded pipeline and what its components can become.

    With an `upsampler` the model's clips are made in two stages unless a request says otherwise.
    Raises ConfigError when the folder's own card file does not fit.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    family = families.get(checkpoint.pipeline_class, FamilyDefaults())
    transformer = pipeline.components.get("transformer")
    if families and transformer is not None:
        family = checkpoint_defaults(checkpoint.pipeline_class, family, pipeline.config, transformer.config)
    if upsampler is not None:
        family = enlarged(family)
    media: Literal["image", "video"] = "video" if {"num_frames", "video"} & parameters.keys() else "image"
    multiple = token_side(pipeline) * (SCALE if upsampler is not None else 1)
    width, height = _default_size(pipeline, parameters, family, multiple)
    guidance = guidance_parameter(parameters)
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    if upsampler is not None:
        modules[UPSAMPLER] = upsampler
    tensors = [tensor for module in modules.values() for tensor in module.parameters()]
    lacking = {
        switch: component
        for switch, component in SWITCHES_NEED.items()
        if switch in parameters and pipeline.components.get(component) is None
    }
    in_latents = knows_latents(pipeline)
    tasks = _tasks(uses, media, in_latents)
    card: dict[str, Any] = {
        "name": served_name or checkpoint.name,
        "model_path": checkpoint.name,
        "revision": checkpoint.revision,
        "pipeline_class": checkpoint.pipeline_class,
        "tasks": tasks,
        "media": media,
        "default_width": width,
        "default_height": height,
        "size_multiple": multiple,
        "min_side": max(16, multiple),
        "default_steps": family.steps or _default(parameters, "num_inference_steps", 50),
        "default_guidance": family.guidance if family.guidance is not None else _default(parameters, guidance, None),
        "takes_guidance": guidance is not None,
        "takes_negative_prompt": "negative_prompt" in parameters,
        "default_negative_prompt": family.negative_prompt,
        "max_input_images": _max_input_images(tasks, parameters),
        "takes_mask": media == "image" and (in_latents or "inpaint" in uses),
        "takes_strength": in_latents or bool({"redraw", "clip"} & uses),
        "edit_strength": EDIT_STRENGTH if media == "image" and "image" not in uses and "I2I" in tasks else None,
        "quality_steps": dict(family.quality_steps),
        "defaults": dict(family.defaults),
        "parameters": {
            name: kind for name, kind in request_parameters(parameters, guidance).items() if name not in lacking
        },
        "lacking": lacking,
        "precisions": {name: precision(module) for name, module in modules.items()},
        "device": str(device),
        "device_name": device_name,
        "num_gpus": num_gpus,
        "num_replicas": num_replicas,
        "parameters_count": sum(tensor.numel() for tensor in tensors),
        "loaded_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }
    if media == "video":
        frames = family.frames or _default(parameters, "num_frames", 81)
        card |= {
            "default_frames": frames,
            "frame_multiple": _first_number(pipeline, "vae_scale_factor_temporal", "vae_temporal_compression_ratio", 4),
            "max_frames": family.max_frames or max(2 * frames, 161),
            "default_fps": family.fps or int(_default(parameters, "frame_rate", 16)),
        }
    card |= checkpoint.overrides
    if upsampler is not None:
        card["parameters"] = {TWO_STAGES: "bool"} | card["parameters"]
        card["defaults"] = {TWO_STAGES: True} | card["defaults"]
    try:
        return msgspec.convert(card, ModelCard)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{CARD_FILE} of '{checkpoint.name}': {error}") from None


def token_side(pipeline: DiffusionPipeline) -> int:
    """Return the pixels a side of what the denoiser takes as one token: the VAE's scale times the denoiser's patch."""
    scale = _first_number(pipeline, "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor", 8)
    denoiser = pipeline.components.get("transformer") or pipeline.components.get("unet")
    config = denoiser.config if denoiser is not None else {}
    patch = config.get("patch_size", config.get("all_patch_size", 1))
    if isinstance(patch, list | tuple):
        patch = max(patch)
    # Pipelines that pack 2x2 latents into one token do it in their own code, with a patch size of 1.
    packs = any(callable(getattr(type(pipeline), name, None)) for name in ("_pack_latents", "_patchify_latents"))
    if not isinstance(patch, int) or patch < 2:
        patch = 2 if packs and scale < 32 else 1
    return scale * patch


def request_parameters(parameters: Mapping[str, inspect.Parameter], guidance: str | None) -> dict[str, ParameterKind]:
    """Return the call arguments a request may set by name: plain values that are not the server's own affair."""
    found: dict[str, ParameterKind] = {}
    for name, parameter in parameters.items():
        if (
            name in _RESERVED
            or name == guidance
            or name.startswith("_")
            or any(part in name for part in _RESERVED_PARTS)
        ):
            continue
        kind = _KINDS.get(type(parameter.default)) or _kind_of_annotation(str(parameter.annotation))
        if kind is not None:
            found[name] = kind
    return found


def _kind_of_annotation(annotation: str) -> ParameterKind | None:
    """Kind of a parameter whose default is None; the annotation is all there is to go by."""
    for word, kind in (("list[", "json"), ("List[", "json"), ("bool", "bool"), ("float", "float"), ("int", "int")):
        if word in annotation:
            return kind  # type: ignore[return-value]
    return "str" if "str" in annotation else None


def precision(module: torch.nn.Module) -> str:
    """Return the short name of the precision that most of a module's weights have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in module.parameters():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}
    dtype = max(counts, key=lambda key: counts[key], default=torch.float32)
    return names.get(dtype, str(dtype).removeprefix("torch."))


def _tasks(uses: frozenset[Use], media: Literal["image", "video"], in_latents: bool) -> tuple[Task, ...]:
    """What the model can be asked for; what it is made for comes first."""
    text, image = "text" in uses, "image" in uses
    if media == "video":
        clips: tuple[Task, ...] = ("V2V",) if "clip" in uses or (text and in_latents) else ()
        drawn: tuple[Task, ...] = ("TI2V", "T2V", "I2V") if text and image else ("T2V",) if text else ("I2V",)
        return drawn + clips
    if text and image:
        return ("TI2I", "T2I", "I2I")
    if not text:
        return ("I2I",)
    return ("T2I", "I2I") if "redraw" in uses or in_latents else ("T2I",)


def _max_input_images(tasks: tuple[Task, ...], parameters: Mapping[str, inspect.Parameter]) -> int:
    if not {"I2I", "I2V"} & set(tasks):
        return 0
    image = parameters.get("image")
    annotation = "" if image is None or "strength" in parameters else str(image.annotation)
    takes_lists = "list[" in annotation.lower() or "PipelineImageInput" in annotation
    return 16 if takes_lists and "I2I" in tasks else 1


def _default_size(
    pipeline: DiffusionPipeline, parameters: Mapping[str, inspect.Parameter], family: FamilyDefaults, multiple: int
) -> tuple[int, int]:
    width, height = family.width, family.height
    if width is None or height is None:
        width, height = _default(parameters, "width", None), _default(parameters, "height", None)
    if width is None or height is None:
        latent_side = _first_number(pipeline, "default_sample_size", 64)
        scale = _first_number(pipeline, "vae_scale_factor_spatial", "vae_scale_factor", 8)
        width = height = latent_side * scale
    return math.ceil(width / multiple) * multiple, math.ceil(height / multiple) * multiple


def _default(parameters: Mapping[str, inspect.Parameter], name: str | None, fallback: Any) -> Any:
    """Default of a number parameter, where the signature has one."""
    if name is None or name not in parameters:
        return fallback
    value = parameters[name].default
    return value if isinstance(value, int | float) and not isinstance(value, bool) else fallback


def _first_number(pipeline: DiffusionPipeline, *names_then_fallback: str | int) -> int:
    """First of the pipeline's own fields that holds a whole number; they are set in each `__init__`."""
    *names, fallback = names_then_fallback
    for name in names:
        value = vars(pipeline).get(str(name))
        if isinstance(value, int):
            return value
    return int(fallback)
