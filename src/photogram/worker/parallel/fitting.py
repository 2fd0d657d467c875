"""Before anything is loaded: whether a model can be split as asked, and how where that was left open."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import msgspec
from diffusers import DiffusionPipeline

from ...core.errors import ConfigError
from ...core.parallel import Degrees, divisors
from ...models.checkpoint import Checkpoint
from ..modules import is_denoiser
from .sharding import num_heads, plan_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Denoiser:
    class_name: str
    num_heads: int | None  # where its configuration says


def fit(degrees: Degrees, checkpoint: Checkpoint) -> Degrees:
    """Return the degrees to run this checkpoint's denoisers at, all of them chosen.

    Where only the number of devices was given, as many as divide the heads exchange them, and the rest pass keys and
    values around. Raises ConfigError, naming what would do, for a model that cannot be split and for heads that do not
    divide.
    """
    if degrees.sequence == 1:
        return degrees
    denoisers = _denoisers(checkpoint)
    for one in denoisers:
        if plan_of(_class(one.class_name)) is None:
            raise ConfigError(
                f"--num-gpus: {one.class_name} cannot be split over several devices. "
                "--cfg-parallel, which runs the two halves of a guided step on two, works with every model, and with "
                "--dp-size as large as --num-gpus each of them serves jobs of its own."
            )
    fitting = [
        ulysses
        for ulysses in divisors(degrees.sequence)
        if all(one.num_heads is None or one.num_heads % ulysses == 0 for one in denoisers)
    ]
    heads = " and ".join(sorted({f"{one.num_heads} heads" for one in denoisers if one.num_heads is not None}))
    if not degrees.is_chosen:
        best = max(fitting)
        chosen = msgspec.structs.replace(degrees, ulysses=best, ring=degrees.sequence // best, is_chosen=True)
        logger.info(
            "%d devices and %s: %d exchange heads (Ulysses), which moves the least data%s",
            degrees.sequence, heads or "an unknown number of heads", chosen.ulysses,
            "" if chosen.ring == 1 else f", in a ring of {chosen.ring}",
        )  # fmt: skip
        return chosen
    if degrees.ulysses not in fitting and any(one.num_heads for one in denoisers):
        name = next(one.class_name for one in denoisers if one.num_heads and one.num_heads % degrees.ulysses)
        raise ConfigError(
            f"--ulysses-degree {degrees.ulysses}: {name} has {heads}, which do not divide by it. With "
            f"{degrees.sequence} devices: {', '.join(map(str, fitting))}, and --ring-degree for the rest."
        )
    return degrees


def _denoisers(checkpoint: Checkpoint) -> list[_Denoiser]:
    found = []
    for name, entry in DiffusionPipeline.load_config(checkpoint.folder, local_files_only=True).items():
        if not is_denoiser(name) or not isinstance(entry, list) or entry[0] is None:
            continue
        try:
            config: Mapping[str, Any] = json.loads((checkpoint.folder / name / "config.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--model-path: {name}/config.json cannot be read ({error}).") from None
        found.append(_Denoiser(entry[1], num_heads(config)))
    return found


def _class(name: str) -> type:
    try:
        found: type = getattr(diffusers, name)
    except AttributeError:
        raise ConfigError(f"--model-path: diffusers has no {name}.") from None
    return found
