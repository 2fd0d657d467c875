"""How a checkpoint's pipeline is guided by default, told from its configuration before anything is loaded."""

from __future__ import annotations

import inspect
import json
import re
from typing import Literal

import diffusers

from ..core.errors import ConfigError
from .checkpoint import Checkpoint, read_index
from .derive import guidance_parameter
from .families import DEFAULTS, FamilyDefaults, checkpoint_defaults
from .footprints import read_config

Halves = Literal["none", "calls", "rows"]
"""How a step runs with the prompt and without it: not, as two calls of the denoiser, as the rows of one call."""

# How pipelines double their latents for one call of both halves.
_DOUBLED = re.compile(r"cat\(\[\w+\] \* 2\)|\.repeat\(2\b")


def halves_of(checkpoint: Checkpoint) -> Halves:
    """Return how a step is guided that a request leaves as the model wants it.

    Guidance that the denoiser takes as a number (FLUX.1, FLUX.2) has no halves, and a distilled model is not guided.
    """
    if not _is_guided(checkpoint):
        return "none"
    source = inspect.getsource(pipeline_class(checkpoint).__call__)
    return "rows" if _DOUBLED.search(source) else "calls"


def pipeline_class(checkpoint: Checkpoint) -> type:
    """Return the class of a checkpoint's pipeline. Raises ConfigError where diffusers has none of that name."""
    try:
        found: type = getattr(diffusers, checkpoint.pipeline_class)
    except AttributeError:
        raise ConfigError(f"--model-path: diffusers has no {checkpoint.pipeline_class}.") from None
    return found


def _is_guided(checkpoint: Checkpoint) -> bool:
    index = read_index(checkpoint.folder, checkpoint.name)
    parameters = inspect.signature(pipeline_class(checkpoint).__call__).parameters
    name = guidance_parameter(parameters)
    if name is None:
        return _guider_strength(checkpoint, index) > 1
    if name != "true_cfg_scale":
        if "true_cfg_scale" in parameters or index.get("is_distilled"):
            return False
        denoisers = [read_config(checkpoint.folder, part) for part in ("transformer", "unet")]
        if any(one.get("guidance_embeds") or one.get("time_cond_proj_dim") for one in denoisers):
            return False
    family = checkpoint_defaults(
        checkpoint.pipeline_class,
        DEFAULTS.get(checkpoint.pipeline_class, FamilyDefaults()),
        index,
        read_config(checkpoint.folder, "transformer"),
    )
    choices = (checkpoint.overrides.get("default_guidance"), family.guidance, parameters[name].default)
    strength = next((choice for choice in choices if isinstance(choice, int | float)), 0.0)
    return strength > 1


def _guider_strength(checkpoint: Checkpoint, index: dict[str, object]) -> float:
    """The strength by a guider's configuration, of pipelines that have one; 0 without."""
    entry = index.get("guider")
    if not isinstance(entry, list) or entry[0] is None:
        return 0.0
    try:
        config = json.loads((checkpoint.folder / "guider" / "guider_config.json").read_text(encoding="utf-8"))
        return float(config["guidance_scale"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0.0
