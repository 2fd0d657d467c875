"""The shapes of the answers, and the table of the fields that a picture's request may have.

The wire's names are OpenAI's. Absent facts are left out of an answer, never null, unless its client needs the null.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import msgspec

from ..core.request import ImageFormat, QualityMode
from ..media.provenance import UsedLora
from .fields import MAX_INT, MAX_TEXT, Field
from .lora_fields import LORAS_FIELD

MAX_IMAGES = 10
MAX_PARTIALS = 3
MAX_PRIORITY = 10
MAX_GUIDANCE = 100

QUALITY_WORDS = ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")
ECHOED_QUALITIES = frozenset({"low", "medium", "high", "xhigh", "max"})
"""The only values of `quality` that OpenAI's types allow in an answer."""


@cache
def image_fields(max_steps: int) -> tuple[Field, ...]:
    """Every field of `POST /v1/images/generations` that means something here."""
    return (
        Field(name="prompt", kind="str", high=MAX_TEXT, help="What the picture shows. Required."),
        Field(name="model", kind="str", high=512, help="Any name; the served model answers unless --strict-model."),
        Field(name="n", kind="int", low=1, high=MAX_IMAGES, help="How many pictures; the i-th has the seed plus i."),
        Field(name="size", kind="str", high=64, help="Width x height in pixels, such as 1024x1024, or auto."),
        Field(name="width", kind="int", low=1, help="Pixels; together with height, instead of size."),
        Field(name="height", kind="int", low=1, help="Pixels; together with width, instead of size."),
        Field(
            name="negative_prompt",
            kind="str",
            high=MAX_TEXT,
            help="What the picture shall not show; default: the model has its own, or none.",
        ),
        Field(
            name="strength",
            kind="float",
            low=0.01,
            high=1,
            help="Of edits: how far the result may go from the first picture. Models that edit do without.",
        ),
        Field(
            name="input_fidelity",
            kind="word",
            words=("low", "high"),
            help="Of edits by a model that edits by strength: high keeps more of the picture. A strength wins.",
        ),
        Field(name="seed", kind="int", low=0, high=MAX_INT, help="Start of the random numbers; default: a random one."),
        Field(
            name="num_inference_steps",
            kind="int",
            aliases=("steps", "num_steps"),
            low=1,
            high=max_steps,
            help="Denoising steps; default: the model's.",
        ),
        Field(
            name="guidance_scale",
            kind="float",
            aliases=("cfg_scale", "guidance"),
            low=0,
            high=MAX_GUIDANCE,
            help="How strongly the prompt steers; default: the model's.",
        ),
        Field(
            name="true_cfg_scale",
            kind="float",
            low=0,
            high=MAX_GUIDANCE,
            help="The pipeline's argument of that name, else the same as guidance_scale.",
        ),
        Field(name="quality", kind="word", words=QUALITY_WORDS, help="Maps to steps where the model defines it."),
        Field(
            name="quality_mode",
            kind="word",
            words=("exact", "high", "fast"),
            help="exact runs every call of the model; high and fast leave calls out, which shows a little, or more. "
            "Default: --quality-mode.",
        ),
        Field(
            name="response_format",
            kind="word",
            words=("b64_json", "url"),
            help="Default b64_json; url for model names that start with dall-e.",
        ),
        Field(name="output_format", kind="word", words=("png", "jpeg", "jpg", "webp"), help="Default png."),
        Field(
            name="output_quality",
            kind="word",
            aliases=("output-quality",),
            words=("maximum", "high", "medium", "low", "default"),
            help="Preset of output_compression: 100, 90, 55, 35, 75. PNG ignores it.",
        ),
        Field(
            name="output_compression",
            kind="int",
            aliases=("output-compression",),
            low=0,
            high=100,
            help="0 smallest file, 100 best quality; wins over output_quality. PNG ignores it.",
        ),
        Field(
            name="background",
            kind="word",
            words=("auto", "opaque", "transparent"),
            help="transparent needs png or webp, and a model that can draw it.",
        ),
        Field(name="stream", kind="bool", help="Answer with server-sent events."),
        Field(
            name="partial_images",
            kind="int",
            low=0,
            high=MAX_PARTIALS,
            help="Pictures of the unfinished work sent on a stream.",
        ),
        Field(name="stream_progress", kind="bool", help="Send photogram.progress events on a stream, too."),
        Field(
            name="priority",
            kind="int",
            low=-MAX_PRIORITY,
            high=MAX_PRIORITY,
            help="Higher runs sooner; default 0.",
        ),
        LORAS_FIELD,
        Field(name="deterministic", kind="bool", help="The same bytes for the same seed at any load."),
        Field(
            name="task_type",
            kind="word",
            words=("t2i", "i2i", "ti2i", "t2v", "i2v", "ti2v"),
            help="Checked against the served model's tasks.",
        ),
    )


MEANINGLESS_FIELDS = frozenset({"user", "safety_identifier", "moderation", "style", "complexity", "generator_device"})
"""Documented by OpenAI or SGLang, accepted, and without effect on what is drawn here."""

OF_SOME_MODELS: Mapping[str, str] = {
    "two_stages": "it has no network that enlarges latents (the folder 'latent_upsampler' beside its model_index.json)"
}
"""Switches that the cards of some models offer, and why other models refuse them."""


# --- images -------------------------------------------------------------------------------------------------------


class TokenDetails(msgspec.Struct, frozen=True):
    image_tokens: int
    text_tokens: int


class Usage(msgspec.Struct, frozen=True):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails
    output_tokens_details: TokenDetails


class ImageItem(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One picture: either `b64_json` (bytes, written as base64) or `url`, never both."""

    b64_json: bytes | None = None
    url: str | None = None
    id: str
    seed: int
    generated_size: str


class ImagesAnswer(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    created: int
    data: list[ImageItem]
    background: Literal["opaque", "transparent"]
    output_format: ImageFormat
    quality: str | None = None
    size: str
    quality_mode: QualityMode = "exact"
    loras: tuple[UsedLora, ...] = ()
    usage: Usage


class PartialImage(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "image_generation.partial_image"
    b64_json: bytes
    created_at: int
    size: str
    quality: str
    background: str
    output_format: ImageFormat
    partial_image_index: int
    index: int


class CompletedImage(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "image_generation.completed"
    b64_json: bytes
    created_at: int
    size: str
    quality: str
    background: str
    output_format: ImageFormat
    usage: Usage
    index: int
    id: str
    seed: int
    generated_size: str
    quality_mode: QualityMode
    loras: tuple[UsedLora, ...] = ()
    warnings: tuple[str, ...] = ()


class StreamedProgress(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "photogram.progress"
    index: int
    phase: str
    step: int
    num_steps: int
    fraction: float
    eta_s: float | None


# --- LoRA ---------------------------------------------------------------------------------------------------------


class LoraChanged(msgspec.Struct, frozen=True, kw_only=True):
    status: Literal["ok"] = "ok"
    message: str


class KnownLora(msgspec.Struct, frozen=True):
    nickname: str
    path: str


class ActiveLora(msgspec.Struct, frozen=True, kw_only=True):
    """One LoRA of the active set on one network of the pipeline. `mode` says the same as `merged`, as in SGLang."""

    nickname: str
    path: str
    merged: bool
    strength: float
    num_lora_layers_with_weights: int
    mode: Literal["merged", "unmerged"]


class LoraListing(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/list_loras`; `applied_nowhere` names what was set and has nothing for its target in this model."""

    loaded_adapters: list[KnownLora]
    active: dict[str, list[ActiveLora]]
    applied_nowhere: list[str]


# --- models and server --------------------------------------------------------------------------------------------


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /models`: what the seed's clients read of the served model."""

    model_path: str
    task_type: str
    supported_task_types: tuple[str, ...]
    pipeline_name: str
    pipeline_class: str
    num_gpus: int
    dit_precision: str | None
    vae_precision: str | None
    supports_lora: bool


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "photogram"
    root: str
    parent: str | None = None
    max_model_len: int | None = None
    model_path: str
    task_type: str
    supported_task_types: tuple[str, ...]
    pipeline_name: str
    pipeline_class: str
    num_gpus: int
    dit_precision: str | None
    vae_precision: str | None
    supports_lora: bool
    quality_modes: dict[QualityMode, str]  # what each does
    media: str
    default_size: str
    default_steps: int
    default_guidance_scale: float | None
    takes_negative_prompt: bool
    takes_guidance_scale: bool
    parameters: dict[str, str]
    tuning: list[str]


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(msgspec.Struct, frozen=True):
    status: str


class Readiness(msgspec.Struct, frozen=True):
    status: Literal["ready", "not_ready"]
    state: str
    detail: str
    num_restarts: int


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    model_path: str
    served_model_name: str | None
    state: str
    num_jobs: int
    num_gpus: int
    tp_size: int = 1
    dp_size: int = 1


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    model_path: str
    is_generation: bool = True
    model_type: str = "diffusion"
    architectures: list[str]
    has_image_understanding: bool
    has_audio_understanding: bool = False
    task_type: str
    supported_task_types: tuple[str, ...]
    output_types: list[str]
    is_image_gen: bool


JSONSchema = dict[str, Any]
