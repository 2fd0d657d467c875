"""One table a fact: what photogram must know of a family because neither signature nor configuration tells it.

A family without a row is served with what its pipeline's signature and configuration tell (`derive.py`); a row is
never needed to be served, only to be served better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..core.request import JSONValue


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
    negative_prompt: str | None = None  # of requests that name none, where the pipeline guides by no other
    frames: int | None = None
    fps: int | None = None
    max_frames: int | None = None
    quality_steps: Mapping[str, int] = field(default_factory=dict)
    defaults: Mapping[str, JSONValue] = field(default_factory=dict)  # of further parameters of the call
    fp32: tuple[str, ...] = ()  # components kept in full precision where the rest is bf16


# The makers' model cards, as of each family's first release.
_LTX = FamilyDefaults(width=704, height=480, steps=50, guidance=3.0, frames=161, fps=25, max_frames=257)
_LTX_2 = FamilyDefaults(width=768, height=512, steps=30, guidance=3.0, frames=121, fps=24, max_frames=481)
_HUNYUAN_15 = FamilyDefaults(width=848, height=480, steps=50, frames=121, fps=24, max_frames=129)
_COGVIDEOX = FamilyDefaults(width=720, height=480, steps=50, guidance=6.0, frames=49, fps=8, max_frames=49)
_WAN = FamilyDefaults(width=832, height=480, steps=50, guidance=5.0, frames=81, fps=16, max_frames=161, fp32=("vae",))

DEFAULTS: Mapping[str, FamilyDefaults] = {
    "StableDiffusionPipeline": FamilyDefaults(width=512, height=512, steps=30, guidance=7.5),
    "StableDiffusionXLPipeline": FamilyDefaults(width=1024, height=1024, steps=30, guidance=5.0, fp32=("vae",)),
    "StableDiffusion3Pipeline": FamilyDefaults(width=1024, height=1024, steps=28, guidance=7.0),
    "FluxPipeline": FamilyDefaults(width=1024, height=1024, steps=28, guidance=3.5),
    "FluxKontextPipeline": FamilyDefaults(width=1024, height=1024, steps=28, guidance=2.5),
    "Flux2Pipeline": FamilyDefaults(width=1024, height=1024, steps=50, guidance=4.0),
    "Flux2KleinPipeline": FamilyDefaults(width=1024, height=1024, steps=4, guidance=1.0),
    "QwenImagePipeline": FamilyDefaults(width=1328, height=1328, steps=50, guidance=4.0, negative_prompt=" "),
    "QwenImageEditPipeline": FamilyDefaults(width=1024, height=1024, steps=50, guidance=4.0, negative_prompt=" "),
    "QwenImageEditPlusPipeline": FamilyDefaults(width=1024, height=1024, steps=40, guidance=4.0, negative_prompt=" "),
    "ZImagePipeline": FamilyDefaults(width=1024, height=1024, steps=9, guidance=0.0),
    "SanaPipeline": FamilyDefaults(width=1024, height=1024, steps=20, guidance=4.5),
    "LTXPipeline": _LTX,
    "LTXImageToVideoPipeline": _LTX,
    "LTXConditionPipeline": _LTX,
    "LTX2Pipeline": _LTX_2,
    "LTX2ImageToVideoPipeline": _LTX_2,
    "HunyuanVideo15Pipeline": _HUNYUAN_15,
    "HunyuanVideo15ImageToVideoPipeline": _HUNYUAN_15,
    "HunyuanVideoPipeline": FamilyDefaults(
        width=1280, height=720, steps=50, guidance=6.0, frames=129, fps=24, max_frames=129
    ),
    "CogVideoXPipeline": _COGVIDEOX,
    "CogVideoXImageToVideoPipeline": _COGVIDEOX,
    "WanPipeline": _WAN,
    "WanImageToVideoPipeline": replace(_WAN, fp32=("vae", "image_encoder")),
}
"""By the pipeline's class."""

_SMALL_WAN_HEADS = 12  # of the 1.3B transformers; the 14B ones have 40


def checkpoint_defaults(
    pipeline_class: str, family: FamilyDefaults, config: Mapping[str, object], denoiser: Mapping[str, object]
) -> FamilyDefaults:
    """Return a family's defaults as they are for one of several checkpoints under the same class.

    They are told apart by the configurations of the pipeline and of its denoiser, never by a name.
    """
    if pipeline_class in ("WanPipeline", "WanImageToVideoPipeline"):
        return _wan_defaults(pipeline_class == "WanImageToVideoPipeline", family, config, denoiser)
    if pipeline_class in ("LTX2Pipeline", "LTX2ImageToVideoPipeline") and denoiser.get("use_prompt_embeddings"):
        # LTX-2.0. From 2.3 on the text is brought to each half's width before the denoiser, and the defaults of
        # the pipeline's own call are right.
        own = {"spatio_temporal_guidance_blocks": [29], "use_cross_timestep": False}
        return replace(family, steps=40, guidance=4.0, defaults=own)
    return family


def _wan_defaults(
    takes_image: bool, family: FamilyDefaults, config: Mapping[str, object], denoiser: Mapping[str, object]
) -> FamilyDefaults:
    if config.get("expand_timesteps"):  # Wan 2.2 TI2V-5B
        return replace(family, width=1280, height=704, frames=121, fps=24, max_frames=241)
    if config.get("boundary_ratio") is not None:  # Wan 2.2 A14B: a transformer for each half, with its own guidance
        if takes_image:
            return replace(family, width=1280, height=720, steps=40, guidance=3.5)
        second = {"guidance_scale_2": 3.0}
        return replace(family, width=1280, height=720, steps=40, guidance=4.0, defaults=second)
    heads = denoiser.get("num_attention_heads")
    if isinstance(heads, int) and heads <= _SMALL_WAN_HEADS:  # Wan 2.1 1.3B, made for 480p
        return replace(family, guidance=3.0)
    # 14B. Of image-to-video there is one for 480p and one for 720p, of equal configuration: the smaller size.
    return family if takes_image else replace(family, width=1280, height=720)


FASTER_WITH: Mapping[str, Mapping[str, str]] = {
    "UNet2DConditionModel": {"cuda_graphs": "a step of SDXL at 1024 px takes 45 ms with them, 60 without (H100)"},
    "QwenImageTransformer2DModel": {"cuda_graphs": "a call at 512 px takes 58 ms with them, 132 without (H100)"},
}
"""By the denoiser's class: what of a worker's tuning is switched on by itself on a GPU, and the figure that speaks for
it. Only what was measured to be faster, and gives the same bits or errs no more against fp32."""

NEEDS_IMAGE = frozenset(
    {
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "WanImageToVideoPipeline",
        "HunyuanVideo15ImageToVideoPipeline",
        "CogVideoXImageToVideoPipeline",
        "LTXImageToVideoPipeline",
        "LTX2ImageToVideoPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLInpaintPipeline",
    }
)
"""Pipelines that cannot do without an input image though their signature says it may be left out."""

SWITCHES_NEED: Mapping[str, str] = {"enable_prompt_enhancement": "processor"}
"""Parameters that switch on what a pipeline can do only with an optional component, and which component."""

REFERENCES_AS_GIVEN = frozenset({"Flux2Pipeline", "Flux2KleinPipeline"})
"""Pipelines that look at an edit's pictures as large as they come; Kontext's and Qwen's bring them to a megapixel."""

CHANGES_ITS_DENOISER = ("set_attn_processor", "attn_processors", "register_forward_hook")
"""A pipeline whose own code says one of these changes the shared denoiser while it runs: its jobs run one by one."""
