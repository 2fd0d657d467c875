"""Which pipeline class serves which kind of job, all of them made of one loaded model's components.

diffusers writes a class of its own for each way to begin: from noise, from a picture noised to a strength, from a
clip. They take the same networks, so a loaded one can become the others without a second copy of any weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..core.errors import RequestError
from ..core.request import GenerateRequest
from .families import NEEDS_IMAGE

Use = Literal["text", "image", "redraw", "inpaint", "clip"]
"""What a job begins with: a prompt alone; pictures to look at (an edit's references, a clip's first frame); a picture
noised to a strength; a picture of which the masked part is drawn anew; a clip noised to a strength."""


@dataclass(frozen=True, slots=True)
class Sibling:
    """A class that another one's components can become, where the configuration says `only_if`."""

    pipeline_class: str
    only_if: str | None = None  # an entry of the loaded pipeline's configuration that must be true


SIBLINGS: Mapping[str, Mapping[Use, Sibling]] = {
    # Wan 2.2 TI2V is one network for both: the first frame's tokens have the timestep 0.
    "WanPipeline": {"image": Sibling("WanImageToVideoPipeline", only_if="expand_timesteps")},
    "WanImageToVideoPipeline": {"text": Sibling("WanPipeline", only_if="expand_timesteps")},
    "CogVideoXPipeline": {"clip": Sibling("CogVideoXVideoToVideoPipeline")},
    "LTX2Pipeline": {"image": Sibling("LTX2ImageToVideoPipeline")},
    "LTX2ImageToVideoPipeline": {"text": Sibling("LTX2Pipeline")},
    "ChromaPipeline": {"redraw": Sibling("ChromaImg2ImgPipeline")},
}
"""By the loaded class: what diffusers' own tables for AutoPipeline do not tell."""

OWN_USES: Mapping[str, tuple[Use, ...]] = {"LTXConditionPipeline": ("text", "image")}
"""Where the signature of a class misleads: here `strength` is a condition's, and there may be none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How a job's inputs reach a pipeline: the class's use, and what is done in the solver's latents beside it."""

    use: Use
    begins_from_source: bool = False  # at the first picture or the clip, noised to the strength
    keeps_outside: bool = False  # outside the mask the first picture's latents are put back at each step
    reference_images: bool = False  # the pipeline is given the pictures themselves


def route(request: GenerateRequest, uses: frozenset[Use], in_latents: bool) -> Route:
    """Return how a job is served by a model of these uses.

    `in_latents`: whether pictures can be brought into the solver's latents, so that uses without a class of their
    own are served by the text or image class. Raises RequestError where the model cannot.
    """
    drawn_from_text: Use = "text" if "text" in uses else "image"
    if request.video is not None:
        if "clip" in uses:
            return Route(use="clip")
        if in_latents and "text" in uses:
            return Route(use="text", begins_from_source=True)
        raise _unsupported("takes no clips", "video")
    if not request.images:
        if "text" not in uses:
            raise _unsupported("needs an input picture", "image")
        return Route(use="text")
    if request.num_frames is not None:
        if "image" not in uses:
            raise _unsupported("takes no input picture", "image")
        return Route(use="image", reference_images=True)
    begins = request.strength is not None
    if request.mask is not None:
        # A model that edits looks at the whole picture while it draws the masked part.
        if "image" in uses and in_latents:
            return Route(use="image", begins_from_source=begins, keeps_outside=True, reference_images=True)
        if "inpaint" in uses:
            return Route(use="inpaint")
        if in_latents:
            return Route(use=drawn_from_text, begins_from_source=begins, keeps_outside=True)
        raise _unsupported("takes no mask", "mask")
    if "image" in uses and not begins:
        return Route(use="image", reference_images=True)
    if "redraw" in uses:
        return Route(use="redraw")
    if in_latents:
        # Looking at the picture as well, a model that edits would give the picture itself back.
        return Route(use=drawn_from_text, begins_from_source=True, reference_images=drawn_from_text == "image")
    raise _unsupported("has no strength" if begins else "takes no input picture", "strength" if begins else "image")


def _unsupported(what: str, param: str) -> RequestError:
    return RequestError(f"The served model {what}.", param=param, code="unsupported_by_model")


def own_uses(pipeline_class: type[DiffusionPipeline]) -> tuple[Use, ...]:
    """Return what a class does by itself, as its signature tells."""
    if pipeline_class.__name__ in OWN_USES:
        return OWN_USES[pipeline_class.__name__]
    parameters = inspect.signature(pipeline_class.__call__).parameters
    if "mask_image" in parameters:
        return ("inpaint",)
    if "strength" in parameters:
        return ("clip",) if "video" in parameters else ("redraw",)
    image = parameters.get("image")
    if image is None:
        return ("text",)
    if pipeline_class.__name__ in NEEDS_IMAGE or image.default is inspect.Parameter.empty:
        return ("image",)
    return ("text", "image")


def pipelines_by_use(loaded: DiffusionPipeline) -> dict[Use, DiffusionPipeline]:
    """Return the loaded pipeline and those that its components can become, by use; components are shared."""
    by_use: dict[Use, DiffusionPipeline] = dict.fromkeys(own_uses(type(loaded)), loaded)
    made: dict[type[DiffusionPipeline], DiffusionPipeline] = {}
    for use, sibling in _siblings(loaded).items():
        if use not in by_use and _fits(loaded, sibling):
            if sibling not in made:
                made[sibling] = sibling(**_constructor_arguments(loaded, sibling))
            by_use[use] = made[sibling]
    return by_use


def _siblings(loaded: DiffusionPipeline) -> dict[Use, type[DiffusionPipeline]]:
    """Classes of the loaded one's family by use, whether or not they fit this very checkpoint."""
    name = type(loaded).__name__
    found: dict[Use, type[DiffusionPipeline]] = {}
    tables = _auto_tables()
    keys = {key for table in tables for key, listed in table.items() if listed.__name__ == name}
    for table in tables:
        for key in keys & table.keys():
            for use in own_uses(table[key]):
                found.setdefault(use, table[key])
    for use, sibling in SIBLINGS.get(name, {}).items():
        if sibling.only_if is None or loaded.config.get(sibling.only_if):
            found[use] = getattr(diffusers, sibling.pipeline_class)
    return found


def _auto_tables() -> list[Mapping[str, type[DiffusionPipeline]]]:
    """diffusers' tables of classes by family, one a task. Half a second to import: not before a model is loaded."""
    from diffusers.pipelines import auto_pipeline as auto

    return [
        auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto.AUTO_INPAINT_PIPELINES_MAPPING,
        auto.AUTO_TEXT2VIDEO_PIPELINES_MAPPING,
        auto.AUTO_IMAGE2VIDEO_PIPELINES_MAPPING,
        auto.AUTO_VIDEO2VIDEO_PIPELINES_MAPPING,
    ]


def _fits(loaded: DiffusionPipeline, sibling: type[DiffusionPipeline]) -> bool:
    """Say whether a class takes everything that this checkpoint is made of and finds all it needs."""
    parameters = inspect.signature(sibling.__init__).parameters
    given = _constructor_arguments(loaded, sibling)
    needed = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    if needed - given.keys() - {"self"}:
        return False
    networks = {name for name, part in loaded.components.items() if isinstance(part, torch.nn.Module)}
    if networks - parameters.keys():
        return False  # Wan 2.2's second transformer has no place in the video-to-video class
    defaults = inspect.signature(type(loaded).__init__).parameters
    settings = {name: value for name, value in loaded.config.items() if isinstance(value, bool | float)}
    changed = {name for name, value in settings.items() if name in defaults and value != defaults[name].default}
    return changed <= parameters.keys() and not _draws_with_more_channels(loaded)


def _draws_with_more_channels(loaded: DiffusionPipeline) -> bool:
    """Say whether the denoiser wants the mask and the picture beside the latents: it can inpaint and nothing else."""
    unet, vae = loaded.components.get("unet"), loaded.components.get("vae")
    return unet is not None and vae is not None and unet.config.in_channels != vae.config.latent_channels


def _constructor_arguments(loaded: DiffusionPipeline, sibling: type[DiffusionPipeline]) -> dict[str, Any]:
    known = {name: value for name, value in loaded.config.items() if not name.startswith("_")} | loaded.components
    return {name: known[name] for name in inspect.signature(sibling.__init__).parameters if name in known}
