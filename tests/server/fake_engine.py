"""An engine without a worker: real uint8 frames in real files, and the failures of a real one on demand.

What a job does is told by words in its prompt: ``hold`` waits until it is released or cancelled, ``fail:<code>`` ends
with that error, ``slow`` takes five seconds more, ``explode`` sends a block that is no picture, ``warn`` finishes with
a warning. A LoRA file is taken for the layers whose names begin with a module of the card (``transformer.``); one
that has none of them is refused, as the real engine does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import threading
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from photogram.core.card import ModelCard
from photogram.core.errors import ConfigError, EngineLost, RequestError
from photogram.core.lora import LoadedLora, LoraState
from photogram.core.messages import Failed, Finished, FrameBlock, Preview, Progress
from photogram.core.request import GenerateRequest, LoraUse
from photogram.engine import EngineState, EngineStatus, Listener
from photogram.engine.figures import WorkerFigures


def image_card(**changes) -> ModelCard:
    facts = {
        "name": "acme/painter-1",
        "model_path": "/models/painter",
        "revision": "abc123",
        "pipeline_class": "Flux2KleinPipeline",
        "tasks": ("T2I", "TI2I"),
        "media": "image",
        "default_width": 64,
        "default_height": 48,
        "size_multiple": 16,
        "max_native_pixels": 256 * 256,
        "default_steps": 4,
        "default_guidance": 2.5,
        "max_input_images": 4,
        "lora_modules": ("transformer", "text_encoder"),
        "quality_steps": {"low": 2, "high": 8},
        "parameters": {"eta": "float", "max_sequence_length": "int", "prompt_2": "str", "sigmas": "json"},
        "precisions": {"transformer": "bf16", "vae": "fp32"},
        "device": "cpu",
        "device_name": "a processor",
    }
    return ModelCard(**{**facts, **changes})


def video_card(**changes) -> ModelCard:
    facts = {
        "pipeline_class": "WanPipeline",
        "tasks": ("T2V",),
        "media": "video",
        "default_frames": 17,
        "frame_multiple": 4,
        "default_fps": 16,
    }
    return image_card(**{**facts, **changes})


def picture(request: GenerateRequest, step: int | None = None) -> np.ndarray:
    """The pixels (H, W, 3) that a request gives: a gradient with noise from its seed, purer with each step."""
    noise = np.random.default_rng(request.seed).integers(0, 256, (request.height, request.width, 3), np.uint8)
    pixels = np.zeros((request.height, request.width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, request.width, dtype=np.uint8)
    pixels[..., 1] = np.linspace(0, 255, request.height, dtype=np.uint8)[:, None]
    pixels[..., 2] = noise[..., 2]
    if step is None:
        return pixels
    share = step / request.num_inference_steps
    return (share * pixels + (1 - share) * noise).astype(np.uint8)


def clip(request: GenerateRequest) -> np.ndarray:
    """The pixels (F, H, W, 3) that a request for a clip gives: what it begins with if anything, and a bar that moves.

    From a picture on, the first frame is the picture; of a clip, every frame is kept but for the bar.
    """
    first = picture(request)
    first[..., 2] = request.seed % 256  # noise is what a clip's file keeps least
    if request.images:
        with Image.open(request.images[0]) as given:
            first = np.asarray(given)
    frames = np.repeat(first[None], request.num_frames or 1, axis=0)
    if request.video is not None:
        frames = np.load(request.video).copy()
    assert frames.shape == (request.num_frames, request.height, request.width, 3), frames.shape
    begin = 1 if request.images else 0
    for number in range(begin, len(frames)):
        at = number * request.width // len(frames)
        frames[number, :, at : at + 4] = (255, 0, 0)
    return frames


class FakeEngine:
    def __init__(self, frames_dir: Path, card: ModelCard | None = None, state: EngineState = "ready") -> None:
        self.frames_dir = frames_dir
        self.full_card = card or image_card()
        self.state: EngineState = state
        self.refusal: str | None = None
        self.released = threading.Event()
        self.seen: dict[str, GenerateRequest] = {}
        self.cancelled: list[str] = []
        self.stopped = False
        self.active: tuple[LoraUse, ...] = ()
        self.merged = False
        self.loaded: dict[str, LoadedLora] = {}
        self.lora_calls: list[tuple[str, tuple[LoraUse, ...]]] = []
        self.lora_pause_s = 0.0
        self.figures = (WorkerFigures(),)
        self.max_running: int | None = None  # the others wait, as in a worker
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._ready = asyncio.Event()
        self._places: asyncio.Semaphore | None = None

    @property
    def card(self) -> ModelCard | None:
        return None if self.state in ("starting", "loading") else self.full_card

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(state=self.state, detail=f"The engine is {self.state}.")

    async def start(self) -> None:
        self._ready.clear()

    async def wait_ready(self) -> ModelCard:
        while self.card is None:
            if self.refusal is not None:
                raise ConfigError(self.refusal)
            await asyncio.sleep(0.01)
        return self.full_card

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        if self.state in ("failed", "stopped"):
            raise EngineLost("No worker will come.")
        self.seen[request.job_id] = request
        self._jobs[request.job_id] = asyncio.get_running_loop().create_task(self._run(request, listener))

    def cancel(self, job_id: str) -> None:
        if job_id in self._jobs:
            self.cancelled.append(job_id)
            self._jobs[job_id].cancel()

    async def set_loras(self, uses: tuple[LoraUse, ...], *, merged: bool = True) -> LoraState:
        self.lora_calls.append(("set", uses))
        await asyncio.sleep(self.lora_pause_s)
        loaded = {use.path: self._load(use) for use in uses}
        self.loaded |= loaded
        self.active, self.merged = uses, merged
        return LoraState(loaded=tuple(self.loaded.values()))

    async def prepare_loras(self, uses: tuple[LoraUse, ...] = (), *, pinned: bool = False) -> LoraState:
        self.lora_calls.append(("prepare", uses))
        self.loaded |= {use.path: self._load(use) for use in uses}
        return LoraState(loaded=tuple(self.loaded.values()))

    def _load(self, use: LoraUse) -> LoadedLora:
        data = Path(use.path).read_bytes()
        names = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        layers = {
            module: sum(name.startswith(f"{module}.") and "lora_A" in name for name in names)
            for module in self.full_card.lora_modules
        }
        if not any(layers.values()):
            raise RequestError(f"LoRA '{use.path}': not made for this model.", param="lora_path", code="invalid_lora")
        return LoadedLora(
            nickname=use.nickname, path=use.path, size_bytes=len(data), rank=2,
            num_layers={module: num for module, num in layers.items() if num},
        )  # fmt: skip

    async def stop(self, grace_s: float) -> None:
        running = list(self._jobs.values())
        if running:
            await asyncio.wait(running, timeout=grace_s)
        for task in running:
            task.cancel()
        self.state, self.stopped = "stopped", True

    @property
    def num_running(self) -> int:
        return len(self._jobs)

    async def _run(self, request: GenerateRequest, listener: Listener) -> None:
        job_id = request.job_id
        try:
            if self.max_running is not None and self._places is None:
                self._places = asyncio.Semaphore(self.max_running)
            async with self._places or contextlib.nullcontext():
                last = await self._make(request, listener)
        except asyncio.CancelledError:
            last = Failed(job_id=job_id, code="cancelled", message="The job was cancelled.")
        del self._jobs[job_id]
        listener(last)

    async def _make(self, request: GenerateRequest, listener: Listener) -> Finished | Failed:
        job_id, num_steps = request.job_id, request.num_inference_steps
        failure = re.search(r"fail:(\w+)", request.prompt)
        shown = 0
        for step in range(num_steps + 1):
            await asyncio.sleep(0)
            listener(
                Progress(
                    job_id=job_id, phase="denoise", step=step, num_steps=num_steps, fraction=step / (num_steps + 1)
                )
            )
            if step > 0 and shown < request.partial_images:
                listener(Preview(job_id=job_id, index=shown, frames=self._write(picture(request, step))))
                shown += 1
            while "hold" in request.prompt and not self.released.is_set():
                await asyncio.sleep(0.005)
            if "slow" in request.prompt and step == 1:
                await asyncio.sleep(5)
            if failure and step == num_steps // 2:
                return Failed(job_id=job_id, code=failure.group(1), message="It went wrong: no luck today.")
        pixels = picture(request) if (request.num_frames or 1) == 1 else clip(request)
        block = self._write(np.stack([pixels, pixels]) if "explode" in request.prompt else pixels)
        return Finished(
            job_id=job_id,
            frames=block,
            prompt_tokens=len(request.prompt.split()),
            image_tokens=request.width * request.height // 256,
            run_s=0.01,
            warnings=("The prompt was cut at 77 tokens.",) if "warn" in request.prompt else (),
        )

    def _write(self, pixels: np.ndarray) -> FrameBlock:
        frames = pixels if pixels.ndim == 4 else pixels[None]
        path = self.frames_dir / f"{uuid.uuid4().hex}.frames"
        path.write_bytes(frames.tobytes())
        return FrameBlock(path=os.fspath(path), shape=frames.shape)
