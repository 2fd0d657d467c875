"""What the lossy modes save on a GPU: a denoise of Wan2.1-1.3B or FLUX.1 in each, and linear layers in fp8.

`python benchmarks/lossy.py wan` (832x480, 81 frames, 50 steps, guidance 5), `flux` (1024x1024, 28 steps) or `linears`;
`--tiny` runs the same code with small networks on a CPU, to see that it works. Published architectures with normal
random weights, but for the width of the text's embeddings, which come from a small encoder. Denoise times are the
worker's own. `exact` is drawn in fewer steps and scaled.

How well a step can be forecast depends on the weights, and random ones say nothing of it. So each mode is measured as
its recipe plans it, every step forecast that may be, which is what it saves where forecasts are good enough; how many
those were with real weights is the built-in models' to say (`quality.py`). Prints JSON, and writes it to
`benchmarks/results/`.
"""

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FluxTransformer2DModel, WanTransformer3DModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from exact import Clock, ceiling_tflops, error_of
from few_steps import Prepared, autoencoder
from quality import LossyStudio
from workloads import materialize

from families import folder
from photogram.core.quality_mode import RECIPES, Recipe
from photogram.core.request import GenerateRequest
from photogram.worker.fast.fp8 import Fp8Linears
from photogram.worker.job import Job
from photogram.worker.tuning.kernels.ops import quantize_rows

ALWAYS = 1e9  # a tolerance that every forecast meets
FP8_OVER_BF16 = 2  # rate of the tensor cores: no product in fp8 can be faster than this many times the ceiling in bf16


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model, and the request that is timed; `exact_steps` are drawn of the exact run."""

    family: str
    transformer: Callable[[dict[str, Any]], torch.nn.Module]
    vae: Callable[[], torch.nn.Module]
    width: int
    height: int
    steps: int
    exact_steps: int
    guidance: float
    num_frames: int | None = None


def wan(small: dict[str, Any]) -> torch.nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=128,
        ffn_dim=8960,
        num_layers=30,
        in_channels=16,
        out_channels=16,
        text_dim=small["text_dim"],
        freq_dim=256,
        rope_max_seq_len=1024,
    )


def flux(small: dict[str, Any]) -> torch.nn.Module:
    return FluxTransformer2DModel(
        joint_attention_dim=small["joint_attention_dim"],
        pooled_projection_dim=small["pooled_projection_dim"],
        guidance_embeds=True,
    )


MODELS = {
    "wan": Model(
        family="wan-2.1", transformer=wan, vae=AutoencoderKLWan, width=832, height=480, steps=50, exact_steps=10,
        guidance=5.0, num_frames=81,
    ),
    "flux": Model(
        family="flux-1", transformer=flux, vae=autoencoder, width=1024, height=1024, steps=28, exact_steps=28,
        guidance=3.5,
    ),
}  # fmt: skip


class LossyPrepared(LossyStudio, Prepared):
    """Draws a pipeline that is in memory with one recipe, and notes how long each job was denoised."""

    def settle(self) -> None:
        super().settle()
        self.jobs: dict[str, Job] = dict(self.worker.jobs)

    def denoise_s(self, job_id: str) -> float:
        return self.jobs[job_id].stages.seconds["denoise"]


def make_pipeline(model: Model, scratch: Path, *, tiny: bool, device: torch.device) -> DiffusionPipeline:
    small = DiffusionPipeline.from_pretrained(folder(model.family, scratch))
    if tiny:
        return small
    networks = {
        "transformer": materialize(lambda: model.transformer(dict(small.transformer.config)), device, torch.bfloat16),
        "vae": materialize(model.vae, device, torch.bfloat16),
    }
    made = type(small)(**{**small.components, **networks})
    for name in ("text_encoder", "text_encoder_2"):
        if made.components.get(name) is not None:
            made.components[name].to(device, torch.bfloat16)
    return made


def request(model: Model, name: str, steps: int, *, tiny: bool) -> GenerateRequest:
    return GenerateRequest(
        job_id=name,
        owner="benchmark",
        task="T2I" if model.num_frames is None else "T2V",
        prompt="a red circle beside a large blue square under a gray moon",
        negative_prompt="blurry" if model.num_frames is not None else None,
        width=64 if tiny else model.width,
        height=64 if tiny else model.height,
        num_frames=None if model.num_frames is None else 9 if tiny else model.num_frames,
        num_inference_steps=steps,
        guidance_scale=model.guidance,
        seed=0,
    )


def planned(recipe: Recipe | None, **changes: Any) -> Recipe | None:
    return None if recipe is None else replace(recipe, tolerance=ALWAYS, **changes)


def denoise(model: Model, scratch: Path, *, tiny: bool, device: torch.device, flags: dict[str, bool]) -> list[Any]:
    """Return a row for each way to draw."""
    can_fp8 = not (flags["compile"] or flags["fused_kernels"])
    pipeline = make_pipeline(model, scratch, tiny=tiny, device=device)
    studio = LossyPrepared(pipeline, scratch, device, fp8_linears=can_fp8, **flags)
    only_fp8 = Recipe(forecasts_in_a_row=0, tolerance=0.0, in_fp8=True)
    ways: list[tuple[str, Recipe | None, int]] = [
        ("exact", None, model.exact_steps),
        ("high", planned(RECIPES["high"]), model.steps),
        ("fast", planned(RECIPES["fast"], in_fp8=False), model.steps),
    ]
    if can_fp8:
        ways.append(("--fp8-linears alone", only_fp8, model.exact_steps))
        ways.append(("fast with --fp8-linears", planned(RECIPES["fast"]), model.steps))
    rows = []
    for number, (name, recipe, steps) in enumerate(ways):
        studio.recipe = recipe
        for turn, count in enumerate((4, steps)):  # the first chooses kernels
            job_id = f"job-{number}-{turn}"
            drawn = studio.draw([request(model, job_id, count, tiny=tiny)])[job_id]
            if drawn.failure is not None:
                raise SystemExit(f"{name}: {drawn.failure.message}")
        seconds = studio.denoise_s(job_id)
        calls = len(studio.passes("transformer"))
        rows.append(
            {
                "way": name,
                "steps_drawn": steps,
                "calls": calls,
                "denoise_s": seconds,
                f"denoise_s_of_{model.steps}_steps": seconds * model.steps / steps,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


# Tokens, inputs, outputs: Wan2.1-1.3B at 480p, FLUX.1 at 1024 pixels.
SHAPES = (
    (32760, 1536, 1536), (32760, 1536, 8960), (32760, 8960, 1536),
    (4608, 3072, 3072), (4608, 3072, 12288), (4608, 12288, 3072),
)  # fmt: skip
TINY_SHAPES = ((64, 128, 256),)


def linears(clock: Clock, *, tiny: bool) -> list[Any]:
    """Return a row for each shape: bf16, fp8 with the input's quantization and without, and the error."""
    ceiling = ceiling_tflops(clock)
    rows = []
    for tokens, inputs, outputs in TINY_SHAPES if tiny else SHAPES:
        block = torch.nn.ModuleDict({"0": torch.nn.Linear(inputs, outputs)})
        block = block.to(clock.device, torch.bfloat16).requires_grad_(False)
        layer = block["0"]
        x = torch.randn(tokens, inputs, device=clock.device, dtype=torch.bfloat16)
        exact = x.float() @ layer.weight.float().T + layer.bias.float()
        error_bf16 = error_of(layer(x), exact)
        bf16_s = min(clock.samples_s(lambda layer=layer, x=x: layer(x)))
        quantize_s = min(clock.samples_s(lambda x=x: quantize_rows(x)))
        fp8 = Fp8Linears(block, clock.device)

        def in_fp8(layer: torch.nn.Module = layer, x: torch.Tensor = x, fp8: Fp8Linears = fp8) -> torch.Tensor:
            with fp8.applied(()):
                return layer(x)

        error_fp8 = error_of(in_fp8(), exact)
        fp8_s = min(clock.samples_s(in_fp8))
        tflop = 2 * tokens * inputs * outputs / 1e12
        refused = tflop / fp8_s > 1.03 * FP8_OVER_BF16 * ceiling
        rows.append(
            {
                "tokens, inputs, outputs": [tokens, inputs, outputs],
                "bf16_tflops": tflop / bf16_s,
                "fp8_tflops": None if refused else tflop / fp8_s,
                "quantize_input_ms": quantize_s * 1000,
                "bf16_ms": bf16_s * 1000,
                "fp8_ms": fp8_s * 1000,
                "error_bf16": error_bf16,
                "error_fp8": error_fp8,
                "ceiling_bf16_tflops": ceiling,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*MODELS, "linears"))
    parser.add_argument("--compile", action="store_true", help="then without fp8")
    parser.add_argument("--fused-kernels", action="store_true", help="then without fp8")
    parser.add_argument("--seconds", type=float, default=150, help="time nothing more of linear layers after this long")
    parser.add_argument("--tiny", action="store_true", help="small networks on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the result")
    chosen = parser.parse_args()
    device = torch.device("cpu") if chosen.tiny else torch.device("cuda:0")
    flags = {"compile": chosen.compile, "fused_kernels": chosen.fused_kernels}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        if chosen.what == "linears":
            rows = linears(Clock(device, chosen.seconds), tiny=chosen.tiny)
        else:
            rows = denoise(MODELS[chosen.what], Path(scratch), tiny=chosen.tiny, device=device, flags=flags)
    name = "cpu" if chosen.tiny else torch.cuda.get_device_name(device)
    result = {
        "command": " ".join(["python benchmarks/lossy.py", *sys.argv[1:]]),
        "device": name,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "flags": flags,
        "recipes": {mode: None if recipe is None else recipe.sentence for mode, recipe in RECIPES.items()},
        "rows": rows,
    }
    print(json.dumps(result, indent=1))
    if not chosen.tiny:
        used = "-".join(flag for flag, on in flags.items() if on) or "default"
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        kind = name.split()[1].lower()
        (chosen.out / f"{today}-lossy-{chosen.what}-{used}-{kind}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
