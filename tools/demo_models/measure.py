"""Scores a model in training on held-out prompts and edits, on its own device, by the judges of `score`."""

import torch
from tokenizers import Tokenizer

from .feed import MAX_TOKENS
from .image_layouts import Layout
from .image_model import encode_pictures
from .image_tokenizer import END_ID
from .image_trainer import ImageTrainer
from .render import pack, render, to_device
from .score import benchmark, score_pixels, summary
from .score_edits import benchmark_edits, score_edit, summary_by_kind
from .sheet import to_images

_GUIDANCE_TRIED = (1.0, 1.5, 2.0, 3.0)


def encode_texts(trainer: ImageTrainer, tokenizer: Tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids and lengths of prompts, as the pipeline would make them."""
    ids = torch.zeros(len(texts), MAX_TOKENS, dtype=torch.long)
    lengths = torch.zeros(len(texts), dtype=torch.long)
    for i, text in enumerate(texts):
        row = [*tokenizer.encode(text, add_special_tokens=False).ids[: MAX_TOKENS - 1], END_ID]
        ids[i, : len(row)], lengths[i] = torch.tensor(row), len(row)
    return ids.to(trainer.run.device), lengths.to(trainer.run.device)


def score_prompts(
    trainer: ImageTrainer, tokenizer: Tokenizer, *, steps: int, guidance: float, num: int = 128,
    size: tuple[int, int] = (16, 16),
) -> dict[str, float]:  # fmt: skip
    """Scores of text to image on the benchmark."""
    if trainer.run.smoke:
        num, size = 2, (8, 8)
    specs = benchmark(num, seed=404)
    ids, lengths = encode_texts(trainer, tokenizer, [spec.prompt for spec in specs])
    verdicts = []
    for i in range(0, num, 64):
        part = slice(i, i + 64)
        pixels = trainer.sample(ids[part], lengths[part], Layout(size), steps=steps, guidance=guidance, seed=i)
        verdicts += score_pixels(pixels, specs[part])
    return summary(verdicts)


def score_edits(trainer: ImageTrainer, tokenizer: Tokenizer, *, steps: int, num: int = 96) -> dict[str, float]:
    """Share of right edits at 256 pixels, of all and of each kind."""
    run, side = trainer.run, 16
    if run.smoke:
        num, side = 2, 8
    edits = benchmark_edits(num, seed=405)
    ids, lengths = encode_texts(trainer, tokenizer, [edit.text for edit in edits])
    pixels = render(to_device(pack([edit.source for edit in edits]), run.device), side * 16, side * 16)
    with run.autocast():
        reference = encode_pictures(trainer.vae, pixels)
    layout = Layout((side, side), (side, side))
    drawn = trainer.sample(ids, lengths, layout, steps=steps, guidance=1.0, reference=reference)
    right = [score_edit(one, edit, run.device) for one, edit in zip(to_images(drawn), edits, strict=True)]
    return summary_by_kind(edits, right)


def best_guidance(trainer: ImageTrainer, tokenizer: Tokenizer) -> float:
    """The guidance scale with the best score; the smaller of equals."""
    best, best_score = 1.0, -1.0
    for guidance in _GUIDANCE_TRIED[:2] if trainer.run.smoke else _GUIDANCE_TRIED:
        scores = score_prompts(trainer, tokenizer, steps=2 if trainer.run.smoke else 10, guidance=guidance)
        trainer.run.log(f"guidance {guidance}: {scores}")
        if scores["all"] > best_score + 0.004:
            best, best_score = guidance, scores["all"]
    return best


def log_scores(trainer: ImageTrainer, tokenizer: Tokenizer, name: str, *, steps: int, guidance: float) -> float:
    """Log the scores at three sizes and of edits. Returns the mean share of all right."""
    totals = []
    for size in ((16, 16), (8, 8), (10, 16)):
        scores = score_prompts(trainer, tokenizer, steps=steps, guidance=guidance, size=size)
        trainer.run.log(f"{name}, {steps} steps, {size[1] * 16}x{size[0] * 16}: {scores}")
        totals.append(scores["all"])
    edits = score_edits(trainer, tokenizer, steps=steps)
    trainer.run.log(f"{name}, {steps} steps, edits: {edits}")
    return (sum(totals) + edits["all"]) / 4
