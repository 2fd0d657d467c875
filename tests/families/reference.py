"""The ground truth for engine tests: a pipeline that nobody has touched, run by itself."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.guiders.guider_utils import BaseGuidance
from PIL import Image

from .family import Family
from .quiet import quiet

NEGATIVE_PROMPT = "blurry, low quality"


@dataclass(frozen=True, slots=True)
class Alone:
    """What one job gives."""

    latents: torch.Tensor
    """As `output_type="latent"` gives them: batch first, packed where the pipeline leaves them so."""
    frames: np.ndarray
    """In 0..1: (height, width, 3), or (frames, height, width, 3) for a clip."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module: its arguments by the names of the real forward, and its result."""

    module: str
    arguments: dict[str, object]
    result: object


def load(folder: Path) -> DiffusionPipeline:
    """The pipeline of a folder, on the CPU, in fp32, without progress bars."""
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(*, width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """Coarse coloured patches, as an input for edits."""
    patches = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def arguments(
    family: Family, prompt: str, *, negative_prompt: str = NEGATIVE_PROMPT, **changes: object
) -> dict[str, object]:
    """Keyword arguments of a legal call of `family`, all but the seed; `changes` are laid over its own."""
    call = {"prompt": prompt, **family.call}
    if family.negative_prompt:
        call["negative_prompt"] = negative_prompt
    if family.image == "required":
        call["image"] = picture()
    return call | changes


def run_alone(pipe: DiffusionPipeline, *, seed: int, **call: object) -> Alone:
    """Run `pipe` twice from the same seed, for its latents and for its frames.

    Each run begins with solver and guider as new: they carry state from call to call, and in a pipeline that was
    interrupted it is wrong for the next.
    """
    latents = run_once(pipe, seed=seed, output_type="latent", **call)
    frames = run_once(pipe, seed=seed, output_type="np", **call)
    return Alone(latents, np.asarray(frames[0]))


def run_once(pipe: DiffusionPipeline, *, seed: int, output_type: str, **call: object) -> torch.Tensor | np.ndarray:
    """One call of the pipeline; gives images or frames as the pipeline does, batch first."""
    with quiet():
        for name, component in pipe.components.items():
            if isinstance(component, SchedulerMixin):
                setattr(pipe, name, type(component).from_config(component.config))
            elif isinstance(component, BaseGuidance):
                setattr(pipe, name, component.new())
    generator = torch.Generator().manual_seed(seed)
    return pipe(generator=generator, output_type=output_type, return_dict=False, **call)[0]


def difference(actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    """The largest deviation, as a share of the range of `expected`; infinite where shapes differ or a value is NaN."""
    actual_, expected_ = (np.asarray(values, dtype=np.float64) for values in (actual, expected))
    if actual_.shape != expected_.shape or not np.isfinite(actual_).all():
        return float("inf")
    return float(np.abs(actual_ - expected_).max() / np.ptp(expected_))


@contextlib.contextmanager
def recorded(pipe: DiffusionPipeline, *names: str) -> Iterator[list[Call]]:
    """Note every call of the named modules' forward, in order, while the context is open."""
    calls: list[Call] = []
    modules = {name: pipe.components[name] for name in names}
    for name, module in modules.items():
        module.forward = _noting(name, module.forward, calls)
    try:
        yield calls
    finally:
        for module in modules.values():
            del module.forward  # the class's own shows again


def _noting(name: str, forward: object, calls: list[Call]) -> object:
    signature = inspect.signature(forward)

    def call(*args: object, **kwargs: object) -> object:
        result = forward(*args, **kwargs)
        calls.append(Call(name, dict(signature.bind(*args, **kwargs).arguments), result))
        return result

    return call
