"""What the host must know of the served model to check requests and to describe it.

Made by the worker once the pipeline is loaded, from the table in `models/families` or, for a family that has no row
there, from the pipeline's signature and configuration.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .footprint import Room
from .request import JSONValue, Task

ParameterKind = Literal["bool", "int", "float", "str", "json"]


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One served model.

    Sizes are pixels. `size_multiple` is what width and height must be multiples of when drawn. With
    `max_native_pixels` a larger request is drawn at that count in the same aspect and enlarged. `parameters` are the
    further call arguments that a request may set by name, with the kind of value each takes.
    """

    name: str  # as clients name it: the served name, hub id or folder name
    model_path: str
    revision: str | None = None
    pipeline_class: str  # "WanPipeline"
    tasks: tuple[Task, ...]  # the first is what is meant when nothing tells otherwise
    media: Literal["image", "video"]
    default_width: int
    default_height: int
    size_multiple: int
    min_side: int = 16
    max_native_pixels: int | None = None
    default_steps: int
    default_guidance: float | None = None
    takes_guidance: bool = True
    takes_negative_prompt: bool = True
    default_negative_prompt: str | None = None
    max_input_images: int = 0
    takes_mask: bool = False  # edits may be bound to a part of the first picture
    takes_strength: bool = False  # pictures (or clips) may be drawn anew from a strength
    edit_strength: float | None = None  # of edits that name none, where an edit is a drawing anew
    default_frames: int | None = None
    frame_multiple: int = 1  # frames are 1 + k * frame_multiple
    max_frames: int | None = None
    default_fps: int | None = None
    quality_steps: dict[str, int] = {}  # OpenAI's quality word -> steps
    parameters: dict[str, ParameterKind] = {}
    lacking: dict[str, str] = {}  # switches of the call that need a component which this checkpoint has not -> which
    defaults: dict[str, JSONValue] = {}  # of `parameters`, where the model wants another than its pipeline's
    lora_modules: tuple[str, ...] = ()  # components that LoRAs can change, the main denoiser first; none: no support
    tuning: tuple[str, ...] = ()  # what the worker did to make it fast, a line each
    precisions: dict[str, str] = {}  # component -> fp32 | bf16 | fp16 | fp8
    device: str  # "cpu", "cuda:0"
    device_name: str
    num_gpus: int = 1  # over all replicas
    num_replicas: int = 1  # groups of devices that serve jobs of their own
    parameters_count: int = 0
    loaded_bytes: int = 0
    room: Room | None = None  # what requests are admitted by; None: all are

    @property
    def pipeline_name(self) -> str:
        """The class in snake case, as `GET /models` shows it: ``wan_pipeline``."""
        letters: list[str] = []
        for position, letter in enumerate(self.pipeline_class):
            previous = self.pipeline_class[position - 1] if position else ""
            following = self.pipeline_class[position + 1 : position + 2]
            if letter.isupper() and (previous.islower() or previous.isdigit() or (previous and following.islower())):
                letters.append("_")
            letters.append(letter.lower())
        return "".join(letters)
