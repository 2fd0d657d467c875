"""Before anything is loaded: whether a model can be split as asked, and how where that was left open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import msgspec
from diffusers import DiffusionPipeline

from ...core.errors import ConfigError
from ...core.parallel import Degrees, divisors
from ...models.checkpoint import Checkpoint
from ...models.guided import halves_of
from ..modules import is_denoiser
from .sharding import num_heads, plan_of


@dataclass(frozen=True, slots=True)
class _Denoiser:
    class_name: str
    num_heads: int | None  # where its configuration says


@dataclass(frozen=True, slots=True)
class Layout:
    """How devices share a model, all degrees chosen, and why they were chosen so, a line each."""

    degrees: Degrees
    reasons: tuple[str, ...]


def fit(degrees: Degrees, checkpoint: Checkpoint, *, deterministic: bool = False) -> Layout:
    """Return the layout to run this checkpoint's denoisers in.

    Where only the number of devices was given: of a model that is guided the halves of a step run apart; of the devices
    that share a sequence as many as divide the heads exchange them, and the rest pass keys and values around. With
    `deterministic` the rows of one call are never divided. Raises ConfigError, naming what would do, for a model that
    cannot be split and for heads that do not divide.
    """
    reasons: list[str] = []
    if not degrees.is_cfg_chosen:
        degrees, why = _with_halves(degrees, checkpoint, deterministic)
        reasons.append(why)
    if degrees.sequence == 1:
        return Layout(msgspec.structs.replace(degrees, is_chosen=True), tuple(reasons))
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
        degrees = msgspec.structs.replace(degrees, ulysses=best, ring=degrees.sequence // best, is_chosen=True)
        reasons.append(
            f"sequences are split over {degrees.sequence} devices: with {heads or 'an unknown number of heads'} "
            f"{degrees.ulysses} exchange them (Ulysses), which moves the least data"
            f"{'' if degrees.ring == 1 else f', in a ring of {degrees.ring}'}"
        )
    elif degrees.ulysses not in fitting and any(one.num_heads for one in denoisers):
        name = next(one.class_name for one in denoisers if one.num_heads and one.num_heads % degrees.ulysses)
        raise ConfigError(
            f"--ulysses-degree {degrees.ulysses}: {name} has {heads}, which do not divide by it. With "
            f"{degrees.sequence} devices: {', '.join(map(str, fitting))}, and --ring-degree for the rest."
        )
    return Layout(degrees, tuple(reasons))


def _with_halves(degrees: Degrees, checkpoint: Checkpoint, deterministic: bool) -> tuple[Degrees, str]:
    """Choose whether the halves of guidance run apart, and say why."""
    halves = halves_of(checkpoint)
    size = degrees.sequence
    is_apart = halves == "calls" or (halves == "rows" and not deterministic)
    cfg = 2 if is_apart else 1
    chosen = msgspec.structs.replace(
        degrees, cfg=cfg, ulysses=size // cfg, is_chosen=size == cfg, is_cfg_chosen=True
    )  # fmt: skip
    if is_apart:
        return chosen, (
            f"the two halves of a guided step run at once, each on {size // 2} of {size} devices (CFG 2): "
            f"{checkpoint.pipeline_class} is guided by default, and nearly nothing is sent between them"
        )
    if halves == "rows":
        return chosen, "the two halves of guidance are rows of one call, which --deterministic leaves whole (CFG 1)"
    return chosen, f"{checkpoint.pipeline_class} is not guided by default, so that a step has no halves (CFG 1)"


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
