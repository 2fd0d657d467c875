"""Distils guidance and steps of the video model: a student whose one step is two guided steps of its teacher."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .feed import MAX_TOKENS
from .image_autoencoder import psnr
from .optimizer import WeightAverage
from .recorded import Tensors
from .video_score import ClipSpec, ClipVerdict, benchmark, by_motion, draw_ideal, score_clips, summary
from .video_tokenizer import END_ID
from .video_trainer import SMALL, SQUARE, WIDE, Layout, VideoTrainer, drop_text, frame_error, shifted

NUM_STEPS = 6
_GUIDANCE_TRIED = (1.0, 2.0, 3.5)


def encode_texts(trainer: VideoTrainer, tokenizer: Path, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids and lengths of prompts, as the pipeline would make them."""
    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids = torch.zeros(len(texts), MAX_TOKENS, dtype=torch.long)
    lengths = torch.zeros(len(texts), dtype=torch.long)
    for i, text in enumerate(texts):
        row = [*encoder.encode(text, add_special_tokens=False).ids[: MAX_TOKENS - 1], END_ID]
        ids[i, : len(row)], lengths[i] = torch.tensor(row), len(row)
    return ids.to(trainer.run.device), lengths.to(trainer.run.device)


def quick_score(trainer: VideoTrainer, tokenizer: Path, *, steps: int, guidance: float, layout: Layout, num: int,
                given: bool = False) -> dict[str, float]:  # fmt: skip
    """Scores on the benchmark, drawn by the training code; from ideal first frames if `given`."""
    device = trainer.run.device
    specs = [s for s in benchmark(num * 2, seed=404) if not given or s.motion != "appear"][:num]
    ids, lengths = encode_texts(trainer, tokenizer, [s.short_prompt if given else s.prompt for s in specs])
    verdicts: list[ClipVerdict] = []
    first_db: list[float] = []
    for i in range(0, num, 52):
        part = slice(i, i + 52)
        first = _first_frames(specs[part], layout).to(device) if given else None
        clips = trainer.sample(ids[part], lengths[part], layout, steps=steps, guidance=guidance, seed=i, first=first)
        verdicts += score_clips(clips, specs[part])
        if first is not None:
            first_db.append(psnr(clips[:, :, 0], first))
    facts = summary(verdicts) | {"motions": by_motion(specs, verdicts)}
    return facts | ({"first frame": round(sum(first_db) / len(first_db), 2)} if first_db else {})


def _first_frames(specs: Sequence[ClipSpec], layout: Layout) -> torch.Tensor:
    return draw_ideal(specs, 2, layout.height * 16, layout.width * 16)[:, :, 0]


def report(trainer: VideoTrainer, tokenizer: Path, *, steps: int, guidance: float, until: float) -> None:
    """Log scores of several layouts, with and without a first frame, while there is time."""
    num = 2 if trainer.run.smoke else 104
    for layout, given in ((SQUARE, False), (WIDE, False), (WIDE, True), (SMALL, False)):
        if trainer.run.elapsed < until:
            with torch.compiler.set_stance("force_eager"):
                scores = quick_score(
                    trainer, tokenizer, steps=steps, guidance=guidance, layout=layout, num=num, given=given
                )
            trainer.run.log(f"{layout} {'from a frame' if given else ''} {steps} steps, guidance {guidance}: {scores}")


def best_guidance(trainer: VideoTrainer, tokenizer: Path) -> float:
    """The guidance scale with the best score; the smaller of equals."""
    best, best_score = 1.0, -1.0
    for guidance in _GUIDANCE_TRIED[:2] if trainer.run.smoke else _GUIDANCE_TRIED:
        with torch.compiler.set_stance("force_eager"):
            scores = quick_score(trainer, tokenizer, steps=2 if trainer.run.smoke else 12, guidance=guidance,
                                 layout=SQUARE, num=2 if trainer.run.smoke else 104)  # fmt: skip
        trainer.run.log(f"guidance {guidance}: {scores}")
        if scores["all"] > best_score + 0.004:
            best, best_score = guidance, scores["all"]
    return best


class _Teacher:
    """The trained model's weights, frozen, and its guided path; borrows the trainer's modules for each look."""

    def __init__(self, trainer: VideoTrainer, guidance: float) -> None:
        self._trainer, self._guidance = trainer, guidance
        modules = (trainer.transformer, trainer.text_encoder)
        self._parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        self._weights = [p.detach().clone() for p in self._parameters]

    def _exchange(self) -> None:
        """Swap the modules' weights with the kept ones: compiled code serves teacher and student alike."""
        for i, parameter in enumerate(self._parameters):
            parameter.data, self._weights[i] = self._weights[i], parameter.data

    def average_velocity(self, x: torch.Tensor, u_B: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Average velocity from position u to one student's step later, by two Euler steps.

        Gradients are on and the result is detached: so code compiled for training serves the teacher too.
        """
        self._exchange()
        try:
            return self._average_velocity(x, u_B, batch, substeps=2).detach()
        finally:
            self._exchange()

    def _average_velocity(self, x: torch.Tensor, u_B: torch.Tensor, batch: Tensors, substeps: int) -> torch.Tensor:
        model, given = self._trainer, batch["given"]
        text = model.text(batch["ids"], batch["lengths"], 512)
        empty = model.text(*drop_text(batch["ids"], batch["lengths"], 1.0), 512)
        start = now = shifted(u_B)
        y = x
        for i in range(1, substeps + 1):
            after = shifted((u_B - i / (NUM_STEPS * substeps)).clamp_min(0))
            v = model.denoiser(y, now, given, *text)[0].detach()
            if self._guidance != 1:
                base = model.denoiser(y, now, given, *empty)[0].detach()
                v = base + self._guidance * (v - base)
            moved = y + (after - now).view(-1, 1, 1, 1, 1) * v
            keep = given.view(-1, 1, 1, 1, 1) & (torch.arange(y.shape[2], device=y.device) == 0).view(1, 1, -1, 1, 1)
            y, now = torch.where(keep, y, moved), after
        return (x - y) / (start - now).clamp_min(1e-4).view(-1, 1, 1, 1, 1)


def distil(trainer: VideoTrainer, guidance: float, until: float, name: str, peak_rate: float = 6e-4) -> None:
    """Train the student in place of the trainer's weights until `run.elapsed` reaches `until`; save it as `name`."""
    run, device = trainer.run, trainer.run.device
    teacher = _Teacher(trainer, guidance)
    optimizer, average = trainer.new_optimizer(), WeightAverage(trainer.modules().values())
    grid = 1 - torch.arange(NUM_STEPS, device=device) / NUM_STEPS
    meter, recorded = torch.zeros(2, device=device), {}
    for layout in trainer.layouts:

        def compute(inputs: Tensors) -> None:
            optimizer.zero_gradients()
            loss = _student_loss(trainer, teacher, grid, inputs)
            loss.backward()
            meter.add_(torch.stack([loss.detach(), torch.ones_like(loss.detach())]))

        recorded[layout] = trainer.recorded(compute, layout, trainer.blank(layout))
    optimizer.zero_gradients()
    meter.zero_()
    start, step, samples, shown = run.elapsed, 0, 0, run.elapsed
    while True:
        progress = (run.elapsed - start) / max(1.0, until - start)
        if progress >= 1 or (run.smoke and step >= 2):
            break
        rate = peak_rate * min(1, (step + 1) / 50) * (1 if progress < 0.4 else max(0.02, (1 - progress) / 0.6))
        layout, batch = trainer.draw()
        if step % 8 == 0:
            trainer.produce(layout)
        recorded[layout](batch)
        optimizer.step(rate)
        average.update(0.998 if progress > 0.4 else 0.99)
        step, samples = step + 1, samples + batch["x"].shape[0]
        if step % 20 == 0 or run.smoke:
            trainer.wait()
            if run.elapsed - shown > 10 or step == 20 or run.smoke:
                loss, count = meter.tolist()
                meter.zero_()
                run.log(f"student step {step} samples {samples} loss {loss / count:.4f}")
                shown = run.elapsed
    average.swap()
    recorded.clear()
    trainer.save(name, {"guidance": guidance, "steps": NUM_STEPS})
    run.log(f"distilled {step} steps, {samples} samples, guidance {guidance}")


def _student_loss(trainer: VideoTrainer, teacher: _Teacher, grid: torch.Tensor, batch: Tensors) -> torch.Tensor:
    """How far the student's velocity is from its teacher's average one, at positions on the grid and between."""
    x, given = batch["x"], batch["given"]
    B, device = x.shape[0], x.device
    on_grid = grid[torch.randint(0, NUM_STEPS, (B,), device=device)]
    u = torch.where(torch.rand(B, device=device) < 0.6, on_grid, torch.rand(B, device=device).clamp_min(0.02))
    time = shifted(u)
    noisy = trainer.noisy(x, torch.randn_like(x), time, given)
    # Two contexts: autocast remembers a parameter's cast by the parameter, and the teacher's look at the
    # borrowed modules would be remembered for the student.
    with trainer.run.autocast():
        target = teacher.average_velocity(noisy, u, batch)
    with trainer.run.autocast():
        text, bias = trainer.text(batch["ids"], batch["lengths"])
        v, _ = trainer.denoiser(noisy, time, given, text, bias)
    return frame_error(v, target, given)
