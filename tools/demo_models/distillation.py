"""Distils guidance and steps: a student whose one step is several guided steps of its teacher.

The student learns, at every time, the teacher's average guided velocity over a quarter of the schedule. Four of
its steps follow the teacher's path; more steps follow it a little ahead, which does no harm.
"""

import copy

import torch
import torch.nn.functional as F

from .image_layouts import Layout
from .image_model import Denoiser, TextFeatures
from .image_trainer import SHIFT, ImageTrainer, compile_blocks, drop_text, shifted, velocity
from .optimizer import WeightAverage

NUM_STEPS = 4


class _Teacher:
    """The trained model as it was, and its guided path.

    Its forward passes run with gradients on, and the results are detached: so the code compiled for training, which
    is specialised on that, serves the teacher too.
    """

    def __init__(self, trainer: ImageTrainer, guidance: float) -> None:
        self._guidance = guidance
        self._denoiser = Denoiser(copy.deepcopy(trainer.transformer))
        self._text = TextFeatures(copy.deepcopy(trainer.text_encoder))
        if trainer.run.device.type == "cuda":
            compile_blocks(self._denoiser, self._text)

    def _velocity(
        self, x: torch.Tensor, time_B: torch.Tensor, text_BSD: torch.Tensor, layout: Layout,
        reference: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        return velocity(self._denoiser, x, time_B, text_BSD, layout, reference)[0].detach()

    def average_velocity(
        self, x: torch.Tensor, u_B: torch.Tensor, batch: dict[str, torch.Tensor], layout: Layout, substeps: int = 2
    ) -> torch.Tensor:
        """Average velocity from position u to a quarter of the schedule later, by Euler steps."""
        guided, reference = layout.reference is None and self._guidance != 1, batch.get("reference")
        text = self._text(batch["ids"], batch["lengths"])
        if guided:
            text = torch.cat([text, self._text(*drop_text(batch["ids"], batch["lengths"], 1.0))])
        start = now = shifted(u_B)
        y = x
        for i in range(1, substeps + 1):
            after = shifted((u_B - i / (NUM_STEPS * substeps)).clamp_min(0))
            if guided:
                v = self._velocity(torch.cat([y, y]), torch.cat([now, now]), text, layout, None)
                with_text, without = v.chunk(2)
                v = without + self._guidance * (with_text - without)
            else:
                v = self._velocity(y, now, text, layout, reference)
            y = y + (after - now).view(-1, 1, 1, 1) * v
            now = after
        return (x - y) / (start - now).clamp_min(1e-4).view(-1, 1, 1, 1)


def distil(trainer: ImageTrainer, guidance: float, until: float, peak_rate: float = 6e-4) -> None:
    """Train the student in place of the trainer's weights until `run.elapsed` reaches `until`."""
    run, device = trainer.run, trainer.run.device
    teacher = _Teacher(trainer, guidance)
    optimizer, average = trainer.new_optimizer(), WeightAverage(trainer.modules().values())
    grid = 1 - torch.arange(NUM_STEPS, device=device) / NUM_STEPS
    start, step, samples, recent = run.elapsed, 0, 0, []
    while True:
        progress = (run.elapsed - start) / max(1.0, until - start)
        if progress >= 1 or (run.smoke and step >= 2):
            break
        rate = peak_rate * min(1, (step + 1) / 50) * (1 if progress < 0.4 else max(0.02, (1 - progress) / 0.6))
        (layout, _), batch = trainer.draw()
        if step % 4 == 0:
            trainer.produce(layout)
        x = batch["x"]
        B = x.shape[0]
        on_grid = grid[torch.randint(0, NUM_STEPS, (B,), device=device)]
        u = torch.where(torch.rand(B, device=device) < 0.6, on_grid, torch.rand(B, device=device).clamp_min(0.02))
        time = shifted(u)
        t = time.view(-1, 1, 1, 1)
        noisy = (1 - t) * x + t * torch.randn_like(x)
        with run.autocast():
            target = teacher.average_velocity(noisy, u, batch, layout)
            text = trainer.text(batch["ids"], batch["lengths"])
            v, _ = trainer.velocity(noisy, time, text, layout, batch.get("reference"))
        loss = F.mse_loss(v, target)
        loss.backward()
        optimizer.step(rate)
        average.update(0.998 if progress > 0.4 else 0.99)
        recent.append(loss.detach())
        step, samples = step + 1, samples + B
        if step in (1, 20) or step % 100 == 0:
            loss_now = float(torch.stack(recent[-100:]).mean())
            run.log(f"step {step} samples {samples} loss {loss_now:.4f} {1000 * (run.elapsed - start) / step:.0f} ms")
    average.swap()
    run.log(f"distilled {step} steps, {samples} samples, guidance {guidance}, shift {SHIFT}")
