"""`python -m tools.demo_models.evaluate FOLDER`: the score table of an image model, through the stock pipeline."""

import argparse
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .score import Spec, Verdict, benchmark, score_image, summary
from .score_edits import benchmark_edits, draw_scene, score_edit, summary_by_kind


def load(folder: Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The stock pipeline of a folder, silent."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: DiffusionPipeline, prompt: str, *, seed: int, size: tuple[int, int] = (256, 256), steps: int = 4,
    text_length: int = 512, image: Image.Image | None = None,
) -> Image.Image:  # fmt: skip
    """One picture; `size` is (width, height) in pixels."""
    result = pipeline(
        image=image, prompt=prompt, width=size[0], height=size[1], num_inference_steps=steps, guidance_scale=1.0,
        max_sequence_length=text_length, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return result.images[0]


def evaluate_prompts(
    pipeline: DiffusionPipeline, specs: list[Spec], size: tuple[int, int], steps: int, text_length: int
) -> tuple[dict[str, float], list[Image.Image]]:
    """Scores and pictures of benchmark prompts."""
    verdicts: list[Verdict] = []
    images: list[Image.Image] = []
    for seed, spec in enumerate(specs):
        images.append(draw(pipeline, spec.prompt, seed=seed, size=size, steps=steps, text_length=text_length))
        verdicts.append(score_image(images[-1], spec))
    return summary(verdicts), images


def main() -> None:
    """Parse the command line and print one line per setting."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_models.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("src/photogram/demo/image"))
    parser.add_argument("--num", type=int, default=128, help="prompts per setting")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    pipeline = load(arguments.folder, getattr(torch, arguments.dtype))
    settings = [
        ("256x256, text 512", (256, 256), 4, 512, False), ("256x256, text 64", (256, 256), 4, 64, False),
        ("256x256, unseen pairs", (256, 256), 4, 64, True), ("256x256, 8 steps", (256, 256), 8, 64, False),
        ("128x128", (128, 128), 4, 64, False), ("192x192", (192, 192), 4, 64, False),
        ("256x160", (256, 160), 4, 64, False), ("160x256", (160, 256), 4, 64, False),
    ]  # fmt: skip
    for name, size, steps, length, held in settings:
        started = time.monotonic()
        scores, _ = evaluate_prompts(pipeline, benchmark(arguments.num, 2024, held=held), size, steps, length)
        seconds = (time.monotonic() - started) / arguments.num
        print(f"{name:24} {scores} {seconds:.2f} s each", flush=True)
    edits = benchmark_edits(arguments.num, 2025)
    right = []
    for seed, edit in enumerate(edits):
        source = draw_scene(edit.source)
        right.append(score_edit(draw(pipeline, edit.text, seed=seed, text_length=64, image=source), edit))
    print(f"{'edits, 256x256':24} {summary_by_kind(edits, right)}", flush=True)


if __name__ == "__main__":
    main()
