"""Trains the video model's autoencoder on whole clips; no transformer is worth training before it passes its gate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from .feed import Feed, group
from .image_autoencoder import psnr
from .optimizer import Muon, WeightAverage
from .recorded import Recorded
from .render import Params
from .run import Run, load_weights, save_weights
from .video_model import ACTIVATION, LatentScale, decode_latents, encode_moments, new_autoencoder, train_on_whole_clips
from .video_render import THINGS, render_clips
from .video_tokenizer import END_ID

_LEARNING_RATE = 5e-3
_KL_WEIGHT = 2e-4


@dataclass(frozen=True, slots=True)
class _Stage:
    """One kind of step: `num_windows` windows of `side` pixels (None: all of it) from each clip drawn at `drawn`.

    With `half` a latent of half the size should mean the clip at half the size: it keeps the latent space smooth.
    """

    drawn: tuple[int, int]
    num_clips: int
    num_windows: int
    frames: int
    side: int | None = None
    half: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        height, width = self.drawn if self.side is None else (self.side, self.side)
        return (self.num_clips * self.num_windows, 3, self.frames, height, width)


_SMALL, _CLOSE = _Stage((128, 128), 24, 4, 9, 64), _Stage((192, 192), 24, 4, 9, 64)
_MIDDLE = _Stage((144, 256), 12, 2, 17, 96)
_SQUARE, _WIDE = _Stage((128, 128), 20, 1, 17), _Stage((144, 256), 10, 1, 17)
_HALF = replace(_SQUARE, half=True)
_EARLY = {_SMALL: 0.4, _CLOSE: 0.2, _SQUARE: 0.3, _HALF: 0.1}
_LATE = {_CLOSE: 0.2, _MIDDLE: 0.2, _SQUARE: 0.25, _WIDE: 0.25, _HALF: 0.1}
_SMOKE = {_Stage((64, 64), 2, 1, 9, 32): 0.5, _Stage((64, 64), 2, 1, 9, 32, half=True): 0.5}


def _vary(p: Params) -> Params:
    """The same clips with some colours, angles and sizes that no caption names."""
    B, _, K = p["x"].shape
    device = p["x"].device
    q = dict(p)

    def chance(share: float) -> torch.Tensor:
        return torch.rand(B, 1, 1, device=device) < share

    rgb = torch.rand(B, 1, K, 3, device=device) * 2 - 1
    q["rgb"] = torch.where(chance(0.25)[..., None], rgb.expand_as(p["rgb"]), p["rgb"])
    turned = chance(0.25)
    q["angle"] = torch.where(turned, p["angle"] + torch.rand(B, 1, K, device=device) * 6.283, p["angle"])
    q["radius"] = p["radius"] * torch.where(turned, 0.6 + torch.rand(B, 1, K, device=device), 1.0)
    pale = (torch.rand(B, 1, 1, device=device) < 0.15).float()
    q["bands"] = p["bands"] * (1 - 0.5 * pale) + 0.45 * pale
    return q


def _toned(clips: torch.Tensor) -> torch.Tensor:
    """A tenth of the clips in other tones, as pictures from outside the drawn world have."""
    B, device = clips.shape[0], clips.device
    odd = (torch.rand(B, 1, 1, 1, 1, device=device) < 0.1).float()
    gain = 1 + odd * (torch.rand(B, 3, 1, 1, 1, device=device) - 0.7)
    return (clips * gain + odd * 0.4 * (torch.rand(B, 3, 1, 1, 1, device=device) - 0.5)).clamp(-1, 1)


def _part(p: Params, frames: int) -> Params:
    """A random run of consecutive frames."""
    start = int(torch.randint(0, p["x"].shape[1] - frames + 1, ()))
    return p | {key: p[key][:, start : start + frames] for key in THINGS}


def _windows(clips: torch.Tensor, stage: _Stage) -> torch.Tensor:
    """The stage's random square windows of each clip."""
    if stage.side is None:
        return clips
    cuts = []
    for _ in range(stage.num_windows):
        y, x = (int(torch.randint(0, limit - stage.side + 1, ())) for limit in clips.shape[3:])
        cuts.append(clips[..., y : y + stage.side, x : x + stage.side])
    return torch.cat(cuts)


def _edge_error(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    d = y - x
    flat = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    return flat + (d[:, :, 1:] - d[:, :, :-1]).abs().mean()


def _optimizer(vae: AutoencoderKLWan) -> Muon:
    ends = ("conv_in", "conv_out", "quant")
    matrices, others = [], []
    for name, parameter in vae.named_parameters():
        if not parameter.requires_grad:
            continue
        wide = parameter.ndim >= 4 and min(parameter.shape[0], parameter[0].numel()) >= 8
        (matrices if wide and not any(end in name for end in ends) else others).append(parameter)
    return Muon(matrices, others, beta=0.9, weight_decay=0.0)


class AutoencoderTrainer:
    """The autoencoder in training, its clips and its checkpoint `video_vae.safetensors`."""

    def __init__(self, run: Run, tokenizer: Path) -> None:
        self.run = run
        self._feed = Feed("clip17", 2 if run.smoke else 4, 8 if run.smoke else 64, tokenizer, END_ID, seed=17)
        torch.manual_seed(1)
        self.vae, self.scale = new_autoencoder().to(run.device), LatentScale().to(run.device)
        earlier = run.folder / "video_vae_start.safetensors"
        self.resumed = earlier.exists()
        if self.resumed:
            load_weights(earlier, {"vae": self.vae, "scale": self.scale})
        train_on_whole_clips(self.vae)
        self._pool = [self._fresh() for _ in range(2 if run.smoke else 12)]
        self._square = torch.zeros((), device=run.device)
        self._recorded: dict[_Stage, Recorded] = {}

    def _fresh(self) -> Params:
        return group(self._feed.get(self.run.device), "target.")

    @torch.no_grad()
    def _batch(self, stage: _Stage, step: int) -> torch.Tensor:
        scenes = self._pool[step % len(self._pool)]
        index = torch.randint(0, scenes["x"].shape[0], (stage.num_clips,), device=self.run.device)
        chosen = {key: value[index] for key, value in scenes.items()}
        clips = render_clips(_vary(_part(chosen, stage.frames)), *stage.drawn)
        return _toned(_windows(clips, stage))

    def _loss(self, x: torch.Tensor, *, half: bool) -> torch.Tensor:
        """The loss on clips x; their mean square error is left in `_square`."""
        with self.run.autocast():
            mean, log_variance = encode_moments(self.vae, x)
            z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            if half:
                z, x = (F.avg_pool3d(clips, (1, 2, 2)) for clips in (z, x))
            y = decode_latents(self.vae, z)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        square = ((y - x) ** 2).mean()
        self._square.copy_(square.detach())
        loss = (y - x).abs().mean() + 0.5 * _edge_error(y, x) + square
        return (0.25 if half else 1.0) * loss + _KL_WEIGHT * kl

    def _gradients(self, stage: _Stage, optimizer: Muon) -> Recorded:
        """The computation of a stage's gradients, recorded at its first use."""
        if stage not in self._recorded:

            def compute(inputs: dict[str, torch.Tensor]) -> None:
                optimizer.zero_gradients()
                self._loss(inputs["x"], half=stage.half).backward()

            before = self.run.elapsed
            self._recorded[stage] = Recorded(self.run, compute, {"x": torch.zeros(stage.shape, device=self.run.device)})
            self.run.log(f"{stage}: {self.run.elapsed - before:.1f} s to record")
        return self._recorded[stage]

    def train(self, until: float) -> int:
        """Train until `run.elapsed` reaches `until`; ends on the averaged weights. Returns the steps taken."""
        run, rng, optimizer = self.run, Random(1), _optimizer(self.vae)
        average = WeightAverage([self.vae])
        peak = _LEARNING_RATE * (0.5 if self.resumed else 1.0)
        step, start = 0, run.elapsed
        shown = saved = (run.elapsed, 0)
        while True:
            progress = (run.elapsed - start) / max(1.0, until - start)
            if progress >= 1 or (run.smoke and step >= 4):
                break
            rate = peak * min(1, (step + 1) / 60) * (1 if progress < 0.3 else max(0.02, (1 - progress) / 0.7))
            if step % 3 == 0:
                self._pool[(step // 3) % len(self._pool)] = self._fresh()
            stages = _SMOKE if run.smoke else _EARLY if progress < 0.35 and not self.resumed else _LATE
            stage = rng.choices(list(stages), list(stages.values()))[0]
            self._gradients(stage, optimizer)({"x": self._batch(stage, step)})
            optimizer.step(rate, rate * 0.25)
            average.update(0.996 if progress < 0.6 else 0.9985)
            step += 1
            if step % 25 == 0 or run.smoke:
                if run.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()  # the clock should read what has been done
                if run.elapsed - shown[0] > 10 or step == 25 or run.smoke:
                    decibels = 10 * math.log10(4 / max(float(self._square), 1e-9))
                    each_ms = 1000 * (run.elapsed - shown[0]) / (step - shown[1])
                    run.log(f"step {step} {stage.shape} psnr {decibels:.2f} {each_ms:.0f} ms")
                    shown = (run.elapsed, step)
                if run.elapsed - saved[0] > 50:
                    average.swap()
                    self.save("video_vae_part", {"steps": step})
                    average.swap()
                    saved = (run.elapsed, step)
        average.swap()
        self._recorded.clear()
        return step

    @torch.no_grad()
    def fit_scale(self) -> None:
        """Measure what the pipeline normalises latents by; the first frame's latents count like the others'."""
        rows = []
        for scenes in self._pool:
            size = (64, 64) if self.run.smoke else (144, 256)
            clips = render_clips({key: value[:12] for key, value in scenes.items()}, *size)
            with self.run.autocast():
                rows.append(encode_moments(self.vae, clips)[0].transpose(0, 1).flatten(1))
        flat = torch.cat(rows, 1).double()
        self.scale.mean.copy_(flat.mean(1))
        self.scale.std.copy_(flat.std(1))
        self.run.log(f"latent deviations {[round(float(v), 2) for v in flat.std(1)]}")

    @torch.no_grad()
    def measure(self, sizes: Sequence[tuple[int, int]]) -> dict[str, float]:
        """Decibels on fresh clips, and of their first frames, by size."""
        quality = {}
        scenes = {key: value[:24] for key, value in self._fresh().items()}
        for height, width in sizes:
            x = render_clips(scenes, height, width)
            with self.run.autocast():
                y = decode_latents(self.vae, encode_moments(self.vae, x)[0]).clamp(-1, 1)
            quality[f"{width}x{height}"] = round(psnr(x, y), 2)
            quality[f"{width}x{height} first"] = round(psnr(x[:, :, 0], y[:, :, 0]), 2)
        return quality

    def save(self, name: str, facts: dict[str, float | int | str]) -> None:
        save_weights(self.run.folder / f"{name}.safetensors", {"vae": self.vae, "scale": self.scale}, facts)

    def close(self) -> None:
        self._feed.close()


def train_video_autoencoder(run: Run, tokenizer: Path, gate_db: float = 33.0) -> float:
    """Train for the run's time and write `video_vae.safetensors`. Returns decibels at 256x144.

    Goes on from `video_vae_start.safetensors` if there is one.
    """
    trainer = AutoencoderTrainer(run, tokenizer)
    if run.device.type == "cuda":
        ACTIVATION.compile()
    try:
        steps = trainer.train(run.seconds - (0 if run.smoke else 6))
    finally:
        trainer.close()
    trainer.vae.eval().requires_grad_(False)
    trainer.fit_scale()
    quality = trainer.measure([(64, 64)] if run.smoke else [(128, 128), (192, 192), (144, 256)])
    best = quality["64x64" if run.smoke else "256x144"]
    run.log(f"{steps} steps, psnr {quality}" + ("" if best >= gate_db else f": below the gate of {gate_db} dB"))
    trainer.save("video_vae", {"psnr_db": best, "steps": steps})
    return best
