"""From what a request says to what is to be made: the only place where defaults are filled and limits are held.

Takes a plain object (`body.read_body`), the served model's card and the settings; gives jobs in which nothing is left
open. Knows nothing of HTTP, of queues or of files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import msgspec

from ..core.card import ModelCard
from ..core.config import ServeConfig
from ..core.errors import NotFound, RequestError
from ..core.quality_mode import RECIPES
from ..core.request import GenerateRequest, ImageFormat, JSONValue, OutputSpec, QualityMode, Task
from ..jobs.record import new_id
from ..media.image_file import check_side
from ..media.quality import resolve_quality
from ..net.address import AllowedHosts
from .admission import check_memory
from .beginnings import Beginning, clip_task
from .clip_schemas import clip_fields, webhook_url
from .edits import edit_strength, edit_task, like, variation_strength
from .fields import MAX_INT, Field, Values, coerce, read, shown
from .inputs import Inputs
from .lengths import Length, clip_length
from .lora_fields import NO_LORAS, ChosenLoras
from .schemas import ECHOED_QUALITIES, MEANINGLESS_FIELDS, OF_SOME_MODELS, image_fields
from .sizes import Size, asked_size, check_size, drawn_size

ResponseFormat = Literal["b64_json", "url"]
_FORMATS: dict[str, ImageFormat] = {"png": "png", "jpeg": "jpeg", "jpg": "jpeg", "webp": "webp"}
_MODES: dict[str, QualityMode] = {mode: mode for mode in RECIPES}
# Below 2**32, so that a drawn seed survives every client's JSON and can be typed.
_DRAWN_SEEDS = 2**32
REDRAW_STRENGTH = 0.7
"""Of a remix or an edit that names none: enough for the prompt to show, and the clip's composition stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One picture to make: what the engine gets, and the file to deliver."""

    request: GenerateRequest
    output: OutputSpec

    @property
    def generated_size(self) -> Size:
        return Size(self.request.width, self.request.height)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesCall:
    """One request for pictures, resolved. `ignored` names the fields without effect, `warnings` are sentences."""

    drawings: tuple[Drawing, ...]
    model: str
    response_format: ResponseFormat
    size: Size
    format: ImageFormat
    quality: str
    stream: bool
    stream_progress: bool
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]
    is_edit: bool = False

    @property
    def echoed_quality(self) -> str | None:
        return self.quality if self.quality in ECHOED_QUALITIES else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipCall:
    """One request for a clip, resolved. `remixed_from` is the id of the clip of this server's that it begins with."""

    drawing: Drawing
    model: str
    length: Length
    webhook_url: str | None
    remixed_from: str | None
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolver:
    """Resolves the requests of one server. `new_id` and `draw_seed` are the only things left to chance."""

    config: ServeConfig
    new_id: Callable[[str], str] = new_id
    draw_seed: Callable[[], int] = field(default_factory=lambda: partial(random.Random().randrange, _DRAWN_SEEDS))

    def images(
        self,
        body: Mapping[str, JSONValue],
        card: ModelCard,
        owner: str,
        inputs: Inputs | None = None,
        loras: ChosenLoras = NO_LORAS,
        *,
        is_variation: bool = False,
    ) -> ImagesCall:
        """Return what `POST /v1/images/generations` asks for, or `/edits` where there are input pictures.

        A variation is an edit that begins at the picture and needs no prompt. Raises RequestError naming the field, or
        NotFound for another model's name where names are strict.
        """
        values = read(body, image_fields(self.config.max_steps))
        ignored: list[str] = []
        model = self._model(values.text("model"), card)
        if inputs is None:
            task = text_to_image_task(card, values.text("task_type"))
        else:
            task = edit_task(card, len(inputs.paths))
            ignored += inputs.ignored
        prompt = values.text("prompt") or "" if is_variation else _prompt(values)
        size = self._size(values, card, inputs)
        drawn = drawn_size(size, card)
        check_memory(card, drawn, 1 if card.media == "video" else None)
        stream = values.flag("stream")
        format = _FORMATS[values.text("output_format") or "png"]
        check_side(format, size.width, size.height)
        extra = self._extra(body, values, card, ignored)
        negative_prompt, guidance_scale = _conditioning(values, card, extra, ignored)
        steps = self._steps(values, card)
        quality_mode, mode_warnings = self._quality_mode(values, steps)
        warnings = (*_background(values, format), *mode_warnings)
        template = GenerateRequest(
            job_id="",
            owner=owner,
            task=task,
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=drawn.width,
            height=drawn.height,
            # A model of clips draws a picture as a clip of one frame.
            num_frames=1 if card.media == "video" else None,
            fps=card.default_fps if card.media == "video" else None,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            seed=0,
            images=() if inputs is None else tuple(map(str, inputs.paths)),
            mask=str(inputs.mask) if inputs is not None and inputs.mask is not None and card.takes_mask else None,
            strength=(
                variation_strength(values, card, ignored)
                if is_variation
                else edit_strength(values, card, inputs, ignored)
            ),
            loras=loras.uses,
            quality_mode=quality_mode,
            extra=extra,
            partial_images=_only_on_a_stream(values, stream, ignored),
            deterministic=values.flag("deterministic") or self.config.deterministic,
            priority=values.int("priority") or 0,
            timeout_s=self.config.request_timeout_s,
        )
        output = OutputSpec(
            width=size.width,
            height=size.height,
            format=format,
            compression=resolve_quality(values.text("output_quality"), values.int("output_compression")),
        )
        if inputs is not None and inputs.mask is not None:
            output = msgspec.structs.replace(output, original=str(inputs.paths[0]), mask=str(inputs.mask))
        return ImagesCall(
            drawings=self._repeat(template, output, values),
            model=model,
            response_format=_response_format(values, model, stream, ignored),
            size=size,
            format=format,
            quality=values.text("quality") or "auto",
            stream=stream,
            stream_progress=values.flag("stream_progress"),
            ignored=tuple(ignored),
            warnings=(*warnings, *loras.warnings),
            is_edit=inputs is not None,
        )

    def clip(
        self,
        body: Mapping[str, JSONValue],
        card: ModelCard,
        owner: str,
        beginning: Beginning | None = None,
        loras: ChosenLoras = NO_LORAS,
    ) -> ClipCall:
        """Return what `POST /v1/videos` asks for, or a remix, edit or extension of the clip in `beginning`.

        Raises as `images`.
        """
        values = read(body, clip_fields(self.config.max_steps))
        start = None if beginning is None else beginning.start
        param = "input_reference" if beginning is None else beginning.param
        task = clip_task(card, start, param, values.text("task_type"))
        model = self._model(values.text("model"), card)
        prompt = _prompt(values)
        ignored: list[str] = []
        length = clip_length(values, card, beginning, self.config.max_frames)
        size, warnings = self._clip_size(values, card, beginning)
        drawn = drawn_size(size, card)
        check_memory(card, drawn, length.drawn)
        extra = self._extra(body, values, card, ignored)
        negative_prompt, guidance_scale = _conditioning(values, card, extra, ignored)
        strength = values.float("strength")
        if start != "redraw" and strength is not None:
            ignored.append("strength")
        seed = values.int("seed")
        steps = self._steps(values, card)
        quality_mode, mode_warnings = self._quality_mode(values, steps)
        request = GenerateRequest(
            job_id=self.new_id("video"),
            owner=owner,
            task=task,
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=drawn.width,
            height=drawn.height,
            num_frames=length.drawn,
            fps=length.fps,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            seed=self.draw_seed() if seed is None else seed,
            images=(str(beginning.picture),) if beginning is not None and start != "redraw" else (),
            video=str(beginning.clip) if beginning is not None and start == "redraw" else None,
            strength=(REDRAW_STRENGTH if strength is None else strength) if start == "redraw" else None,
            loras=loras.uses,
            quality_mode=quality_mode,
            extra=extra,
            partial_images=values.int("partial_images") or 0,
            deterministic=values.flag("deterministic") or self.config.deterministic,
            priority=values.int("priority") or 0,
            timeout_s=self.config.request_timeout_s,
        )
        output = OutputSpec(
            width=size.width,
            height=size.height,
            format="mp4",
            compression=resolve_quality(values.text("output_quality"), values.int("output_compression"), "video"),
            fps=length.fps,
            continues=str(beginning.clip) if beginning is not None and start == "extend" else None,
            continues_sound=str(beginning.sound) if beginning is not None and start == "extend" else None,
        )
        return ClipCall(
            drawing=Drawing(request=request, output=output),
            model=model,
            length=length,
            webhook_url=webhook_url(values, AllowedHosts.parse(self.config.allow_url_host)),
            remixed_from=None if beginning is None else beginning.video_id,
            ignored=tuple(ignored),
            warnings=(*warnings, *mode_warnings, *loras.warnings),
        )

    def _clip_size(self, values: Values, card: ModelCard, beginning: Beginning | None) -> tuple[Size, tuple[str, ...]]:
        """Return the file's size, and what is to be said of it."""
        asked = asked_size(values.text("size"), values.int("width"), values.int("height"))
        size = asked or Size(card.default_width, card.default_height)
        if beginning is not None and beginning.start == "extend":
            if asked not in (None, beginning.size):
                raise RequestError(f"size '{asked}': an extension has its clip's, {beginning.size}.", param="size")
            size = beginning.size
        elif beginning is not None and asked is None:
            own = beginning.video_id is not None
            size = beginning.size if own else asked_size(like(beginning.size, card), None, None) or size
        even = Size(size.width + size.width % 2, size.height + size.height % 2)
        limit = self.config.max_video_pixels
        check_size(even, min_side=card.min_side, max_pixels=limit, limit_flag="--max-video-pixels")
        check_side("mp4", even.width, even.height)
        warned = (f"The sides of a clip are even: it has {even} for {size}.",) if even != size else ()
        return even, warned

    def _model(self, asked: str | None, card: ModelCard) -> str:
        names = (card.name, card.model_path)
        # What stands behind a colon is a LoRA's nickname, which was looked up before.
        is_served = asked in names or any((asked or "").startswith(f"{name}:") for name in names)
        if self.config.strict_model and asked and not is_served:
            raise NotFound(f"The model '{asked}' does not exist.", param="model", code="model_not_found")
        return asked or card.name

    def _size(self, values: Values, card: ModelCard, inputs: Inputs | None) -> Size:
        asked = asked_size(values.text("size"), values.int("width"), values.int("height"))
        if asked is None and inputs is not None:
            asked = asked_size(like(inputs.first, card), None, None)
        size = asked or Size(card.default_width, card.default_height)
        check_size(size, min_side=card.min_side, max_pixels=self.config.max_pixels, limit_flag="--max-pixels")
        return size

    def _steps(self, values: Values, card: ModelCard) -> int:
        steps = values.int("num_inference_steps")
        if steps is None:
            steps = card.quality_steps.get(values.text("quality") or "auto", card.default_steps)
        return min(steps, self.config.max_steps)

    def _quality_mode(self, values: Values, steps: int) -> tuple[QualityMode, tuple[str, ...]]:
        """Return how much of the denoiser's work may be left out, and what is to be said of it."""
        asked = values.text("quality_mode")
        mode = self.config.quality_mode if asked is None else _MODES[asked]
        recipe = RECIPES[mode]
        if asked is None or recipe is None or recipe.most_forecasts(steps):
            return mode, ()
        return mode, (f"quality_mode '{mode}': of {steps} steps none can be forecast from others.",)

    def _extra(
        self, body: Mapping[str, JSONValue], values: Values, card: ModelCard, ignored: list[str]
    ) -> dict[str, JSONValue]:
        """Return the further arguments that this model takes; the names that nothing takes go to `ignored`."""
        extra: dict[str, JSONValue] = dict(card.defaults)
        for name in values.unread:
            kind = card.parameters.get(name)
            if kind is None:
                if name in card.lacking:
                    why = f"it has no '{card.lacking[name]}', which this needs"
                    _check_off(name, body[name], f"model '{card.name}' cannot: {why}.")
                elif name in OF_SOME_MODELS:
                    _check_off(name, body[name], f"model '{card.name}' cannot: {OF_SOME_MODELS[name]}.")
                elif name not in MEANINGLESS_FIELDS:
                    ignored.append(name)
                continue
            value = coerce(body[name], Field(name=name, kind=kind, help=""), name)
            if value is not None:
                extra[name] = value
        return extra

    def _repeat(self, template: GenerateRequest, output: OutputSpec, values: Values) -> tuple[Drawing, ...]:
        n, seed = values.int("n") or 1, values.int("seed")
        if seed is None:
            seed = self.draw_seed()
        elif seed + n - 1 > MAX_INT:
            raise RequestError(f"Invalid value for 'seed': {seed} plus n - 1 exceeds {MAX_INT}.", param="seed")
        return tuple(
            Drawing(request=_numbered(template, self.new_id("img"), seed + index), output=output) for index in range(n)
        )


def _check_off(name: str, value: JSONValue, why: str) -> None:
    """Raise RequestError where a request switches on what the served model cannot; switched off, it is as asked."""
    if coerce(value, Field(name=name, kind="bool", help=""), name):
        raise RequestError(f"'{name}': {why}", param=name, code="unsupported_by_model")


def _prompt(values: Values) -> str:
    prompt = values.text("prompt")
    if not prompt:
        message = "Missing required parameter: 'prompt'." if prompt is None else "'prompt' must not be empty."
        raise RequestError(message, param="prompt", code="missing_required_parameter")
    return prompt


def text_to_image_task(card: ModelCard, asked: str | None) -> Task:
    """Return the card's task that makes a picture from a prompt alone.

    Raises RequestError where there is none, or where the request asks for another one.
    """
    if asked is not None and asked.upper() not in card.tasks:
        allowed = ", ".join(card.tasks)
        raise RequestError(
            f"task_type {shown(asked)}: model '{card.name}' does {allowed}.", param="task_type", code="unsupported_task"
        )
    tasks: tuple[Task, ...] = ("T2I", "TI2I") if card.media == "image" else ("T2V", "TI2V")
    for task in tasks:
        if task in card.tasks and (asked is None or asked.upper() == task):
            return task
    if card.media == "video":
        message = f"Model '{card.name}' makes clips from an input picture; send the request to /v1/videos."
    elif asked is None:
        message = f"Model '{card.name}' needs an input image; send the request to /v1/images/edits."
    else:
        message = f"task_type {shown(asked)} is not served here; this endpoint makes pictures from a prompt (T2I)."
    raise RequestError(message, param="model" if asked is None else "task_type", code="unsupported_task")


def _numbered(template: GenerateRequest, job_id: str, seed: int) -> GenerateRequest:
    return msgspec.structs.replace(template, job_id=job_id, seed=seed)


def _conditioning(
    values: Values, card: ModelCard, extra: dict[str, JSONValue], ignored: list[str]
) -> tuple[str | None, float | None]:
    """Return the negative prompt and the guidance scale; those that the model has no use for go to `ignored`."""
    negative_prompt = values.text("negative_prompt")
    if negative_prompt is not None and not card.takes_negative_prompt:
        ignored.append("negative_prompt")
        negative_prompt = None
    if negative_prompt is None:
        negative_prompt = card.default_negative_prompt
    guidance_scale, true_cfg_scale = values.float("guidance_scale"), values.float("true_cfg_scale")
    if true_cfg_scale is not None:
        if "true_cfg_scale" in card.parameters:
            extra["true_cfg_scale"] = true_cfg_scale
        elif guidance_scale is None and card.takes_guidance:
            guidance_scale = true_cfg_scale
        else:
            ignored.append("true_cfg_scale")
    if not card.takes_guidance:
        if guidance_scale is not None:
            ignored.append("guidance_scale")
        return negative_prompt, None
    return negative_prompt, card.default_guidance if guidance_scale is None else guidance_scale


def _background(values: Values, format: ImageFormat) -> tuple[str, ...]:
    if values.text("background") != "transparent":
        return ()
    if format == "jpeg":
        raise RequestError("background 'transparent' needs output_format png or webp.", param="background")
    return ("The served model draws opaque pictures; the background is not transparent.",)


def _only_on_a_stream(values: Values, stream: bool, ignored: list[str]) -> int:
    partial_images = values.int("partial_images") or 0
    if not stream:
        if partial_images:
            ignored.append("partial_images")
        if values.flag("stream_progress"):
            ignored.append("stream_progress")
        return 0
    return partial_images


def _response_format(values: Values, model: str, stream: bool, ignored: list[str]) -> ResponseFormat:
    asked = values.text("response_format")
    if stream:
        # OpenAI's events always carry the picture itself.
        if asked == "url":
            ignored.append("response_format")
        return "b64_json"
    if asked is None:
        asked = "url" if model.lower().startswith("dall-e") else "b64_json"
    return "url" if asked == "url" else "b64_json"
