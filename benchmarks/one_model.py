"""One Wan2.1-T2V-1.3B in this process, served by the real worker in real time: it draws clips, and pictures as well.

Real architecture, random weights, nothing is downloaded; `tiny` has the same classes with few, narrow layers, for a
CPU. `Served.run` hands jobs over at their times and says when each was done.
"""

import dataclasses
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, WanPipeline

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from workloads import materialize, wan, workloads

from families import folder
from photogram.core.config import ServeConfig
from photogram.core.messages import Began, Failed, Finished
from photogram.core.request import GenerateRequest
from photogram.models.checkpoint import Checkpoint
from photogram.scheduler import Scheduler
from photogram.worker.loading import prepare
from photogram.worker.worker import Worker


def pipeline_of(scratch: Path, *, tiny: bool, device: torch.device) -> WanPipeline:
    """The family's tokenizer and solver, with networks of the published size: bf16, the VAE in fp32 as it is served."""
    small = DiffusionPipeline.from_pretrained(folder("wan-2.1", scratch))
    if tiny:
        return small
    known = workloads(tiny=False)
    return WanPipeline(
        tokenizer=small.tokenizer,
        text_encoder=materialize(known["umt5"].make, device, torch.bfloat16),
        vae=materialize(known["wan-vae"].make, device, torch.float32),
        transformer=materialize(wan(tiny=False).make, device, torch.bfloat16),
        scheduler=small.scheduler,
    )


@dataclass(frozen=True, kw_only=True)
class Sort:
    """One sort of jobs."""

    name: str
    width: int
    height: int
    frames: int
    steps: tuple[int, int]
    """The least and the most."""

    def request(self, job_id: str, steps: int, seed: int) -> GenerateRequest:
        return GenerateRequest(
            job_id=job_id,
            owner="bench",
            task="T2V",
            prompt=f"a red circle beside {seed} blue squares under a gray moon",
            negative_prompt="blurry, pale",
            width=self.width,
            height=self.height,
            num_frames=self.frames,
            fps=16,
            num_inference_steps=steps,
            guidance_scale=3.0,
            seed=seed,
        )


@dataclass
class Outcome:
    """What became of the jobs of one run; seconds since its beginning."""

    done_at_s: dict[str, float] = field(default_factory=dict)
    pixels: dict[str, bytes] = field(default_factory=dict)
    busy_s: float = 0.0
    """Time in which there was work."""
    jobs_of_passes: list[tuple[str, ...]] = field(default_factory=list)


class Served:
    """The model on its device, and a new worker for every run."""

    def __init__(self, scratch: Path, *, tiny: bool, device: torch.device, side_stream: bool | None = None) -> None:
        self.scratch = scratch
        self.device = device
        self.config = ServeConfig(model_path="wan", prompt_cache_mb=0, side_stream=side_stream).worker(scratch)
        checkpoint = Checkpoint(name="wan", folder=scratch, revision=None, pipeline_class="WanPipeline", overrides={})
        with torch.inference_mode():
            pipeline = pipeline_of(scratch, tiny=tiny, device=device)
            self.served = prepare(pipeline, checkpoint, self.config, device)
        self._woken = threading.Event()
        self._said: list[object] = []

    def new_worker(self, **changes: Any) -> Worker:
        """Return a worker for the same model that has learned nothing; `changes` are of its scheduler's settings."""
        worker = Worker(self.served, self.config, self._said.append, time.monotonic, self._woken.set)
        if changes:
            worker._scheduler = Scheduler(dataclasses.replace(worker._scheduler.config, **changes))
        return worker

    def run(self, worker: Worker, arrivals: Sequence[tuple[float, GenerateRequest]], keep: bool = False) -> Outcome:
        """Hand every job over at its time (s) and turn until all are done. With `keep` their pixels are kept."""
        outcome, waiting = Outcome(), list(arrivals)
        began = time.perf_counter()
        with torch.inference_mode():
            while waiting or worker.jobs:
                now = time.perf_counter() - began
                while waiting and waiting[0][0] <= now:
                    worker.submit(waiting.pop(0)[1])
                self._woken.clear()
                had_work = bool(worker.jobs)
                if not worker.turn():
                    self._woken.wait(max(0.0, waiting[0][0] - now) if waiting else 60.0)
                self._hear(outcome, began, keep)
                if had_work:
                    outcome.busy_s += time.perf_counter() - began - now
        return outcome

    def alone_s(self, worker: Worker, sort: Sort, *, runs: int = 3) -> float:
        """Return the median seconds of a job of the sort's mean steps that has the worker to itself."""
        steps = round(statistics.mean(sort.steps))
        taken = []
        for turn in range(runs + 1):  # the first chooses kernels and learns what may share a pass
            outcome = self.run(worker, [(0.0, sort.request(f"alone-{turn}", steps, turn))])
            taken.append(outcome.done_at_s[f"alone-{turn}"])
        return statistics.median(taken[1:])

    def _hear(self, outcome: Outcome, began: float, keep: bool) -> None:
        for message in self._said:
            if isinstance(message, Failed):
                raise SystemExit(f"{message.job_id} failed: {message.message}")
            if isinstance(message, Began):
                outcome.jobs_of_passes.append(message.job_ids)
            if isinstance(message, Finished):
                outcome.done_at_s[message.job_id] = time.perf_counter() - began
                path = Path(message.frames.path)
                if keep:
                    outcome.pixels[message.job_id] = path.read_bytes()
                path.unlink()
        self._said.clear()


def machine(device: torch.device) -> dict[str, object]:
    import diffusers
    import transformers

    return {
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "versions": [torch.__version__, diffusers.__version__, transformers.__version__],
    }
