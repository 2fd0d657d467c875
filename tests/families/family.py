"""What a test needs to know of a family: how to make its folder, and how to call it.

Latent geometry is the published one in every folder unless a comment there says otherwise (so sizes and frame counts
mean the same as in the real checkpoints); widths and depths are tiny.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

WIDE = {"height": 64, "width": 128}
TALL = {"height": 128, "width": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One diffusers pipeline class in one configuration, tiny, with random weights."""

    name: str
    pipeline_class: str
    media: Literal["image", "video"]
    build: Callable[[Path], None]
    """Write a complete diffusers folder, in fp32, the same bytes every time."""
    call: Mapping[str, object]
    """Arguments of a small and quick call with guidance on, without prompt, negative prompt, image and seed."""
    wide: Mapping[str, int]
    tall: Mapping[str, int]
    """Two sizes of equal token count, landscape and portrait, to lay over `call`."""
    solver: str
    """Class of the noise schedule."""
    guidance: Literal["rows", "calls", "guider"]
    """How the prompt and the negative prompt meet: as the rows of one denoiser call, as two calls a step, or as two
    calls that the pipeline's guider makes (its scale is in the folder, not in the call)."""
    unguided: Mapping[str, object] = field(default_factory=dict)
    """Arguments over `call` that leave one row and one call a step; empty where the call cannot say so."""
    denoisers: tuple[str, ...] = ("transformer",)
    packed: bool = False
    """Whether latents go to the denoiser as a row of tokens: calls of `wide` and `tall` then have the same shapes, and
    position arguments alone tell them apart."""
    negative_prompt: bool = True
    """Whether the call takes a `negative_prompt`."""
    image: Literal["never", "optional", "required"] = "never"
    """Whether the call takes `image`, as a PIL picture."""
    many_images: bool = False
    """Whether `image` may be a list, of pictures of different sizes."""


def small(*, height: int = 64, width: int = 64, num_inference_steps: int = 3, **more: object) -> dict[str, object]:
    """Arguments of a quick call."""
    return {"height": height, "width": width, "num_inference_steps": num_inference_steps, **more}
