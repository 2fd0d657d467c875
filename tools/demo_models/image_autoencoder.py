"""Trains the image model's autoencoder, or its decoder alone."""

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2

from .feed import Feed, group
from .image_model import decode_pictures, encode_pictures, new_autoencoder, pack_latents
from .image_tokenizer import END_ID
from .optimizer import Muon, WeightAverage
from .recorded import Recorded
from .render import Params, pack, render, to_device
from .run import Run, load_weights, save_weights
from .score import benchmark, ideal_scene, score_pixels, summary

_LEARNING_RATE = 5e-3
_KL_WEIGHT = 2e-4


@dataclass(frozen=True, slots=True)
class _Stage:
    """One kind of step: windows of `size` pixels from pictures drawn at `drawn`; `half` as in `_loss`."""

    size: int
    drawn: int
    num_scenes: int
    half: bool = False

    @property
    def num_windows(self) -> int:
        return 4 if self.drawn > self.size else 1


# Small things at few pixels are the hard part: half of the steps are at 128 pixels.
_STAGES = {
    _Stage(128, 128, 44): 0.36, _Stage(64, 128, 40): 0.16, _Stage(256, 256, 11): 0.18, _Stage(128, 256, 11): 0.1,
    _Stage(192, 192, 20): 0.1, _Stage(128, 128, 44, half=True): 0.06, _Stage(256, 256, 11, half=True): 0.04,
}  # fmt: skip
_SMOKE_STAGES = {_Stage(64, 64, 2): 0.5, _Stage(64, 128, 1, half=True): 0.5}


def _vary(p: Params) -> Params:
    """The same scenes with some colours, angles and sizes that no caption names."""
    device, shape = p["x"].device, p["x"].shape
    q = dict(p)
    odd = (torch.rand(shape[0], 1, device=device) < 0.3) & (torch.rand(shape, device=device) < 0.7)
    q["rgb"] = torch.where(odd[..., None], torch.rand(*shape, 3, device=device) * 2 - 1, p["rgb"])
    turned = torch.rand(shape[0], 1, device=device) < 0.25
    q["angle"] = torch.where(turned, torch.rand(shape, device=device) * 6.283, p["angle"])
    q["radius"] = p["radius"] * torch.where(turned, 0.6 + torch.rand(shape, device=device), 1.0)
    faded = torch.rand(shape, device=device) < 0.06
    q["alpha"] = torch.where(faded, torch.rand(shape, device=device), p["alpha"])
    pale = (torch.rand(shape[0], 1, 1, device=device) < 0.15).float()
    q["bands"] = p["bands"] * (1 - 0.5 * pale) + 0.45 * pale
    return q


def _gradient_error(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    d = y - x
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


def _crop(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Four random windows of each picture."""
    limit = pixels.shape[-1] - size
    starts = torch.randint(0, limit + 1, (4, 2)).tolist()
    return torch.cat([pixels[:, :, y : y + size, x : x + size] for y, x in starts])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Decibels between two batches in [-1, 1]."""
    return 10 * math.log10(4 / max(float(((a - b) ** 2).mean()), 1e-9))


def _loss(
    run: Run, vae: AutoencoderKLFlux2, x: torch.Tensor, half: bool, frozen_encoder: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss on pictures x, and the mean square error.

    With `half` a latent of half the size should mean the picture at half the size: it keeps the latent space smooth.
    """
    with run.autocast():
        with torch.set_grad_enabled(not frozen_encoder):
            mean, log_variance = vae._encode(x).float().chunk(2, 1)
        log_variance = log_variance.clamp(-20, 5)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        if half:
            z, x = F.avg_pool2d(z, 2), F.avg_pool2d(x, 2)
        y = vae._decode(z, return_dict=False)[0].float()
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    square = ((y - x) ** 2).mean()
    loss = (y - x).abs().mean() + 0.7 * _gradient_error(y, x) + square
    return (0.25 if half else 1.0) * loss + _KL_WEIGHT * kl, square.detach()


def _new_optimizer(vae: AutoencoderKLFlux2) -> Muon:
    """Muon on the inner convolutions, Adam on the rest; parameters that are frozen are left out."""
    ends = ("conv_in", "conv_out", "quant")
    matrices, others = [], []
    for name, p in vae.named_parameters():
        if not p.requires_grad:
            continue
        inner = p.ndim >= 4 and min(p.shape[0], p[0].numel()) >= 8 and not any(end in name for end in ends)
        (matrices if inner else others).append(p)
    return Muon(matrices, others, beta=0.9, weight_decay=0.0)


def train_image_autoencoder(run: Run, tokenizer: Path, *, decoder_only: bool = False) -> float:
    """Train until the run's time is over and write `image_vae.safetensors`. Returns decibels at 256 pixels.

    Goes on from `image_vae_start.safetensors` if there is one; with `decoder_only` from `image_vae.safetensors`,
    whose latents then stay what they are.
    """
    feed = Feed("prompt", 2 if run.smoke else 4, 8 if run.smoke else 64, tokenizer, END_ID, seed=17)
    device = run.device
    torch.manual_seed(1)
    vae = new_autoencoder().to(device).to(memory_format=torch.channels_last)
    earlier = run.folder / ("image_vae.safetensors" if decoder_only else "image_vae_start.safetensors")
    resumed = earlier.exists()
    if resumed:
        load_weights(earlier, {"vae": vae})
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    pool: list[Params] = [group(feed.get(device), "target.") for _ in range(2 if run.smoke else 12)]
    _log_quality(run, vae, feed)
    optimizer = _new_optimizer(vae)
    average = WeightAverage([vae])
    stages = _SMOKE_STAGES if run.smoke else _STAGES
    square = torch.zeros((), device=device)
    recorded: dict[_Stage, Recorded] = {}
    for stage in stages:

        def compute(inputs: dict[str, torch.Tensor], stage: _Stage = stage) -> None:
            optimizer.zero_gradients()
            loss, error = _loss(run, vae, inputs["x"], stage.half, decoder_only)
            loss.backward()
            square.copy_(error)

        B = stage.num_scenes * stage.num_windows
        blank = torch.zeros(B, 3, stage.size, stage.size, device=device).contiguous(memory_format=torch.channels_last)
        recorded[stage] = Recorded(run, compute, {"x": blank})
    optimizer.zero_gradients()
    run.log("recorded")
    rng, peak_rate = Random(1), _LEARNING_RATE * (0.6 if resumed else 1.0)
    step, budget, start, shown = 0, run.remaining - 8, run.elapsed, run.elapsed
    while True:
        progress = (run.elapsed - start) / budget
        if progress >= 1 or (run.smoke and step >= 4):
            break
        rate = peak_rate * min(1, (step + 1) / 60) * (1 if progress < 0.3 else max(0.02, (1 - progress) / 0.7))
        if step % 4 == 0:
            pool[(step // 4) % len(pool)] = group(feed.get(device), "target.")
        stage = rng.choices(list(stages), list(stages.values()))[0]
        scenes = pool[step % len(pool)]
        index = torch.randint(0, scenes["x"].shape[0], (stage.num_scenes,), device=device)
        with torch.no_grad():
            x = render(_vary({key: value[index] for key, value in scenes.items()}), stage.drawn, stage.drawn)
            x = x if stage.num_windows == 1 else _crop(x, stage.size)
        recorded[stage]({"x": x})
        optimizer.step(rate, rate * 0.25)
        average.update(0.997)
        step += 1
        if run.elapsed - shown > 10 or run.smoke:
            run.log(f"step {step} size {stage.size} psnr {10 * math.log10(4 / max(float(square), 1e-9)):.2f}")
            shown = run.elapsed
    average.swap()
    recorded.clear()
    vae.eval().requires_grad_(False)
    if not decoder_only:
        _fit_statistics(run, vae, pool)
    best = _log_quality(run, vae, feed)
    feed.close()
    run.log(f"{step} steps")
    save_weights(run.folder / "image_vae.safetensors", {"vae": vae}, {"psnr_db": best, "steps": step})
    return best


@torch.no_grad()
def _log_quality(run: Run, vae: AutoencoderKLFlux2, feed: Feed) -> float:
    """Decibels on fresh scenes, and how the judge likes its own drawings once they went through the autoencoder."""
    scenes = group(feed.get(run.device), "target.")
    specs = benchmark(4 if run.smoke else 96, seed=404)
    drawn = to_device(pack([ideal_scene(spec) for spec in specs]), run.device)
    best = 0.0
    for size in (64,) if run.smoke else (128, 192, 256):
        with run.autocast():
            x, ideal = render({k: v[:48] for k, v in scenes.items()}, size, size), render(drawn, size, size)
            best = psnr(x, decode_pictures(vae, encode_pictures(vae, x)))
            seen = score_pixels(decode_pictures(vae, encode_pictures(vae, ideal)), specs)
        run.log(f"{size} pixels: {best:.2f} dB, shapes right {summary(seen)['shape']}")
    return best


@torch.no_grad()
def _fit_statistics(run: Run, vae: AutoencoderKLFlux2, pool: list[Params]) -> None:
    """Set the batch norm by which the pipeline normalises latents."""
    grids = []
    for scenes in pool[:8]:
        for size in (64,) if run.smoke else (128, 256):
            x = render({k: v[:32] for k, v in scenes.items()}, size, size).contiguous(memory_format=torch.channels_last)
            with run.autocast():
                grids.append(
                    pack_latents(vae._encode(x).float().chunk(2, 1)[0].contiguous()).transpose(0, 1).flatten(1)
                )
    flat = torch.cat(grids, 1).double()
    vae.bn.running_mean.copy_(flat.mean(1))
    vae.bn.running_var.copy_(flat.var(1))
    run.log(f"latent deviations {[round(float(v), 2) for v in flat.std(1)[:8]]}")
