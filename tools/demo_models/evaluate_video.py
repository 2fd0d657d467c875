"""`python -m tools.demo_models.evaluate_video`: what the shipped video model gets right, by stock pipelines on the CPU.

Prints a row for clips from text and one for clips from a first frame, with the first frame's PSNR in dB.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from .video_score import ClipSpec, benchmark, by_motion, draw_ideal, frames_to_pixels, score_clips, summary

FOLDER = Path(__file__).parents[2] / "src/photogram/demo/video"
SEED = 90_211  # of the held-out prompts; training uses others


def main() -> None:
    """Draw and judge clips, and print the shares that are right."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_models.evaluate_video", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--num", type=int, default=52, help="clips of each row")
    parser.add_argument("--size", default="256x144")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sheet", type=Path, help="also write frames of some clips as a picture")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    text = WanPipeline.from_pretrained(arguments.folder)
    image = WanImageToVideoPipeline(**text.components, expand_timesteps=True, image_encoder=None, image_processor=None)
    fixed = {"height": height, "width": width, "num_frames": arguments.frames, "output_type": "pil"}
    fixed |= {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
    for pipeline in (text, image):
        pipeline.set_progress_bar_config(disable=True)
    specs = benchmark(arguments.num, SEED)
    began = time.monotonic()
    clips = [_clip(text, spec.prompt, seed, fixed) for seed, spec in enumerate(specs)]
    shown = clips[:3]
    print(f"from text, {(time.monotonic() - began) / len(specs):.1f} s a clip: {_row(clips, specs)}", flush=True)

    specs = [spec for spec in specs if spec.motion != "appear"]  # nothing to see in its first frame
    ideal = draw_ideal(specs, arguments.frames, height, width)
    firsts = [_picture(clip[:, 0]) for clip in ideal]
    clips = [
        _clip(image, spec.short_prompt, seed, fixed | {"image": first})
        for seed, (spec, first) in enumerate(zip(specs, firsts, strict=True))
    ]
    errors = [
        float(((clip[0, :, 0] - drawn[:, 0]) / 2).square().mean()) for clip, drawn in zip(clips, ideal, strict=True)
    ]
    decibels = sum(-10 * math.log10(error) for error in errors) / len(errors)
    if arguments.sheet is not None:
        _write_sheet(shown + clips[:6], arguments.sheet)
    print(f"from a first frame, kept at {decibels:.1f} dB: {_row(clips, specs)}")


def _clip(pipeline: WanPipeline, prompt: str, seed: int, arguments: dict) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return frames_to_pixels(pipeline(prompt=prompt, generator=generator, **arguments).frames[0])


def _picture(pixels_CHW: torch.Tensor) -> Image.Image:
    return Image.fromarray(((pixels_CHW + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def _write_sheet(clips: list[torch.Tensor], path: Path) -> None:
    """A row of six frames for each clip."""
    height, width = clips[0].shape[-2:]
    sheet = Image.new("RGB", (6 * width // 2, len(clips) * height // 2))
    for row, clip in enumerate(clips):
        for column in range(6):
            frame = _picture(clip[0, :, column * (clip.shape[2] - 1) // 5]).resize((width // 2, height // 2))
            sheet.paste(frame, (column * width // 2, row * height // 2))
    sheet.save(path, quality=80)


def _row(clips: list[torch.Tensor], specs: list[ClipSpec]) -> dict:
    verdicts = score_clips(torch.cat(clips), specs)
    return summary(verdicts) | {"motions": by_motion(specs, verdicts)}


if __name__ == "__main__":
    main()
