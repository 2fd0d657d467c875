"""SDXL's real architecture with random weights: eight requests of unequal steps, plain diffusers against the worker.

`python benchmarks/sdxl_batching.py` on a GPU; `--tiny` runs the same code on a CPU, to see that it works. With
`--compile` or `--cuda-graphs` the worker does so too; plain diffusers stays eager. Prints medians as JSON. Exact: each
job's latents are compared with those of the plain pipeline.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from families import folder
from photogram.core.config import ServeConfig
from photogram.core.request import GenerateRequest
from photogram.models.checkpoint import Checkpoint
from photogram.worker.loading import prepare
from worker.drawing import Studio, draw_alone, relative_error

STEPS = (20, 22, 24, 26, 28, 30, 32, 34)


def clip(kind: type, hidden: int, layers: int, heads: int, projection: int) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection,
    )
    return kind(config)


def real_pipeline(tokenizers: Path, device: torch.device) -> StableDiffusionXLPipeline:
    """SDXL base 1.0's published configuration, random weights, all in bf16."""
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        first = clip(CLIPTextModel, 768, 12, 12, 768)
        second = clip(CLIPTextModelWithProjection, 1280, 32, 20, 1280)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=1024,
            scaling_factor=0.13025,
            force_upcast=False,
        )
        torch.set_default_dtype(torch.float32)
    plain = StableDiffusionXLPipeline.from_pretrained(tokenizers, unet=None, vae=None)
    return StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=first.eval(),
        text_encoder_2=second.eval(),
        tokenizer=plain.tokenizer,
        tokenizer_2=plain.tokenizer_2,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler.from_config(plain.scheduler.config),
    )


def requests(side: int) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            job_id=f"job-{i}",
            owner="bench",
            task="T2I",
            prompt=f"a red circle number {i}",
            negative_prompt="blurry",
            width=side,
            height=side,
            num_inference_steps=steps,
            guidance_scale=5.0,
            seed=i,
        )
        for i, steps in enumerate(STEPS)
    ]


def timed(device: torch.device, work) -> tuple[float, object]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


class Prepared(Studio):
    """A studio over a pipeline that is in memory already."""

    def __init__(self, pipeline, frames_dir: Path, device: torch.device, **settings) -> None:
        from worker.drawing import WatchedWorker

        self.settings = settings
        config = ServeConfig(model_path="sdxl", **settings).worker(frames_dir)
        checkpoint = Checkpoint(
            name="sdxl", folder=frames_dir, revision=None, pipeline_class="StableDiffusionXLPipeline", overrides={}
        )
        self.messages = []
        with torch.inference_mode():
            self.served = prepare(pipeline, checkpoint, config, device)
            self.worker = WatchedWorker(self.served, config, self.messages.append, time.monotonic)

    def with_batches_of(self, size: int, frames_dir: Path) -> None:
        from worker.drawing import WatchedWorker

        config = ServeConfig(model_path="sdxl", max_batch_size=size, **self.settings).worker(frames_dir)
        known = self.worker.stacker
        self.worker = WatchedWorker(self.served, config, self.messages.append, time.monotonic)
        self.worker.stacker = known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=170, help="start no further run after this long")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.tiny else "cuda")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        small = folder("stable-diffusion-xl", Path(scratch))
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline.from_pretrained(small) if arguments.tiny else real_pipeline(small, device)
        jobs = requests(64 if arguments.tiny else 1024)
        with torch.inference_mode():
            draw_alone(pipeline.to(device), jobs[0])
        seconds: dict[str, list[float]] = {"diffusers, one after another": [], "interleaved": [], "batched": []}
        studio: Prepared | None = None
        references: dict[str, object] = {}

        def alone() -> dict[str, object]:
            with torch.inference_mode():
                return {job.job_id: draw_alone(pipeline, job) for job in jobs}

        for _ in range(arguments.runs):
            if time.perf_counter() - began > arguments.seconds / 2:
                break
            took, references = timed(device, alone)
            seconds["diffusers, one after another"].append(took)
        settings = {"compile": arguments.compile, "cuda_graphs": arguments.cuda_graphs}
        studio = Prepared(pipeline, Path(scratch), device, **settings)
        errors = {}
        for name, batch in (("interleaved", 1), ("batched", 8)):
            for run in range(arguments.runs + 1):
                if run > 1 and time.perf_counter() - began > arguments.seconds:
                    break
                studio.with_batches_of(batch, Path(scratch))
                took, drawn = timed(device, lambda: studio.draw(jobs))
                if run:  # the first warms up: shapes, the stacker's check
                    seconds[name].append(took)
            errors[name] = max(relative_error(drawn[j.job_id].latents, references[j.job_id].latents) for j in jobs)
        medians = {name: statistics.median(taken) for name, taken in seconds.items() if taken}
        base = medians["diffusers, one after another"]
        print(
            json.dumps(
                {
                    "workload": f"8 requests, {jobs[0].width}x{jobs[0].height}, CFG 5, {STEPS[0]} to {STEPS[-1]} steps",
                    "device": "cpu" if arguments.tiny else torch.cuda.get_device_name(),
                    "versions": [torch.__version__, diffusers.__version__, transformers.__version__],
                    "tuning": studio.card.tuning,
                    "seconds": seconds,
                    "median_s": medians,
                    "throughput": {name: base / value for name, value in medians.items()},
                    "largest_latent_error_of_range": errors,
                    "batches": sorted(len(jobs) for jobs in studio.passes("unet")),
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
