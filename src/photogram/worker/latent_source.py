"""A given picture or clip in a job's own latents: where its denoising begins, and what stays outside a mask.

Works at the job's solver, so for every pipeline whose latents are known (`models/latents`), with no class for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from ..core.errors import RequestError
from ..core.request import GenerateRequest
from ..models.latents import encode, mask_latents
from ..models.uses import Route
from .inputs import clip_pixels, mask_pixels, picture_pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSource:
    """`latents` as the solver steps them. With `strength` the run begins at them; `mask` (1: drawn anew) keeps them."""

    latents: torch.Tensor
    strength: float | None = None
    mask: torch.Tensor | None = None

    def first_step(self, solver: SchedulerMixin) -> int:
        """Return the index of the timestep at which the run begins. Raises RequestError where none is left."""
        if self.strength is None:
            return 0
        # As diffusers' pipelines for flow models count it: any strength above 0 leaves a step.
        num_steps = len(solver.timesteps) // solver.order
        begin = int(num_steps - num_steps * self.strength)
        if begin >= num_steps:
            raise RequestError(f"strength {self.strength}: must be above 0.", param="strength")
        return begin * solver.order

    def noised(self, solver: SchedulerMixin, index: int, noise: torch.Tensor) -> torch.Tensor:
        """Return the source as it is before the step at timestep `index`; itself after the last one."""
        source = self.latents.to(noise)
        if index >= len(solver.timesteps):
            return source
        timestep = solver.timesteps[index : index + 1]
        if callable(getattr(type(solver), "scale_noise", None)):
            return solver.scale_noise(source, timestep, noise)
        return solver.add_noise(source, noise, timestep)

    def kept(self, sample: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Return `sample` with `source` in the place of all that the mask does not name."""
        if self.mask is None:
            return sample
        return torch.lerp(source, sample, self.mask.to(sample))


def read_source(pipeline: DiffusionPipeline, route: Route, request: GenerateRequest, strength: float) -> LatentSource:
    """Encode what the request gives. Called in the job's fiber: the VAE's encoder is a call like any other."""
    if request.video is not None:
        pixels = clip_pixels(request)
    else:
        pixels = picture_pixels(request.images[0], request.width, request.height)
    latents = encode(pipeline, pixels)
    mask: torch.Tensor | None = None
    if route.keeps_outside and request.mask is not None:
        pixels_1 = mask_pixels(request.mask, request.width, request.height).to(latents.device)
        mask = mask_latents(pipeline, pixels_1, request.height, request.width)
    return LatentSource(latents=latents, strength=strength if route.begins_from_source else None, mask=mask)
