"""Trains the image model's transformer and text encoder: pictures and edits, mixed sizes and text lengths.

B batch, S tokens, C channels; sizes are (height, width) in 16-pixel tokens; time 1 is noise.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from .feed import Feed, Ring, group
from .image_model import (
    TOKEN_CHANNELS,
    TOKEN_PIXELS,
    WIDTH,
    Denoiser,
    TextFeatures,
    decode_pictures,
    encode_pictures,
    new_autoencoder,
    new_text_encoder,
    new_transformer,
)
from .image_tokenizer import END_ID
from .optimizer import Muon, WeightAverage
from .render import render
from .run import Run, load_weights, save_weights
from .semantics import SemanticHead, semantic_targets

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """One kind of training step: text to image, or an edit of a reference of its own size."""

    size: Size
    reference: Size | None = None

    @property
    def num_tokens(self) -> int:
        own = self.size[0] * self.size[1]
        return own if self.reference is None else own + self.reference[0] * self.reference[1]


_SIZES: dict[Size, float] = {
    (16, 16): 0.44, (12, 12): 0.11, (8, 8): 0.13, (10, 16): 0.08, (16, 10): 0.08, (12, 16): 0.08, (16, 12): 0.08,
}  # fmt: skip
LAYOUTS: dict[Layout, float] = {
    **{Layout(size): 0.62 * weight for size, weight in _SIZES.items()},
    **{Layout(size, size): 0.33 * weight for size, weight in _SIZES.items()},
    Layout((16, 16), (8, 8)): 0.02, Layout((16, 16), (12, 12)): 0.02, Layout((8, 8), (16, 16)): 0.01,
}  # fmt: skip
# Padding is visible to the transformer, so it must meet every length in training, the pipeline's 512 included.
_PROMPT_LENGTHS = {40: 0.66, 64: 0.14, 128: 0.1, 512: 0.1}
_EDIT_LENGTHS = {24: 0.66, 64: 0.18, 128: 0.08, 512: 0.08}
_TOKENS_PER_STEP = 120_000
_SEMANTIC_WEIGHT = 0.1
SHIFT = 3.0


def shifted(u: torch.Tensor) -> torch.Tensor:
    """The scheduler's time of an even position u in [0, 1]."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


class ImageTrainer:
    """The model in training, the data that feeds it, and one step on either."""

    def __init__(self, run: Run, tokenizer: Path, seed: int) -> None:
        self.run, self._rng = run, Random(seed)
        self._produced = 8 if run.smoke else 128
        workers = 1 if run.smoke else 6
        self._feeds = {
            "prompt": Feed("prompt", workers, self._produced, tokenizer, END_ID, seed),
            "edit": Feed("edit", workers, self._produced, tokenizer, END_ID, seed + 1),
        }
        torch.manual_seed(seed)
        device = run.device
        self.vae = new_autoencoder().to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.transformer = new_transformer().to(device)
        self.text_encoder = new_text_encoder().to(device)
        self.head = SemanticHead(WIDTH).to(device)
        self.denoiser, self.text = Denoiser(self.transformer), TextFeatures(self.text_encoder)
        self._rings: dict[Layout, Ring] = {}
        self.layouts = dict(list(LAYOUTS.items())[2::7]) if run.smoke else LAYOUTS

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"transformer": self.transformer, "text_encoder": self.text_encoder, "head": self.head}

    def compile(self) -> None:
        """Compile the blocks and run every shape once; falls back to eager if the compiler fails."""
        for block in (*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks):
            block.compile(dynamic=True)
        for layer in self.text.layers:
            layer.compile(dynamic=True)
        try:
            for grad in (True, False):
                for index, layout in enumerate(self.layouts):
                    for length in self._lengths(layout):
                        if index > 1 and length > 64:
                            continue
                        self._dry_step(layout, length, grad)
        except Exception as error:
            self.run.log(f"compiler failed, going on without: {error!r:.600}")
            torch.compiler.set_stance("force_eager")
        for module in self.modules().values():
            module.zero_grad(set_to_none=True)
        self.run.log("compiled")

    def _dry_step(self, layout: Layout, length: int, grad: bool) -> None:
        B, device = 16, self.run.device
        ids = torch.full((B, length), END_ID, device=device)
        with torch.set_grad_enabled(grad), self.run.autocast():
            text = self.text(ids, torch.full((B,), 3, device=device))
            tokens = torch.randn(B, layout.num_tokens, TOKEN_CHANNELS, device=device)
            time = torch.rand(B, device=device)
            out, middle = self.denoiser(tokens, text, time, layout.size, layout.reference)
        if grad:
            (out.float().mean() + middle.float().mean()).backward()

    def _lengths(self, layout: Layout) -> dict[int, float]:
        if self.run.smoke:
            return {24: 1.0}
        return _PROMPT_LENGTHS if layout.reference is None else _EDIT_LENGTHS

    def produce(self, layout: Layout) -> None:
        """Draw a fresh batch of scenes for one layout and put its latents in the ring."""
        device, (H, W) = self.run.device, layout.size
        batch = self._feeds["prompt" if layout.reference is None else "edit"].get(device)
        target = group(batch, "target.")
        with self.run.autocast():
            x = encode_pictures(self.vae, render(target, H * TOKEN_PIXELS, W * TOKEN_PIXELS))
            samples = {"x": x, "ids": batch["ids"].short(), "lengths": batch["lengths"]}
            if layout.reference is not None:
                h, w = layout.reference
                pixels = render(group(batch, "source."), h * TOKEN_PIXELS, w * TOKEN_PIXELS)
                samples["reference"] = encode_pictures(self.vae, pixels)
        classes, values = semantic_targets(target, H, W)
        samples |= {"classes": classes.to(torch.uint8), "values": values}
        if layout not in self._rings:
            self._rings[layout] = Ring(64 if self.run.smoke else (24_576 if layout.size == (16, 16) else 10_240))
        self._rings[layout].add(**samples)

    def prompts(self, num: int) -> dict[str, torch.Tensor]:
        """Ids and lengths of fresh prompts, without pictures."""
        ids, lengths = [], []
        while sum(len(one) for one in ids) < num:
            batch = self._feeds["prompt"].get(self.run.device)
            ids.append(batch["ids"])
            lengths.append(batch["lengths"])
        fitted, shortened = _fit(torch.cat(ids)[:num], torch.cat(lengths)[:num], 64)
        return {"ids": fitted, "lengths": shortened}

    def fill(self) -> None:
        for layout, weight in self.layouts.items():
            for _ in range(1 if self.run.smoke else max(4, int(weight * 70))):
                self.produce(layout)
        self.run.log("rings filled")

    def draw(self, tokens_per_step: int) -> tuple[Layout, dict[str, torch.Tensor]]:
        """A random layout and a batch for it; ids are cut or padded to a random text length."""
        layout = self._rng.choices(list(self.layouts), list(self.layouts.values()))[0]
        lengths = self._lengths(layout)
        length = self._rng.choices(list(lengths), list(lengths.values()))[0]
        B = 4 if self.run.smoke else min(1024, tokens_per_step // (layout.num_tokens + length) // 8 * 8)
        batch = self._rings[layout].draw(B)
        batch["ids"], batch["lengths"] = _fit(batch["ids"].long(), batch["lengths"], length)
        return layout, batch

    def velocity(self, noisy: torch.Tensor, time_B: torch.Tensor, text_BSD: torch.Tensor, layout: Layout,
                 reference: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Velocity of a grid (B, C, H, W), and the middle features."""
        tokens = noisy.flatten(2).transpose(1, 2)
        if reference is not None:
            tokens = torch.cat([tokens, reference.flatten(2).transpose(1, 2)], 1)
        out, middle = self.denoiser(tokens, text_BSD, time_B, layout.size, layout.reference)
        return out.float().transpose(1, 2).reshape(noisy.shape), middle

    def loss(self, layout: Layout, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow matching loss and the semantic hint's loss."""
        x = batch["x"]
        B, device = x.shape[0], x.device
        ids, lengths = batch["ids"], batch["lengths"]
        if layout.reference is None:
            ids, lengths = drop_text(ids, lengths, 0.05)
        time = torch.sigmoid(torch.randn(B, device=device) + 0.5)
        time = torch.where(torch.rand(B, device=device) < 0.2, torch.rand(B, device=device), time).clamp(1e-3, 1.0)
        noise = torch.randn_like(x)
        t = time.view(-1, 1, 1, 1)
        with self.run.autocast():
            text = self.text(ids, lengths)
            v, middle = self.velocity((1 - t) * x + t * noise, time, text, layout, batch.get("reference"))
            hint = self.head.loss(middle, batch["classes"], batch["values"])
        return F.mse_loss(v, noise - x), hint

    def train(self, until: float, peak_rate: float) -> None:
        """Train until `run.elapsed` reaches `until`; ends on the averaged weights."""
        run = self.run
        optimizer = self.new_optimizer()
        average = WeightAverage(self.modules().values())
        start, step, samples, last = run.elapsed, 0, 0, run.elapsed
        recent: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        while True:
            progress = (run.elapsed - start) / max(1.0, until - start)
            if progress >= 1 or (run.smoke and step >= 3):
                break
            rate = peak_rate * min(1, (step + 1) / 150) * (1 if progress < 0.55 else max(0.02, (1 - progress) / 0.45))
            layout, batch = self.draw(_TOKENS_PER_STEP)
            if step % (4 if progress < 0.4 else 8) == 0:
                self.produce(layout)
            loss, hint = self.loss(layout, batch)
            (loss + _SEMANTIC_WEIGHT * hint).backward()
            optimizer.step(rate)
            average.update(0.998 if progress > 0.55 else 0.99)
            samples, step = samples + batch["x"].shape[0], step + 1
            recent[layout.reference is None].append(torch.stack([loss.detach(), hint.detach()]))
            if step in (1, 2, 20, 100) or step % 400 == 0:
                shown = {k: [round(float(f), 4) for f in torch.stack(v[-150:]).mean(0)] for k, v in recent.items() if v}
                run.log(f"step {step} samples {samples} prompt {shown.get(True)} edit {shown.get(False)} "
                        f"{1000 * (run.elapsed - last) / max(1, min(step, 400)):.0f} ms")  # fmt: skip
                last = run.elapsed
        average.swap()
        run.log(f"trained {step} steps, {samples} samples")

    def new_optimizer(self) -> Muon:
        """Muon on the blocks' matrices, Adam on embeddings, modulations and ends."""
        matrices, others = [], []
        seen: set[int] = set()
        for prefix, module in self.modules().items():
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                inner = parameter.ndim == 2 and prefix != "head" and ("blocks." in name or "layers." in name)
                (matrices if inner else others).append(parameter)
        return Muon(matrices, others, beta=0.95, weight_decay=0.01)

    def save(self, name: str, facts: dict[str, float | int | str]) -> None:
        save_weights(self.run.folder / f"{name}.safetensors", self.modules(), facts)

    def load(self, name: str) -> None:
        load_weights(self.run.folder / f"{name}.safetensors", self.modules())

    def load_autoencoder(self) -> None:
        load_weights(self.run.folder / "image_vae.safetensors", {"vae": self.vae})

    @torch.no_grad()
    def sample(self, ids: torch.Tensor, lengths: torch.Tensor, layout: Layout, *, steps: int, guidance: float,
               reference: torch.Tensor | None = None, length: int = 64, seed: int = 0) -> torch.Tensor:  # fmt: skip
        """Pictures for token ids, drawn as the pipeline's scheduler draws them."""
        device, B = self.run.device, ids.shape[0]
        ids, lengths = _fit(ids, lengths, length)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(B, TOKEN_CHANNELS, *layout.size, generator=generator).to(device)
        times = [*shifted(torch.linspace(1, 1 / steps, steps)).tolist(), 0.0]
        with self.run.autocast():
            text = self.text(ids, lengths)
            empty = self.text(*drop_text(ids, lengths, 1.0)) if guidance != 1 else None
            for now, after in itertools.pairwise(times):
                time = torch.full((B,), now, device=device)
                v, _ = self.velocity(x, time, text, layout, reference)
                if empty is not None:
                    base, _ = self.velocity(x, time, empty, layout, reference)
                    v = base + guidance * (v - base)
                x = x + (after - now) * v
            return decode_pictures(self.vae, x)

    def close(self) -> None:
        for feed in self._feeds.values():
            feed.close()


def drop_text(ids: torch.Tensor, lengths: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace a share of the prompts by the empty one."""
    empty = torch.zeros_like(ids)
    empty[:, 0] = END_ID
    dropped = torch.rand(ids.shape[0], device=ids.device) < share
    return torch.where(dropped[:, None], empty, ids), torch.where(dropped, 1, lengths)


def _fit(ids: torch.Tensor, lengths: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids cut or padded to `length` columns, the end mark kept."""
    ids = ids[:, :length] if ids.shape[1] >= length else F.pad(ids, (0, length - ids.shape[1]))
    lengths = lengths.clamp_max(length)
    rows = torch.arange(ids.shape[0], device=ids.device)
    ids = ids.clone()
    ids[rows, lengths - 1] = END_ID
    return ids, lengths
