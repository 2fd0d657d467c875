"""Draws jobs with the real worker in this process, and the same jobs with the unmodified pipeline by itself."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from photogram.core.config import ServeConfig
from photogram.core.messages import Began, Failed, Finished, Preview, ToHost
from photogram.core.request import GenerateRequest
from photogram.models.derive import guidance_parameter
from photogram.worker.arguments import to_frames, to_sound
from photogram.worker.fibers import Call
from photogram.worker.job import Job
from photogram.worker.loading import load
from photogram.worker.worker import Worker


@dataclass
class Drawn:
    """What came of one job: uint8 frames (F, H, W, C) and the latents that the decoder was given."""

    frames: np.ndarray | None = None
    latents: torch.Tensor | None = None
    failure: Failed | None = None
    previews: list[np.ndarray] = field(default_factory=list)
    sound: np.ndarray | None = None  # float32 (samples, channels), of a pipeline run by itself


class Ticks:
    """A clock by which everything takes a millisecond: the machine's load changes nothing of what is decided."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 0.001
        return self.seconds


class WatchedWorker(Worker):
    """The worker, with the latents of each job noted on their way to the decoder."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.latents: dict[str, torch.Tensor] = {}

    def _wait_at(self, job: Job, call: Call) -> None:
        if call.module.name == "vae" and call.method == "decode":
            self.latents[job.job_id] = decoder_input(call.args, call.kwargs)
        super()._wait_at(job, call)


class Studio:
    """One loaded pipeline and the worker that serves it; `draw` runs jobs to their end."""

    def __init__(self, folder: Path, frames_dir: Path, **settings: Any) -> None:
        # Plain diffusers leaves the choice of a convolution's kernel to torch; these tests compare bits with it.
        settings = {"onednn_convolutions": False, "data_dir": str(frames_dir)} | settings
        config = ServeConfig(model_path=str(folder), **settings).worker(frames_dir)
        self.messages: list[ToHost] = []
        with torch.inference_mode():
            self.served = load(config, lambda stage: None, lambda reason: None)
            self.worker = WatchedWorker(self.served, config, self.messages.append, Ticks())

    @property
    def card(self):
        return self.served.card

    def draw(
        self, requests: Sequence[GenerateRequest], meanwhile: Callable[[int], None] = lambda turn: None
    ) -> dict[str, Drawn]:
        """Submit all at once and turn until idle; `meanwhile` is called with the number of each turn, and may submit
        more."""
        self.messages.clear()
        with torch.inference_mode():
            for request in requests:
                self.worker.submit(request)
            self.settle()  # so that which jobs meet does not hang on the disk
            turn = 0
            while self.worker.turn() or self.worker.wait():
                turn += 1
                meanwhile(turn)
        drawn = defaultdict(Drawn, {request.job_id: Drawn() for request in requests})
        for message in self.messages:
            if isinstance(message, Finished):
                drawn[message.job_id].frames = read_block(message.frames.path, message.frames.shape)
            elif isinstance(message, Preview):
                drawn[message.job_id].previews.append(read_block(message.frames.path, message.frames.shape))
            elif isinstance(message, Failed):
                drawn[message.job_id].failure = message
        for job_id, latents in self.worker.latents.items():
            if job_id in drawn:
                drawn[job_id].latents = latents
        return drawn

    def settle(self) -> None:
        """Wait for the LoRAs that are being read, and go on with what waits for them."""
        while self.worker.loras.wait():
            pass

    def passes(self, *modules: str) -> list[tuple[str, ...]]:
        """The jobs of each forward pass of these modules in the last `draw`, in order."""
        return [
            message.job_ids for message in self.messages if isinstance(message, Began) and message.module in modules
        ]


def read_block(path: str, shape: tuple[int, ...]) -> np.ndarray:
    frames = np.fromfile(path, dtype=np.uint8).reshape(shape)
    Path(path).unlink()
    return frames


def decoder_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    return (args[0] if args else kwargs.get("z", kwargs.get("latents"))).clone()


def draw_alone(
    pipeline: DiffusionPipeline,
    request: GenerateRequest,
    images: Sequence[Any] = (),
    given: Mapping[str, Any] | None = None,
) -> Drawn:
    """The unmodified pipeline run by itself, as its documentation says, with a fresh solver.

    `given` are further arguments of its call, such as the picture, mask or clip to begin with.
    """
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    arguments: dict[str, Any] = dict(request.extra) | {
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "pt",
        "return_dict": False,
    }
    if request.negative_prompt is not None:
        arguments["negative_prompt"] = request.negative_prompt
    if request.guidance_scale is not None and guidance_parameter(parameters) is not None:
        arguments[guidance_parameter(parameters)] = request.guidance_scale
    if request.num_frames is not None:
        arguments["num_frames"] = request.num_frames
    if request.fps is not None:
        arguments["frame_rate"] = request.fps
    if images:
        arguments["image"] = images[0] if len(images) == 1 else list(images)
    if "use_resolution_binning" in parameters:
        arguments["use_resolution_binning"] = False
    arguments |= given or {}
    arguments = {name: value for name, value in arguments.items() if name in parameters}
    drawn = Drawn()
    decode = pipeline.vae.decode

    def noting_decode(*args: Any, **kwargs: Any) -> Any:
        drawn.latents = decoder_input(args, kwargs)
        return decode(*args, **kwargs)

    pipeline.vae.decode = noting_decode
    try:
        result = pipeline(**arguments)
    finally:
        pipeline.vae.decode = decode
    drawn.frames = to_frames(result)
    sound = to_sound(pipeline, result)
    drawn.sound = None if sound is None else sound[0]
    return drawn


def relative_error(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference over the reference's range."""
    return float((latents - reference).abs().max() / (reference.max() - reference.min()))
