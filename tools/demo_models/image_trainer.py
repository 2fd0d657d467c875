"""Trains the image model's transformer and text encoder: pictures and edits, mixed sizes and text lengths.

B batch, S tokens, C channels; sizes are (height, width) in 16-pixel tokens; time 1 is noise.
"""

import itertools
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from .feed import Feed, Ring, group
from .image_layouts import Layout, Step, all_steps, smoke_steps
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
from .recorded import Recorded
from .render import render
from .run import Run, load_weights, save_weights
from .semantics import NUM_CLASSES, NUM_VALUES, SemanticHead, semantic_targets

Tensors = dict[str, torch.Tensor]
_TOKENS_PER_STEP = 64_000
_SEMANTIC_WEIGHT = 0.1
_THING_WEIGHT = 2.0  # how much more a token counts that shows a thing, once its place can be seen
_SAVE_EVERY_S = 60
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
        self.steps = smoke_steps() if run.smoke else all_steps()
        self.layouts: dict[Layout, float] = {}
        for (layout, _), share in self.steps.items():
            self.layouts[layout] = self.layouts.get(layout, 0.0) + share

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"transformer": self.transformer, "text_encoder": self.text_encoder, "head": self.head}

    def compile(self) -> None:
        """Have the blocks compiled at their first use, for every size at once."""
        compile_blocks(self.denoiser, self.text)

    def record(self, optimizer: Muon) -> None:
        """Compile and record the computation of gradients for every kind of step."""
        self.meter = torch.zeros(2, 3, device=self.run.device)
        self._recorded: dict[Step, Recorded] = {}
        for step in self.steps:
            layout, _ = step

            def compute(inputs: Tensors, layout: Layout = layout) -> None:
                optimizer.zero_gradients()
                loss, hint = self.loss(layout, inputs)
                (loss + _SEMANTIC_WEIGHT * hint).backward()
                row = self.meter[0 if layout.reference is None else 1]
                row.add_(torch.stack([loss.detach(), hint.detach(), torch.ones_like(loss.detach())]))

            before = self.run.elapsed
            try:
                self._recorded[step] = Recorded(self.run, compute, self._blank(step))
            except Exception as error:  # a compiler's failure may be of any kind
                self.run.log(f"compiler failed, going on without: {error!r:.600}")
                torch.compiler.set_stance("force_eager")
                self._recorded[step] = Recorded(self.run, compute, self._blank(step))
            if self.run.elapsed - before > 3:
                self.run.log(f"{step}: {self.run.elapsed - before:.1f} s to record")
        optimizer.zero_gradients()
        self.meter.zero_()
        self.run.log(f"{len(self._recorded)} kinds of step recorded")

    def batch_size(self, step: Step) -> int:
        layout, length = step
        return 4 if self.run.smoke else _TOKENS_PER_STEP // (layout.num_tokens + length) // 8 * 8

    def _blank(self, step: Step) -> Tensors:
        """A batch of the right shapes."""
        (layout, length), B, device = step, self.batch_size(step), self.run.device
        own = layout.size[0] * layout.size[1]
        batch = {
            "x": torch.randn(B, TOKEN_CHANNELS, *layout.size, device=device),
            "ids": torch.full((B, length), END_ID, device=device),
            "lengths": torch.full((B,), 3, device=device),
            "classes": torch.full((B, own), NUM_CLASSES - 1, dtype=torch.uint8, device=device),
            "values": torch.zeros(B, own, NUM_VALUES, device=device),
        }
        if layout.reference is not None:
            batch["reference"] = torch.randn(B, TOKEN_CHANNELS, *layout.reference, device=device)
        return batch

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
            self._rings[layout] = Ring(64 if self.run.smoke else (24_576 if layout.size == (16, 16) else 8_192))
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
            for _ in range(1 if self.run.smoke else max(4, int(weight * 60))):
                self.produce(layout)
        self.run.log("rings filled")

    def draw(self) -> tuple[Step, Tensors]:
        """A random kind of step and a batch for it; ids are cut or padded to its length of text."""
        step = self._rng.choices(list(self.steps), list(self.steps.values()))[0]
        layout, length = step
        batch = self._rings[layout].draw(self.batch_size(step))
        batch["ids"], batch["lengths"] = _fit(batch["ids"].long(), batch["lengths"], length)
        return step, batch

    def velocity(self, noisy: torch.Tensor, time_B: torch.Tensor, text_BSD: torch.Tensor, layout: Layout,
                 reference: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Velocity of a grid (B, C, H, W), and the middle features."""
        return velocity(self.denoiser, noisy, time_B, text_BSD, layout, reference)

    def loss(self, layout: Layout, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow matching loss and the semantic hint's loss."""
        x = batch["x"]
        B, device = x.shape[0], x.device
        time = torch.sigmoid(torch.randn(B, device=device) + 0.5)
        time = torch.where(torch.rand(B, device=device) < 0.2, torch.rand(B, device=device), time).clamp(1e-3, 1.0)
        noise = torch.randn_like(x)
        t = time.view(-1, 1, 1, 1)
        with self.run.autocast():
            text = self.text(batch["ids"], batch["lengths"])
            v, middle = self.velocity((1 - t) * x + t * noise, time, text, layout, batch.get("reference"))
            hint = self.head.loss(middle, batch["classes"], batch["values"])
        # Weighted only where the noise leaves the place of things visible: earlier it would bias where they go.
        things = (batch["classes"] < NUM_CLASSES - 1).view(B, 1, *layout.size)
        weight = 1 + _THING_WEIGHT * (things & (t < 0.8))
        return (weight * (v - (noise - x)) ** 2).mean(), hint

    def train(self, optimizer: Muon, until: float, peak_rate: float, end_rate: float = 0.02) -> None:
        """Train until `run.elapsed` reaches `until`; ends on the averaged weights, kept in a file every minute."""
        run, save_as = self.run, "image_base"
        average = WeightAverage(self.modules().values())
        start, step, samples = run.elapsed, 0, 0
        shown = saved = (run.elapsed, 0)
        while True:
            progress = (run.elapsed - start) / max(1.0, until - start)
            if progress >= 1 or (run.smoke and step >= 8):
                break
            kind, batch = self.draw()
            if kind[0].reference is None:
                batch["ids"], batch["lengths"] = drop_text(batch["ids"], batch["lengths"], 0.05)
            if step % 6 == 0:
                self.produce(self._rng.choices(list(self.layouts), list(self.layouts.values()))[0])
            self._recorded[kind](batch)
            decay = 1 if progress < 0.5 else max(end_rate, 1 - (1 - end_rate) * (progress - 0.5) / 0.5)
            optimizer.step(peak_rate * min(1, (step + 1) / 200) * decay)
            if step % 4 == 0:
                average.update(0.996 if progress > 0.3 else 0.98)
            step, samples = step + 1, samples + batch["x"].shape[0]
            if step % 50 == 0 or run.smoke:
                self._wait()  # the clock should read what has been done, not what has been asked for
                if run.elapsed - shown[0] > 10 or step == 50 or run.smoke:
                    self._show(step, samples, (run.elapsed - shown[0]) / max(1, step - shown[1]))
                    shown = (run.elapsed, step)
                if run.elapsed - saved[0] > _SAVE_EVERY_S:
                    average.swap()
                    self.save(save_as, {"steps": step})
                    average.swap()
                    saved = (run.elapsed, step)
        average.swap()
        self._recorded.clear()
        self.save(save_as, {"steps": step})
        run.log(f"trained {step} steps, {samples} samples")

    def _wait(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _show(self, step: int, samples: int, seconds: float) -> None:
        prompt, edit = (self.meter[:, :2] / self.meter[:, 2:].clamp_min(1)).tolist()
        self.meter.zero_()
        self.run.log(f"step {step} samples {samples} prompt {prompt[0]:.4f} {prompt[1]:.4f} edit {edit[0]:.4f} "
                     f"{edit[1]:.4f} {1000 * seconds:.1f} ms")  # fmt: skip

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


def velocity(
    denoiser: Denoiser, noisy: torch.Tensor, time_B: torch.Tensor, text_BSD: torch.Tensor, layout: Layout,
    reference: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Velocity of a grid (B, C, H, W), and the middle features."""
    tokens = noisy.flatten(2).transpose(1, 2)
    if reference is not None:
        tokens = torch.cat([tokens, reference.flatten(2).transpose(1, 2)], 1)
    out, middle = denoiser(tokens.contiguous(), text_BSD, time_B, layout.size, layout.reference)
    return out.float().transpose(1, 2).reshape(noisy.shape), middle


def compile_blocks(denoiser: Denoiser, text: TextFeatures) -> None:
    """Compile the blocks, and the text's layers, each sort once for all sizes."""
    for block in (*denoiser.transformer.transformer_blocks, *denoiser.transformer.single_transformer_blocks):
        block.compile(dynamic=True)
    for layer in text.layers:
        layer.compile(dynamic=True)


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
