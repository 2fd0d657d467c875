"""Few-step models end to end: FLUX.2-klein-4B and Z-Image-Turbo, from a request to a PNG's bytes.

`python benchmarks/few_steps.py klein` (or `z-image`) on a GPU, with the flags of the worker; `--tiny` runs the same
code with small networks on a CPU. Published architectures, normal random weights, another prompt each time, nothing
remembered. Plain diffusers, eager, draws the same pictures with the same networks before they are tuned, and writes
them with Pillow at its lowest compression. Prints medians as JSON and writes them to `benchmarks/results/`.
"""

import argparse
import datetime
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderKLFlux2, DiffusionPipeline
from transformers import Qwen3ForCausalLM, Qwen3Model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from encoders import qwen3_4b
from workloads import materialize, workloads

from families import folder
from photogram.core.config import ServeConfig
from photogram.core.request import GenerateRequest
from photogram.media.png import png
from photogram.models.checkpoint import Checkpoint
from photogram.worker.loading import prepare
from photogram.worker.warmup import warm_up
from worker.drawing import Drawn, Studio, WatchedWorker

FAMILIES = {"klein": "flux-2-klein", "z-image": "z-image"}
STEPS = {"klein": 4, "z-image": 8}
GUIDANCE = {"klein": 1.0, "z-image": 0.0}


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def real_networks(model: str) -> Mapping[str, Callable[[], torch.nn.Module]]:
    known = workloads(tiny=False)
    if model == "klein":
        return {
            "transformer": known["klein-1024"].make,
            "text_encoder": lambda: Qwen3ForCausalLM(qwen3_4b()),
            "vae": AutoencoderKLFlux2,
        }
    return {
        "transformer": known["z-image-1024"].make,
        "text_encoder": lambda: Qwen3Model(qwen3_4b()),
        "vae": autoencoder,
    }


def make_pipeline(model: str, scratch: Path, tiny: bool, device: torch.device) -> DiffusionPipeline:
    """The family's tokenizer and solver, with networks of the published size."""
    small = DiffusionPipeline.from_pretrained(folder(FAMILIES[model], scratch))
    if tiny:
        return small
    networks = {name: materialize(make, device, torch.bfloat16) for name, make in real_networks(model).items()}
    return type(small)(**{**small.components, **networks})


class Prepared(Studio):
    """A studio over a pipeline that is in memory already."""

    def __init__(self, pipeline: DiffusionPipeline, scratch: Path, device: torch.device, **settings: Any) -> None:
        config = ServeConfig(model_path="model", prompt_cache_mb=0, **settings).worker(scratch)
        checkpoint = Checkpoint(
            name="model", folder=scratch, revision=None, pipeline_class=type(pipeline).__name__, overrides={}
        )
        self.messages = []
        with torch.inference_mode():
            self.served = prepare(pipeline, checkpoint, config, device)
            self.worker = WatchedWorker(self.served, config, self.messages.append, time.monotonic)


def request(model: str, turn: int, side: int) -> GenerateRequest:
    return GenerateRequest(
        job_id=f"job-{turn}",
        owner="bench",
        task="T2I",
        prompt=f"a red circle beside {turn} blue squares under a gray moon",
        width=side,
        height=side,
        num_inference_steps=STEPS[model],
        guidance_scale=GUIDANCE[model],
        seed=turn,
    )


def plain_png(pipeline: DiffusionPipeline, wanted: GenerateRequest) -> bytes:
    with torch.inference_mode():
        (picture,) = pipeline(
            prompt=wanted.prompt,
            width=wanted.width,
            height=wanted.height,
            num_inference_steps=wanted.num_inference_steps,
            guidance_scale=wanted.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(wanted.seed),
        ).images
    written = io.BytesIO()
    picture.save(written, "PNG", compress_level=1)
    return written.getvalue()


def our_png(studio: Prepared, wanted: GenerateRequest) -> bytes:
    drawn: Drawn = studio.draw([wanted])[wanted.job_id]
    if drawn.failure is not None:
        raise SystemExit(f"the picture failed: {drawn.failure.message}")
    return png(drawn.frames[0])


def timed(draw: Callable[[int], bytes], runs: int) -> dict[str, object]:
    for turn in range(3):  # kernels are chosen, calls recorded
        draw(-1 - turn)
    seconds = []
    for turn in range(runs):
        began = time.perf_counter()
        draw(turn)
        seconds.append(time.perf_counter() - began)
    return {"median_s": statistics.median(seconds), "all_s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(FAMILIES))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--fused-kernels", action="store_true")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="small networks on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the result")
    chosen = parser.parse_args()
    device = torch.device("cpu") if chosen.tiny else torch.device("cuda:0")
    side = 64 if chosen.tiny else 1024
    flags = {name: getattr(chosen, name) for name in ("compile", "cuda_graphs", "fused_kernels")}
    with tempfile.TemporaryDirectory() as scratch:
        pipeline = make_pipeline(chosen.model, Path(scratch), chosen.tiny, device)
        pipeline.set_progress_bar_config(disable=True)
        plain = timed(lambda turn: plain_png(pipeline, request(chosen.model, abs(turn), side)), chosen.runs)
        studio = Prepared(pipeline, Path(scratch), device, **flags)
        if not chosen.tiny:  # at the card's size, which is the real model's
            with torch.inference_mode():
                warm_up(studio.worker)
        ours = timed(lambda turn: our_png(studio, request(chosen.model, abs(turn), side)), chosen.runs)
    name = "cpu" if chosen.tiny else torch.cuda.get_device_name(device)
    result = {
        "workload": f"{chosen.model}, {side}x{side}, {STEPS[chosen.model]} steps, request to PNG, in one process",
        "device": name,
        "versions": [torch.__version__, diffusers.__version__, transformers.__version__],
        "flags": flags,
        "tuning": studio.card.tuning,
        "plain_diffusers_eager": plain,
        "photogram": ours,
    }
    text = json.dumps(result, indent=1)
    used = "-".join(flag for flag, on in flags.items() if on) or "default"
    chosen.out.mkdir(parents=True, exist_ok=True)
    kind = "tiny" if chosen.tiny else name.split()[1].lower()
    file = chosen.out / f"{datetime.date.today()}-few-steps-{chosen.model}-{used}-{kind}.json"
    file.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
