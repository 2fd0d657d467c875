"""A request as keyword arguments of its pipeline's call, and the call's result as pixels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..core.card import ModelCard
from ..core.errors import GenerationFailed
from ..core.request import GenerateRequest
from ..models.derive import EDIT_STRENGTH, guidance_parameter
from ..models.families import REFERENCES_AS_GIVEN
from ..models.uses import Route
from .inputs import as_reference, fitted, open_clip, open_mask, open_picture

INPAINT_STRENGTH = 1.0
"""Of the masked part, where the request names none: nothing of what was there stays."""

_PIXELS_AT_ONCE = 1 << 22
"""Converted to bytes at once: four times their bytes are taken for it, several times over."""

CLIP_STRENGTH = 0.8
"""Of a clip drawn anew, where the request names none."""


def strength_of(request: GenerateRequest) -> float:
    if request.strength is not None:
        return request.strength
    return EDIT_STRENGTH if request.video is None else CLIP_STRENGTH


def call_arguments(
    pipeline: DiffusionPipeline, route: Route, request: GenerateRequest, card: ModelCard
) -> dict[str, Any]:
    """Return the keyword arguments of one job; only those its pipeline has, with a generator of the job's own.

    The generator is the CPU's whatever the device, so that a seed gives the same noise everywhere.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "pt",
        "return_dict": False,
        # Some pipelines would draw at a size of their own choice: Sana at the nearest of a table, Kontext at an area.
        "use_resolution_binning": False,
        "max_area": request.width * request.height,
    }
    if request.negative_prompt is not None:
        arguments["negative_prompt"] = request.negative_prompt
    guidance = guidance_parameter(parameters)
    if guidance is not None and request.guidance_scale is not None:
        arguments[guidance] = request.guidance_scale
    if request.num_frames is not None:
        arguments["num_frames"] = request.num_frames
    if request.fps is not None:
        arguments["frame_rate"] = request.fps
    arguments |= request.extra | _given(pipeline, route, request, card)
    return {name: value for name, value in arguments.items() if name in parameters}


def _given(pipeline: DiffusionPipeline, route: Route, request: GenerateRequest, card: ModelCard) -> dict[str, Any]:
    """The pictures or the clip as the route's use takes them; those that are drawn over come at the drawn size.

    Raises ValueError for a picture that the pipeline looks at in no case.
    """
    size = (request.width, request.height)
    match route.use:
        case "clip":
            return {"video": open_clip(request), "strength": strength_of(request)}
        case "redraw":
            return {"image": fitted(open_picture(request.images[0]), *size), "strength": strength_of(request)}
        case "inpaint":
            picture, mask = fitted(open_picture(request.images[0]), *size), open_mask(str(request.mask), *size)
            strength = INPAINT_STRENGTH if request.strength is None else request.strength
            return {"image": picture, "mask_image": mask, "strength": strength}
    if route.reference_images:
        images = [open_picture(path) for path in request.images]
        if card.pipeline_class in REFERENCES_AS_GIVEN:
            images = _references(pipeline, route, request, card, images)
        return {"image": images[0] if len(images) == 1 else images}
    return {}


def _references(
    pipeline: DiffusionPipeline, route: Route, request: GenerateRequest, card: ModelCard, images: list[Image.Image]
) -> list[Image.Image]:
    """An edit's pictures at the size to look at, for a pipeline that leaves that to its caller."""
    if card.max_native_pixels is not None:
        size = (request.width, request.height)
        # What a mask keeps is the first picture as it lies in the drawing, so it is looked at lying there.
        kept = [fitted(images.pop(0), *size)] if route.keeps_outside else []
        images = kept + [as_reference(image, *size, card.size_multiple) for image in images]
    for image in images:
        # The pipeline would do so itself, once the prompt has been encoded.
        pipeline.image_processor.check_image_input(image)
    return images


def for_two_prompts(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments of the same call made for two prompts, as the stacker learns from it.

    Pipelines differ in whether two prompts may share a picture: the second form gives each its own.
    """
    doubled = dict(arguments)
    for name in ("prompt", "negative_prompt"):
        if name in doubled and doubled[name] is not None:
            doubled[name] = [doubled[name], doubled[name]]
    pictures = {name: [doubled[name]] * 2 for name in ("image", "mask_image", "video") if name in doubled}
    latents = {name: torch.cat([doubled[name]] * 2) for name in ("latents", "audio_latents") if name in doubled}
    doubled |= latents  # what a stage goes on from is each job's own
    forms = [doubled, doubled | pictures] if pictures else [doubled]
    return [form | {"generator": [torch.Generator("cpu").manual_seed(seed) for seed in (0, 1)]} for form in forms]


def to_sound(pipeline: DiffusionPipeline, result: Any) -> tuple[np.ndarray, int] | None:
    """Return the sound of a clip as float32 (samples, channels) and its samples a second; None where there is none.

    Raises GenerationFailed for samples that are no numbers.
    """
    vocoder = pipeline.components.get("vocoder")
    if vocoder is None or not isinstance(result, tuple) or len(result) < 2 or result[1] is None:
        return None
    waves = result[1].float()
    waves = waves[0] if waves.dim() == 3 else waves  # (B, channels, samples)
    if not torch.isfinite(waves).all():
        raise GenerationFailed("The model's sound is not a number (NaN or infinite); try fp32 or other settings.")
    return waves.clamp(-1, 1).T.contiguous().cpu().numpy(), vocoder.config.output_sampling_rate


def to_frames(result: Any) -> np.ndarray:
    """Return a pipeline's result as uint8 RGB (F, H, W, C); an image is one frame.

    Raises GenerationFailed for pixels that are no numbers and for results of unknown kinds.
    """
    pixels = result[0] if isinstance(result, tuple) else result
    if isinstance(pixels, list):
        pixels = torch.stack(pixels)
    if not isinstance(pixels, torch.Tensor):
        raise GenerationFailed(f"The pipeline returned {type(pixels).__name__}, not pixels.")
    if pixels.dim() == 5:  # (B, F, C, H, W)
        pixels = pixels[0]
    num_frames, channels, height, width = pixels.shape
    frames = _host_memory((num_frames, height, width, channels), pixels.device)
    step = max(1, _PIXELS_AT_ONCE // (height * width))
    is_number = torch.ones((), dtype=torch.bool, device=pixels.device)
    for first in range(0, num_frames, step):
        some = pixels[first : first + step]
        is_number &= torch.isfinite(some).all()
        # As diffusers' numpy_to_pil does it, on the device: a quarter of the bytes to copy.
        as_bytes = (some.float().clamp(0, 1) * 255).round().to(torch.uint8)
        frames[first : first + step].copy_(as_bytes.permute(0, 2, 3, 1).contiguous(), non_blocking=True)
    if not is_number:  # known once all before it is done, the copies too
        raise GenerationFailed("The model's output is not a number (NaN or infinite); try fp32 or other settings.")
    return frames.numpy()


def _host_memory(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return memory for bytes that come from the device: from a GPU pinned memory, if it can be had."""
    if device.type == "cuda":
        try:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            pass  # no more may be pinned
    return torch.empty(shape, dtype=torch.uint8)
