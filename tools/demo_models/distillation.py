"""Distils guidance and steps: a student whose one step is several guided steps of its teacher.

The student learns, at every time, the teacher's average guided velocity over a quarter of the schedule. Four of
its steps follow the teacher's path; more steps follow it a little ahead, which does no harm.
"""

import torch
import torch.nn.functional as F

from .image_trainer import SHIFT, ImageTrainer, Layout, drop_text, shifted
from .optimizer import WeightAverage
from .score import benchmark, score_pixels, summary

NUM_STEPS = 4
_TOKENS_PER_STEP = 90_000
_GUIDANCE_TRIED = (1.5, 2.0, 3.0, 4.0)


def encode_texts(trainer: ImageTrainer, tokenizer: object, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids and lengths of prompts, as the pipeline would make them."""
    from tokenizers import Tokenizer

    from .feed import MAX_TOKENS
    from .image_tokenizer import END_ID

    assert isinstance(tokenizer, Tokenizer)
    ids = torch.zeros(len(texts), MAX_TOKENS, dtype=torch.long)
    lengths = torch.zeros(len(texts), dtype=torch.long)
    for i, text in enumerate(texts):
        row = [*tokenizer.encode(text, add_special_tokens=False).ids[: MAX_TOKENS - 1], END_ID]
        ids[i, : len(row)], lengths[i] = torch.tensor(row), len(row)
    return ids.to(trainer.run.device), lengths.to(trainer.run.device)


def quick_score(
    trainer: ImageTrainer, tokenizer: object, *, steps: int, guidance: float, num: int = 192, size: int = 16
) -> dict[str, float]:
    """Scores of text to image on the benchmark, drawn by the training code."""
    if trainer.run.smoke:
        num, size = 2, 8
    specs = benchmark(num, seed=404)
    ids, lengths = encode_texts(trainer, tokenizer, [spec.prompt for spec in specs])
    verdicts = []
    for i in range(0, num, 64):
        part = slice(i, i + 64)
        pixels = trainer.sample(ids[part], lengths[part], Layout((size, size)), steps=steps, guidance=guidance, seed=i)
        verdicts += score_pixels(pixels, specs[part])
    return summary(verdicts)


def best_guidance(trainer: ImageTrainer, tokenizer: object) -> float:
    """The guidance scale with the best score; the smaller of equals."""
    best, best_score = 1.0, -1.0
    for guidance in _GUIDANCE_TRIED[:2] if trainer.run.smoke else _GUIDANCE_TRIED:
        scores = quick_score(trainer, tokenizer, steps=2 if trainer.run.smoke else 10, guidance=guidance)
        trainer.run.log(f"guidance {guidance}: {scores}")
        if scores["all"] > best_score + 0.004:
            best, best_score = guidance, scores["all"]
    return best


class _Teacher:
    """The trained model's weights, frozen, and its guided path; borrows the trainer's modules for each look."""

    def __init__(self, trainer: ImageTrainer, guidance: float) -> None:
        self._trainer, self._guidance = trainer, guidance
        modules = (trainer.transformer, trainer.text_encoder)
        self._parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        self._weights = [p.detach().clone() for p in self._parameters]

    def _exchange(self) -> None:
        """Swap the modules' weights with the kept ones: compiled code serves teacher and student alike."""
        for i, parameter in enumerate(self._parameters):
            parameter.data, self._weights[i] = self._weights[i], parameter.data

    def average_velocity(
        self, x: torch.Tensor, u_B: torch.Tensor, batch: dict[str, torch.Tensor], layout: Layout
    ) -> torch.Tensor:
        """Average velocity from position u to a quarter of the schedule later, by two Euler steps."""
        self._exchange()
        try:
            return self._average_velocity(x, u_B, batch, layout, substeps=2)
        finally:
            self._exchange()

    @torch.no_grad()
    def _average_velocity(
        self, x: torch.Tensor, u_B: torch.Tensor, batch: dict[str, torch.Tensor], layout: Layout, substeps: int
    ) -> torch.Tensor:
        model, guided = self._trainer, layout.reference is None and self._guidance != 1
        reference = batch.get("reference")
        text = model.text(batch["ids"], batch["lengths"])
        if guided:
            text = torch.cat([text, model.text(*drop_text(batch["ids"], batch["lengths"], 1.0))])
        start = now = shifted(u_B)
        y = x
        for i in range(1, substeps + 1):
            after = shifted((u_B - i / (NUM_STEPS * substeps)).clamp_min(0))
            if guided:
                v, _ = model.velocity(torch.cat([y, y]), torch.cat([now, now]), text, layout, None)
                with_text, without = v.chunk(2)
                v = without + self._guidance * (with_text - without)
            else:
                v, _ = model.velocity(y, now, text, layout, reference)
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
        layout, batch = trainer.draw(_TOKENS_PER_STEP // (2 if trainer.run.smoke else 1))
        if step % 4 == 0:
            trainer.produce(layout)
        x = batch["x"]
        B = x.shape[0]
        on_grid = grid[torch.randint(0, NUM_STEPS, (B,), device=device)]
        u = torch.where(torch.rand(B, device=device) < 0.6, on_grid, torch.rand(B, device=device).clamp_min(0.02))
        time = shifted(u)
        t = time.view(-1, 1, 1, 1)
        noisy = (1 - t) * x + t * torch.randn_like(x)
        # Two contexts: autocast remembers a parameter's cast by the parameter, and the teacher's look at the
        # borrowed modules would be remembered for the student.
        with run.autocast():
            target = teacher.average_velocity(noisy, u, batch, layout)
        with run.autocast():
            text = trainer.text(batch["ids"], batch["lengths"])
            v, _ = trainer.velocity(noisy, time, text, layout, batch.get("reference"))
        loss = F.mse_loss(v, target)
        loss.backward()
        optimizer.step(rate)
        average.update(0.998 if progress > 0.4 else 0.99)
        recent.append(loss.detach())
        step, samples = step + 1, samples + B
        if step in (1, 20) or step % 200 == 0:
            run.log(f"step {step} samples {samples} loss {float(torch.stack(recent[-100:]).mean()):.4f}")
    average.swap()
    run.log(f"distilled {step} steps, {samples} samples, guidance {guidance}, shift {SHIFT}")
