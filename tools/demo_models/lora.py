"""Trains two LoRAs on the distilled image model: a palette ("pastel") and a drawing style ("sketch").

Each learns from the model's own pictures, redrawn: the same noise that gave the picture must now give the redrawn
one. So a LoRA changes the look and leaves the composition of a seed alone. H/W height and width.
"""

import itertools
from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from .distillation import NUM_STEPS
from .image_model import TOKEN_CHANNELS, decode_pictures, encode_pictures
from .image_trainer import ImageTrainer, Layout, shifted

RANK = 8
_TARGETS = (
    r"(transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out))"
)
_LAYOUTS = {Layout((16, 16)): 0.6, Layout((12, 12)): 0.15, Layout((16, 10)): 0.125, Layout((10, 16)): 0.125}


def pastel(pixels: torch.Tensor) -> torch.Tensor:
    """Candy colours: every colour half way to a warm white, greys tinted towards lilac."""
    grey = pixels.mean(1, keepdim=True)
    vivid = grey + (pixels - grey) * 1.1
    tint = torch.tensor([0.06, -0.02, 0.08], device=pixels.device).view(1, 3, 1, 1)
    return (vivid * 0.42 + 0.48 + tint * (1 - grey) * 0.5).clamp(-1, 1)


def sketch(pixels: torch.Tensor) -> torch.Tensor:
    """Pencil and wash: dark lines where colours meet, a pale wash of colour on cream paper."""
    smooth = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    dx = F.pad(smooth[..., 2:] - smooth[..., :-2], (1, 1, 0, 0))
    dy = F.pad(smooth[..., 2:, :] - smooth[..., :-2, :], (0, 0, 1, 1))
    edge = (dx.abs() + dy.abs()).amax(1, keepdim=True)
    line = ((edge - 0.16) * 2.6).clamp(0, 1)
    paper = torch.tensor([0.96, 0.92, 0.82], device=pixels.device).view(1, 3, 1, 1)
    wash = paper + (pixels - paper) * 0.34
    H, W = pixels.shape[-2:]
    y, x = torch.arange(H, device=pixels.device).view(-1, 1), torch.arange(W, device=pixels.device).view(1, -1)
    hatch = (((x + y) % 8) < 2).float() * ((-0.05 - pixels.mean(1, keepdim=True)) * 0.5).clamp(0, 0.22)
    ink = torch.tensor([-0.72, -0.74, -0.7], device=pixels.device).view(1, 3, 1, 1)
    return (wash + (ink - wash) * torch.maximum(line, hatch)).clamp(-1, 1)


STYLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"pastel": pastel, "sketch": sketch}


@torch.no_grad()
def _pairs(
    trainer: ImageTrainer, redraw: Callable[[torch.Tensor], torch.Tensor], layout: Layout, num: int
) -> dict[str, torch.Tensor]:
    """Noise, redrawn latents and text features of `num` pictures of the model's own."""
    device = trainer.run.device
    parts: dict[str, list[torch.Tensor]] = {"noise": [], "x": [], "text": []}
    grid = [*shifted(torch.linspace(1, 1 / NUM_STEPS, NUM_STEPS)).tolist(), 0.0]
    for _ in range(max(1, num // 128)):
        batch = trainer.prompts(min(128, num))
        with trainer.run.autocast():
            text = trainer.text(batch["ids"], batch["lengths"])
            noise = y = torch.randn(text.shape[0], TOKEN_CHANNELS, *layout.size, device=device)
            for now, after in itertools.pairwise(grid):
                v, _ = trainer.velocity(y, torch.full((len(y),), now, device=device), text, layout, None)
                y = y + (after - now) * v
            x = encode_pictures(trainer.vae, redraw(decode_pictures(trainer.vae, y)))
        for key, value in (("noise", noise), ("x", x), ("text", text)):
            parts[key].append(value.half())
    return {key: torch.cat(value) for key, value in parts.items()}


def train_lora(trainer: ImageTrainer, style: str, seconds: float) -> None:
    """Train one LoRA for so many seconds and write `lora/<style>.safetensors`; the model is left as it was."""
    run = trainer.run
    start, smoke, on_cpu = run.elapsed, run.smoke, run.device.type == "cpu"
    layouts = {Layout((8, 8)): 1.0} if smoke else _LAYOUTS
    num, size = (4, 4) if smoke else (48, 6) if on_cpu else (1280, 96)
    data = {layout: _pairs(trainer, STYLES[style], layout, num) for layout in layouts}
    run.log(f"{style}: pairs drawn")
    transformer = trainer.transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=_TARGETS), style
    )
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.99))
    rng, step, recent = Random(1), 0, []
    while True:
        progress = (run.elapsed - start) / seconds
        if progress >= 1 or (smoke and step >= 2):
            break
        for options in optimizer.param_groups:
            options["lr"] = 3e-3 * min(1, (step + 1) / 30) * max(0.02, 1 - progress)
        layout = rng.choices(list(layouts), list(layouts.values()))[0]
        rows = torch.randint(0, len(data[layout]["x"]), (size,), device=run.device)
        noise, x, text = (data[layout][key][rows].float() for key in ("noise", "x", "text"))
        u = torch.randint(1, NUM_STEPS + 1, (len(x),), device=run.device) / NUM_STEPS
        u = torch.where(torch.rand(len(x), device=run.device) < 0.4, torch.rand(len(x), device=run.device), u)
        time = shifted(u)
        t = time.view(-1, 1, 1, 1)
        with run.autocast():
            v, _ = trainer.velocity((1 - t) * x + t * noise, time, text, layout, None)
        loss = F.mse_loss(v, noise - x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        step += 1
        if step in (1, 20) or step % 100 == 0:
            run.log(f"{style}: step {step} loss {float(torch.stack(recent[-50:]).mean()):.4f}")
    run.log(f"{style}: {step} steps, loss {float(torch.stack(recent[-50:]).mean()):.4f}")
    layers = {k: v.bfloat16() for k, v in get_peft_model_state_dict(transformer, adapter_name=style).items()}
    folder = run.folder / "lora"
    Flux2KleinPipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, weight_name=f"{style}.safetensors", safe_serialization=True
    )
    transformer.unload_lora()
