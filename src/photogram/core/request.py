"""What one job is asked to make, every default resolved.

A `GenerateRequest` is made in `server/resolve` and nowhere else; the worker takes it as it stands.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Task = Literal["T2I", "I2I", "TI2I", "T2V", "I2V", "TI2V", "V2V"]
LoraTarget = Literal["all", "transformer", "transformer_2", "critic"]
ImageFormat = Literal["png", "jpeg", "webp"]
QualityMode = Literal["exact", "high", "fast"]
MAX_LORA_STRENGTH = 10.0
"""Either way; what lies beyond is a slip of the hand, and noise."""
JSONValue = Any
"""Any JSON value; msgspec has no recursive type for it."""


class LoraUse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One LoRA at one strength. `path` is a safetensors file or a folder that the host has checked; the worker keeps
    what it loaded under the nickname."""

    nickname: str
    path: str
    strength: float = 1.0
    target: LoraTarget = "all"


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One picture or one clip to make: the unit that is queued, scheduled, cancelled and retried.

    `width` and `height` are pixels as drawn by the model (a multiple of the card's `size_multiple`); what is
    delivered is `OutputSpec`'s affair. `images` are paths of pictures that the host has checked and written
    itself, in the order of the request; `video` is the path of a clip as uint8 RGB frames in a NumPy file of shape
    (F, H, W, C), and `mask` of an 8-bit grey picture, 255 where the first image is to be drawn anew. `strength` is
    how far the result may go from the given image or clip, 0 to 1. `loras` is what the job was submitted under, in
    the order of merging. `quality_mode` names what of the denoiser's work may be left out (`core/quality_mode`).
    `extra` holds further keyword arguments of the pipeline's call, already checked against the card's `parameters`.
    """

    job_id: str
    owner: str
    task: Task
    prompt: str
    negative_prompt: str | None = None
    width: int
    height: int
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int
    guidance_scale: float | None = None
    seed: int
    images: tuple[str, ...] = ()
    video: str | None = None
    mask: str | None = None
    strength: float | None = None
    loras: tuple[LoraUse, ...] = ()
    quality_mode: QualityMode = "exact"
    extra: dict[str, JSONValue] = {}
    partial_images: int = 0
    deterministic: bool = False
    priority: int = 0
    timeout_s: float | None = None


class OutputSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The file to deliver. `compression` is 0 (smallest) to 100 (best); PNG ignores it.

    Where `width` and `height` differ from the drawn size, the drawing is enlarged (Lanczos) until it covers them
    and cropped evenly. `fps` is given for a clip. `continues` is the path of a clip in the form of
    `GenerateRequest.video` and of this size: it comes first, and the drawing's first frame, which repeats its last,
    is left out. `continues_sound` is the path of its sound: 32-bit floats in a NumPy file of shape (samples, 2),
    48,000 a second, no samples where it has none.
    """

    width: int
    height: int
    format: ImageFormat | Literal["mp4"]
    compression: int
    original: str | None = None  # the picture whose pixels come back outside the mask
    mask: str | None = None  # 8-bit grey, 255 where the picture is edited
    fps: int | None = None
    continues: str | None = None
    continues_sound: str | None = None
