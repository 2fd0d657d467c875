"""Trains the image model's autoencoder; nothing else starts before it reaches its gate in decibels."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from .feed import Feed, group
from .image_model import decode_pictures, encode_pictures, new_autoencoder, pack_latents
from .image_tokenizer import END_ID
from .optimizer import Muon, WeightAverage
from .render import Params, render
from .run import Run, load_weights, save_weights

_LEARNING_RATE = 5e-3
_KL_WEIGHT = 2e-4
_STAGES = ((64, 128), (128, 56), (256, 18))  # picture size, batch


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


def train_image_autoencoder(run: Run, tokenizer: Path, gate_db: float = 33.0) -> float:
    """Train until the run's time is over and write `image_vae.safetensors`. Returns decibels at 256 pixels.

    Goes on from `image_vae_start.safetensors` if there is one.
    """
    feed = Feed("prompt", 2 if run.smoke else 4, 8 if run.smoke else 64, tokenizer, END_ID, seed=17)
    device = run.device
    torch.manual_seed(1)
    vae = new_autoencoder().to(device).to(memory_format=torch.channels_last)
    earlier = run.folder / "image_vae_start.safetensors"
    if earlier.exists():
        load_weights(earlier, {"vae": vae})
    ends = ("conv_in", "conv_out", "quant")
    matrices = [
        p
        for n, p in vae.named_parameters()
        if p.ndim >= 4 and min(p.shape[0], p[0].numel()) >= 8 and not any(end in n for end in ends)
    ]
    chosen = {id(p) for p in matrices}
    optimizer = Muon(matrices, [p for p in vae.parameters() if id(p) not in chosen], beta=0.9, weight_decay=0.0)
    average = WeightAverage([vae])
    pool: list[Params] = [group(feed.get(device), "target.") for _ in range(2 if run.smoke else 8)]
    peak_rate = _LEARNING_RATE * (0.6 if earlier.exists() else 1.0)
    step, budget, start = 0, run.remaining - 6, run.elapsed
    while True:
        progress = (run.elapsed - start) / budget
        if progress >= 1 or (run.smoke and step >= 4):
            break
        rate = peak_rate * min(1, (step + 1) / 60) * (1 if progress < 0.3 else max(0.02, (1 - progress) / 0.7))
        if step % 4 == 0:
            pool[(step // 4) % len(pool)] = group(feed.get(device), "target.")
        size, batch = _STAGES[(step % 2) if progress < 0.45 and not earlier.exists() else (1, 2, 0, 2)[step % 4]]
        if run.smoke:
            size, batch = 64, 4
        scenes = pool[step % len(pool)]
        drawn_size = {64: 128 if step % 8 < 4 else 256, 128: 256 if step % 8 < 5 else 128, 256: 256}[size]
        windows = 4 if drawn_size > size else 1
        index = torch.randint(0, scenes["x"].shape[0], (max(1, batch // windows),), device=device)
        with torch.no_grad():
            x = render(_vary({key: value[index] for key, value in scenes.items()}), drawn_size, drawn_size)
            x = x if windows == 1 else _crop(x, size)
            x = x.contiguous(memory_format=torch.channels_last)
        with run.autocast():
            mean, log_variance = vae._encode(x).float().chunk(2, 1)
            log_variance = log_variance.clamp(-20, 5)
            z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            half = step % 4 == 3  # a smaller latent should mean a smaller picture: keeps the latent space smooth
            if half:
                z, x = F.avg_pool2d(z, 2), F.avg_pool2d(x, 2)
            y = vae._decode(z, return_dict=False)[0]
        y = y.float()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        loss = (y - x).abs().mean() + 0.5 * _gradient_error(y, x) + ((y - x) ** 2).mean()
        loss = (0.25 if half else 1.0) * loss + _KL_WEIGHT * kl
        loss.backward()
        optimizer.step(rate, rate * 0.25)
        average.update(0.996)
        if step in (0, 1, 20, 100) or step % 500 == 0:
            run.log(f"step {step} size {size} psnr {psnr(x, y.detach()):.2f} kl {float(kl):.3f}")
        step += 1
    average.swap()
    vae.eval().requires_grad_(False)
    _fit_statistics(run, vae, pool)
    quality = {}
    for size in (64,) if run.smoke else (128, 256):
        sample = {k: v[:48] for k, v in group(feed.get(device), "target.").items()}
        x = render(sample, size, size)
        with run.autocast():
            y = decode_pictures(vae, encode_pictures(vae, x))
        quality[size] = psnr(x, y)
    feed.close()
    best = quality[max(quality)]
    run.log(f"{step} steps, psnr {quality}" + ("" if best >= gate_db else f": below the gate of {gate_db} dB"))
    save_weights(run.folder / "image_vae.safetensors", {"vae": vae}, {"psnr_db": best, "steps": step})
    return best


@torch.no_grad()
def _fit_statistics(run: Run, vae: torch.nn.Module, pool: list[Params]) -> None:
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
