"""What the quality modes cost in quality and save in work, on the built-in models, on a CPU.

`python benchmarks/quality.py` draws held-out prompts with every call run, and again in each mode and with each of its
parts alone, from the same seeds, and compares: PSNR, SSIM and a perceptual distance to what `exact` draws, the share of
the pictures and clips that is right by the judges that scored the models in training, and the share of the denoiser's
calls that were left out. `--tiny` draws two of each in few steps, to see that it works. Prints a table, and writes the
figures to `benchmarks/results/`.

The image model is made for 4 to 6 steps and has no guidance: of so few steps nothing can be left out, so it is given
16, and only the clips say what leaving out guidance does. Clips begin with a given frame, as the model is far better at
those than from text.
"""

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from likeness import FeatureDistance, psnr, ssim
from tools.demo_models import score, video_score

from photogram.core.quality_mode import RECIPES, Recipe, describe_mode
from photogram.core.request import GenerateRequest
from photogram.worker.fast.shortcuts import Shortcuts
from worker.drawing import Studio

DEMO = ROOT / "src" / "photogram" / "demo"
PROMPTS_SEED = 31_337  # training and its scores use others
SUBJECTS = ("pictures", "clips")
Judge = Callable[[Sequence[np.ndarray]], float]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to draw: what is left out of a run."""

    name: str
    recipe: Recipe | None
    for_clips_only: bool = False


def variants() -> tuple[Variant, ...]:
    high, fast = RECIPES["high"], RECIPES["fast"]
    assert high is not None
    assert fast is not None
    never = {"forecasts_in_a_row": 0}
    return (
        Variant(name="`exact`", recipe=None),
        Variant(name="`high`", recipe=high),
        Variant(name="its forecasts alone", recipe=replace(high, guided=1.0), for_clips_only=True),
        Variant(name="its guidance alone", recipe=replace(high, **never), for_clips_only=True),
        Variant(name="`fast`", recipe=replace(fast, in_fp8=False)),
        Variant(name="its forecasts alone", recipe=replace(fast, guided=1.0, in_fp8=False), for_clips_only=True),
        Variant(name="its guidance alone", recipe=replace(fast, **never, in_fp8=False), for_clips_only=True),
        Variant(name="`--fp8-linears` alone", recipe=replace(fast, **never, guided=1.0, in_fp8=True)),
        Variant(name="`fast` with `--fp8-linears`", recipe=fast),
    )


class LossyStudio(Studio):
    """Draws with one recipe for all jobs."""

    recipe: Recipe | None = None

    def settle(self) -> None:
        super().settle()
        for job in self.worker.jobs.values():
            job.shortcuts = Shortcuts(self.recipe)
            job.fiber.in_fp8 = self.recipe is not None and self.recipe.in_fp8


@dataclass(kw_only=True)
class Subject:
    """What is drawn with every variant, and who judges it."""

    name: str
    studio: LossyStudio
    requests: list[GenerateRequest]
    judge: Judge

    def draw(self, variant: Variant) -> tuple[list[np.ndarray], int, float]:
        """Return frames (F, H, W, 3) by request, how many denoiser calls were run, and the seconds it took."""
        self.studio.recipe = variant.recipe
        began = time.monotonic()
        drawn = self.studio.draw(self.requests)
        seconds = time.monotonic() - began
        calls = sum(len(job_ids) for job_ids in self.studio.passes("transformer"))
        frames = [drawn[request.job_id].frames for request in self.requests]
        assert all(one is not None for one in frames), [one.failure for one in drawn.values()]
        return frames, calls, seconds


def pictures(scratch: Path, *, num: int, steps: int) -> Subject:
    studio = LossyStudio(DEMO / "image", scratch, fp8_linears=True)
    specs = score.benchmark(num, PROMPTS_SEED)

    def judge(drawn: Sequence[np.ndarray]) -> float:
        pixels = torch.cat([_pixels(frames) for frames in drawn]) * 2 - 1
        return score.summary(score.score_pixels(pixels, specs))["all"]

    requests = _requests(studio, [spec.prompt for spec in specs], steps)
    return Subject(name=f"pictures, {steps} steps", studio=studio, requests=requests, judge=judge)


def clips(scratch: Path, *, num: int, steps: int) -> Subject:
    studio = LossyStudio(DEMO / "video", scratch, fp8_linears=True)
    card = studio.card
    # What appears is not seen in the first frame.
    motions = tuple(motion for motion in video_score.SCORED_MOTIONS if motion != "appear")
    specs = video_score.benchmark(num, PROMPTS_SEED, motions=motions)
    frames = video_score.draw_ideal(specs, card.default_frames, card.default_height, card.default_width)
    firsts = [scratch / f"first-{number}.png" for number in range(num)]
    for file, pixels_CHW in zip(firsts, frames[:, :, 0], strict=True):
        Image.fromarray(((pixels_CHW + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(file)

    def judge(drawn: Sequence[np.ndarray]) -> float:
        pixels = torch.stack([_pixels(frames).transpose(0, 1) for frames in drawn]) * 2 - 1
        return video_score.summary(video_score.score_clips(pixels, specs))["all"]

    requests = [
        msgspec.structs.replace(request, task="I2V", images=(str(first),))
        for request, first in zip(_requests(studio, [spec.short_prompt for spec in specs], steps), firsts, strict=True)
    ]
    return Subject(name=f"clips, {steps} steps, guided", studio=studio, requests=requests, judge=judge)


def _requests(studio: Studio, prompts: Sequence[str], steps: int) -> list[GenerateRequest]:
    card = studio.card
    return [
        GenerateRequest(
            job_id=f"{card.media}-{number}",
            owner="benchmark",
            task=card.tasks[0],
            prompt=prompt,
            width=card.default_width,
            height=card.default_height,
            num_frames=card.default_frames,
            fps=card.default_fps,
            num_inference_steps=steps,
            guidance_scale=card.default_guidance,
            seed=number,
            extra=card.defaults,
        )
        for number, prompt in enumerate(prompts)
    ]


def _pixels(frames: np.ndarray) -> torch.Tensor:
    """Frames (F, H, W, 3) as floats (F, 3, H, W) from 0 to 1."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def compare(subject: Subject, chosen: Sequence[Variant], distance: FeatureDistance) -> Iterator[dict[str, Any]]:
    """Yield a row of figures for each variant; the first is what the others are compared with."""
    all_calls = 0
    references: list[np.ndarray] = []
    for variant in chosen:
        drawn, calls, seconds = subject.draw(variant)
        references, all_calls = references or drawn, all_calls or calls
        alike = [(_pixels(one), _pixels(other)) for one, other in zip(drawn, references, strict=True)]
        yield {
            "subject": subject.name,
            "variant": variant.name,
            "calls": calls,
            "calls_left_out": 1 - calls / all_calls,
            "psnr_db": _mean(psnr, alike),
            "ssim": _mean(ssim, alike),
            "distance": _mean(distance, alike),
            "right": subject.judge(drawn),
            "seconds": seconds,
        }


def _mean(measure: Callable[..., torch.Tensor], alike: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return float(np.mean([float(measure(*pair).mean()) for pair in alike]))


HEAD = (
    "| | calls left out | PSNR, dB | SSIM | distance | right |",
    "|---|---|---|---|---|---|",
)


def _line(row: Mapping[str, Any]) -> str:
    is_exact = row["calls_left_out"] == 0 and row["distance"] == 0
    alike = "| | | " if is_exact else f"| {row['psnr_db']:.1f} | {row['ssim']:.3f} | {row['distance']:.4f} "
    return f"| {row['subject']}: {row['variant']} | {row['calls_left_out']:.0%} {alike}| {row['right']:.0%} |"


def save(name: str, rows: list[dict[str, Any]], chosen: argparse.Namespace) -> None:
    """Write what there is, so that a run that is cut off leaves it."""
    result = {
        "command": " ".join(["python benchmarks/quality.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "count": getattr(chosen, name),
        "recipes": {mode: describe_mode(mode) for mode in RECIPES},
        "rows": rows,
    }
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    (chosen.out / f"{today}-quality-modes-{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", help=f"any of {', '.join(SUBJECTS)}; default: all")
    parser.add_argument("--pictures", type=int, default=24, help="pictures for each variant")
    parser.add_argument("--clips", type=int, default=8, help="clips for each variant")
    parser.add_argument("--picture-steps", type=int, default=16)
    parser.add_argument("--clip-steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="two of each in eight steps")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the result")
    chosen = parser.parse_args()
    if unknown := set(chosen.subjects) - set(SUBJECTS):
        parser.error(f"no such subject: {', '.join(sorted(unknown))}")
    if chosen.tiny:
        chosen.pictures = chosen.clips = 2
        chosen.picture_steps = chosen.clip_steps = 8
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        image = pictures(Path(scratch), num=chosen.pictures, steps=chosen.picture_steps)
        distance = FeatureDistance(image.studio.served.pipeline.vae)
        print("\n".join(HEAD))
        for name in chosen.subjects or SUBJECTS:
            if name == "clips":
                video = clips(Path(scratch), num=chosen.clips, steps=chosen.clip_steps)
                figures = compare(video, variants(), distance)
            else:
                figures = compare(image, [one for one in variants() if not one.for_clips_only], distance)
            rows: list[dict[str, Any]] = []
            for row in figures:
                rows.append(row)
                print(_line(row), flush=True)
                if not chosen.tiny:
                    save(name, rows, chosen)


if __name__ == "__main__":
    main()
