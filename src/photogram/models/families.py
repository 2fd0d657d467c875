"""One table a fact: what photogram must know of a family because neither signature nor configuration tells it.

A family without a row is served with what its pipeline's signature and configuration tell (`derive.py`); a row is
never needed to be served, only to be served better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PaddedText:
    """A denoiser that is given texts at their true length and takes a mask: padding lets unequal prompts meet."""

    embeds: str  # argument with the text embeddings (B, S, D)
    mask: str  # argument with the mask (B, S), true where there is text


PADDED_TEXT: Mapping[str, PaddedText] = {
    "QwenImageTransformer2DModel": PaddedText("encoder_hidden_states", "encoder_hidden_states_mask"),
}
"""By the denoiser's class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyDefaults:
    """What the model's makers recommend; None leaves it to the pipeline's signature."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    fps: int | None = None
    max_frames: int | None = None
    quality_steps: Mapping[str, int] = field(default_factory=dict)
    fp32: tuple[str, ...] = ()  # components kept in full precision where the rest is bf16


DEFAULTS: Mapping[str, FamilyDefaults] = {
    "StableDiffusionPipeline": FamilyDefaults(width=512, height=512, steps=30, guidance=7.5),
    "StableDiffusionXLPipeline": FamilyDefaults(width=1024, height=1024, steps=30, guidance=5.0, fp32=("vae",)),
    "StableDiffusion3Pipeline": FamilyDefaults(width=1024, height=1024, steps=28, guidance=7.0),
    "FluxPipeline": FamilyDefaults(width=1024, height=1024, steps=28, guidance=3.5),
    "FluxKontextPipeline": FamilyDefaults(width=1024, height=1024, steps=28, guidance=2.5),
    "Flux2Pipeline": FamilyDefaults(width=1024, height=1024, steps=50, guidance=4.0),
    "Flux2KleinPipeline": FamilyDefaults(width=1024, height=1024, steps=4, guidance=1.0),
    "QwenImagePipeline": FamilyDefaults(width=1328, height=1328, steps=50, guidance=4.0),
    "QwenImageEditPipeline": FamilyDefaults(width=1024, height=1024, steps=50, guidance=4.0),
    "QwenImageEditPlusPipeline": FamilyDefaults(width=1024, height=1024, steps=40, guidance=4.0),
    "ZImagePipeline": FamilyDefaults(width=1024, height=1024, steps=9, guidance=0.0),
    "SanaPipeline": FamilyDefaults(width=1024, height=1024, steps=20, guidance=4.5),
    "LTXPipeline": FamilyDefaults(width=704, height=480, steps=50, guidance=3.0, frames=161, fps=25, max_frames=257),
    "HunyuanVideo15Pipeline": FamilyDefaults(width=848, height=480, steps=50, frames=121, fps=24, max_frames=129),
    "HunyuanVideoPipeline": FamilyDefaults(
        width=1280, height=720, steps=50, guidance=6.0, frames=129, fps=24, max_frames=129
    ),
    "CogVideoXPipeline": FamilyDefaults(width=720, height=480, steps=50, guidance=6.0, frames=49, fps=8, max_frames=49),
    "WanPipeline": FamilyDefaults(
        width=832, height=480, steps=50, guidance=5.0, frames=81, fps=16, max_frames=161, fp32=("vae",)
    ),
    "WanImageToVideoPipeline": FamilyDefaults(
        width=832, height=480, steps=50, guidance=5.0, frames=81, fps=16, max_frames=161, fp32=("vae", "image_encoder")
    ),
}
"""By the pipeline's class."""

NEEDS_IMAGE = frozenset(
    {
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "WanImageToVideoPipeline",
        "HunyuanVideo15ImageToVideoPipeline",
        "CogVideoXImageToVideoPipeline",
        "LTXImageToVideoPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLInpaintPipeline",
    }
)
"""Pipelines that cannot do without an input image though their signature says it may be left out."""

CHANGES_ITS_DENOISER = ("set_attn_processor", "attn_processors", "register_forward_hook")
"""A pipeline whose own code says one of these changes the shared denoiser while it runs: its jobs run one by one."""
