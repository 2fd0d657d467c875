"""Trains the video model's transformer and text encoder: from text alone and from a first frame, in mixed sizes.

B batch, S tokens; a layout is (height, width, frames) in 16-pixel tokens and latent frames; time 1 is noise.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from .feed import Feed, Ring, group
from .optimizer import Muon, WeightAverage
from .recorded import Recorded, Tensors
from .run import Run, load_weights, save_weights
from .semantics import NUM_CLASSES, NUM_VALUES, SemanticHead, semantic_targets
from .video_model import (
    ACTIVATION,
    CELL,
    FRAMES_PER_LATENT,
    LATENT_CHANNELS,
    TOKEN_PIXELS,
    WIDTH,
    LatentScale,
    VideoDenoiser,
    decode_latents,
    encode_moments,
    new_autoencoder,
    new_text_encoder,
    new_transformer,
    padding_bias,
    text_features,
    train_on_whole_clips,
)
from .video_render import frames_of, render_clips
from .video_tokenizer import END_ID

TEXT_COLUMNS = 48
SHIFT = 4.0
_GIVEN_SHARE = 0.45  # clips whose first frame is given
_TOKENS_PER_STEP = 110_000
_SEMANTIC_WEIGHT = 0.1
_REUSE = 6  # how often a drawn clip is trained on, about


@dataclass(frozen=True, slots=True)
class Layout:
    """The size of a clip in tokens and latent frames."""

    height: int
    width: int
    frames: int

    @property
    def num_tokens(self) -> int:
        return self.height * self.width * self.frames

    @property
    def num_frames(self) -> int:
        return 1 + (self.frames - 1) * FRAMES_PER_LATENT

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        cells = TOKEN_PIXELS // CELL
        return (LATENT_CHANNELS, self.frames, self.height * cells, self.width * cells)

    @property
    def batch(self) -> int:
        return _TOKENS_PER_STEP // (self.num_tokens + TEXT_COLUMNS) // 8 * 8


SQUARE, WIDE, SMALL = Layout(12, 12, 5), Layout(9, 16, 5), Layout(8, 8, 5)
# Few distinct numbers of tokens: each is compiled on its own.
EARLY: dict[Layout, float] = {SMALL: 0.5, SQUARE: 0.2, WIDE: 0.2, Layout(16, 9, 5): 0.05, Layout(9, 16, 9): 0.05}
LATE: dict[Layout, float] = {
    SMALL: 0.1, SQUARE: 0.27, WIDE: 0.31, Layout(16, 9, 5): 0.1, Layout(9, 16, 9): 0.14, Layout(12, 12, 9): 0.08,
}  # fmt: skip
_TINY: dict[Layout, float] = {Layout(3, 4, 2): 0.5, Layout(4, 3, 3): 0.5}


def shifted(u: torch.Tensor) -> torch.Tensor:
    """The scheduler's time of an even position u in [0, 1]."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


class VideoTrainer:
    """The model in training, the clips that feed it, and one step."""

    def __init__(self, run: Run, tokenizer: Path, seed: int, layouts: dict[Layout, float]) -> None:
        self.run, self._rng = run, Random(seed)
        self.layouts = _TINY if run.smoke else layouts
        self._produced = 8 if run.smoke else 64
        workers = {frames: 1 if run.smoke else (8 if frames == 5 else 4) for frames in {a.frames for a in self.layouts}}
        self._feeds = {
            frames: Feed(f"clip{1 + (frames - 1) * FRAMES_PER_LATENT}", num, self._produced, tokenizer, END_ID,
                         seed + frames)
            for frames, num in workers.items()
        }  # fmt: skip
        torch.manual_seed(seed)
        device = run.device
        self.vae, self.scale = new_autoencoder().to(device).eval().requires_grad_(False), LatentScale().to(device)
        train_on_whole_clips(self.vae)
        self.transformer, self.text_encoder = new_transformer().to(device), new_text_encoder().to(device)
        self.head = SemanticHead(WIDTH).to(device)
        self.denoiser = VideoDenoiser(self.transformer)
        self._rings: dict[Layout, Ring] = {}
        self._recorded: dict[Layout, Recorded] = {}
        self.meters: dict[Layout, torch.Tensor] = {}

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"transformer": self.transformer, "text_encoder": self.text_encoder, "head": self.head}

    def record(self, optimizer: Muon) -> None:
        """Compile the blocks and record the computation of gradients for every layout."""
        if self.run.device.type == "cuda":
            self.denoiser.compile()
        for layout in self.layouts:

            def compute(inputs: Tensors, layout: Layout = layout) -> None:
                optimizer.zero_gradients()
                loss, hint = self.loss(inputs)
                (loss + _SEMANTIC_WEIGHT * hint).backward()
                self.meters[layout].add_(torch.stack([loss.detach(), hint.detach(), torch.ones_like(loss.detach())]))

            self.meters[layout] = torch.zeros(3, device=self.run.device)
            self._recorded[layout] = self.recorded(compute, layout, self.blank(layout))
            self.meters[layout].zero_()
        optimizer.zero_gradients()

    def recorded(self, compute: Callable[[Tensors], None], layout: Layout, inputs: Tensors) -> Recorded:
        """A computation on batches of one layout, recorded; without a compiler if that fails."""
        before = self.run.elapsed
        try:
            recorded = Recorded(self.run, compute, inputs)
        except Exception as error:  # a compiler's failure may be of any kind
            self.run.log(f"compiler failed, going on without: {error!r:.600}")
            torch.compiler.set_stance("force_eager")
            recorded = Recorded(self.run, compute, inputs)
        self.run.log(f"{layout}: {self.run.elapsed - before:.1f} s to record")
        return recorded

    def batch_size(self, layout: Layout) -> int:
        return 4 if self.run.smoke else layout.batch

    def blank(self, layout: Layout) -> Tensors:
        """A batch of the right shapes."""
        B, device = self.batch_size(layout), self.run.device
        return {
            "x": torch.randn(B, *layout.latent_shape, device=device),
            "given": torch.rand(B, device=device) < _GIVEN_SHARE,
            "ids": torch.full((B, TEXT_COLUMNS), END_ID, device=device),
            "lengths": torch.full((B,), 3, device=device),
            "classes": torch.full((B, layout.num_tokens), NUM_CLASSES - 1, dtype=torch.uint8, device=device),
            "values": torch.zeros(B, layout.num_tokens, NUM_VALUES, device=device),
        }

    def text(self, ids: torch.Tensor, lengths: torch.Tensor, padded_to: int | None = None) -> tuple[torch.Tensor, ...]:
        """Text features and padding bias; without `padded_to`, for random lengths of padding up to the stock 512."""
        features = text_features(self.text_encoder, ids, lengths)
        if padded_to is None:
            spread = torch.rand(ids.shape[0], device=ids.device)
            total = TEXT_COLUMNS * (512 / TEXT_COLUMNS) ** spread
            total = torch.where(torch.rand_like(spread) < 0.3, 512.0, total)
        else:
            total = torch.full((ids.shape[0],), float(padded_to), device=ids.device)
        return features, padding_bias(lengths, ids.shape[1], total)

    @torch.no_grad()
    def produce(self, layout: Layout) -> None:
        """Draw fresh clips of one layout and put their latents in the ring."""
        batch = self._feeds[layout.frames].get(self.run.device)
        target = group(batch, "target.")
        with self.run.autocast():
            clips = render_clips(target, layout.height * TOKEN_PIXELS, layout.width * TOKEN_PIXELS)
            x = self.scale.normalise(encode_moments(self.vae, clips)[0])
        sampled = frames_of(target, slice(None, None, FRAMES_PER_LATENT))
        classes, values = semantic_targets(sampled, layout.height, layout.width)
        B = x.shape[0]
        if layout not in self._rings:
            self._rings[layout] = Ring(64 if self.run.smoke else (12_288 if layout.frames == 5 else 6_144))
        self._rings[layout].add(
            x=x, ids=batch["ids"].short(), lengths=batch["lengths"], short_ids=batch["short_ids"].short(),
            short_lengths=batch["short_lengths"], classes=classes.view(B, -1).to(torch.uint8),
            values=values.reshape(B, layout.num_tokens, -1),
        )  # fmt: skip

    def fill(self) -> None:
        for layout, weight in self.layouts.items():
            for _ in range(1 if self.run.smoke else max(8, int(weight * 140))):
                self.produce(layout)
        self.run.log("rings filled")

    def draw(self) -> tuple[Layout, dict[str, torch.Tensor]]:
        """A random layout and a batch for it: latents, `given` first frames, ids and lengths."""
        layout = self._rng.choices(list(self.layouts), list(self.layouts.values()))[0]
        batch = self._rings[layout].draw(self.batch_size(layout))
        B, device = batch["x"].shape[0], batch["x"].device
        batch["given"] = torch.rand(B, device=device) < _GIVEN_SHARE
        short = batch["given"] & (torch.rand(B, device=device) < 0.6)
        ids = torch.where(short[:, None], batch.pop("short_ids"), batch["ids"]).long()
        lengths = torch.where(short, batch.pop("short_lengths"), batch["lengths"])
        batch["ids"], batch["lengths"] = fit_text(ids, lengths)
        return layout, batch

    def noisy(self, x: torch.Tensor, noise: torch.Tensor, time: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Latents at a time, the given first frames clean."""
        t = time.view(-1, 1, 1, 1, 1)
        mixed = (1 - t) * x + t * noise
        keep = given.view(-1, 1, 1, 1, 1) & (torch.arange(x.shape[2], device=x.device) == 0).view(1, 1, -1, 1, 1)
        return torch.where(keep, x, mixed)

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow matching loss and the semantic hint's loss."""
        x, given = batch["x"], batch["given"]
        B, device = x.shape[0], x.device
        ids, lengths = drop_text(batch["ids"], batch["lengths"], 0.08)
        time = torch.sigmoid(torch.randn(B, device=device) * 1.1 + 0.8)
        time = torch.where(torch.rand(B, device=device) < 0.2, torch.rand(B, device=device), time).clamp(1e-3, 1.0)
        noise = torch.randn_like(x)
        with self.run.autocast():
            text, bias = self.text(ids, lengths)
            v, middle = self.denoiser(self.noisy(x, noise, time, given), time, given, text, bias)
            hint = self.head.loss(middle, batch["classes"], batch["values"])
        return frame_error(v, noise - x, given), hint

    def train(self, optimizer: Muon, until: float, peak_rate: float, name: str, *, settle: bool) -> None:
        """Train until `run.elapsed` reaches `until`, saving as `name`; ends on the averaged weights.

        With `settle` the rate falls to nothing over the second half, without it stays.
        """
        run, average = self.run, WeightAverage(self.modules().values())
        start, step, samples, debt = run.elapsed, 0, 0, 0.0
        shown = saved = (run.elapsed, 0)
        while True:
            progress = (run.elapsed - start) / max(1.0, until - start)
            if progress >= 1 or (run.smoke and step >= 3):
                break
            fall = max(0.02, (1 - progress) / 0.5) if settle and progress > 0.5 else 1.0
            layout, batch = self.draw()
            debt += batch["x"].shape[0] / _REUSE
            if debt >= self._produced:
                self.produce(layout)
                debt -= self._produced
            self._recorded[layout](batch)
            optimizer.step(peak_rate * min(1, (step + 1) / 150) * fall)
            average.update(0.9985 if progress > 0.5 else 0.995)
            step, samples = step + 1, samples + batch["x"].shape[0]
            if step % 25 == 0 or run.smoke:
                self.wait()
                if run.elapsed - shown[0] > 10 or step == 25 or run.smoke:
                    self._show(step, samples, (run.elapsed - shown[0]) / (step - shown[1]))
                    shown = (run.elapsed, step)
                if run.elapsed - saved[0] > 55:
                    average.swap()
                    self.save(name, {"steps": step})
                    average.swap()
                    saved = (run.elapsed, step)
        average.swap()
        self._recorded.clear()
        self.save(name, {"steps": step})
        run.log(f"trained {step} steps, {samples} samples")

    def wait(self) -> None:
        """Wait for the device: the clock should read what has been done, not what has been asked for."""
        if self.run.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _show(self, step: int, samples: int, seconds: float) -> None:
        losses = {}
        for layout, meter in self.meters.items():
            loss, hint, count = meter.tolist()
            if count:
                losses[layout.height, layout.width, layout.frames] = round(loss / count, 4), round(hint / count, 4)
            meter.zero_()
        self.run.log(f"step {step} samples {samples} {losses} {1000 * seconds:.1f} ms")

    def new_optimizer(self) -> Muon:
        """Muon on the blocks' matrices, Adam on embeddings, modulations and ends."""
        matrices, others = [], []
        seen: set[int] = set()
        for prefix, module in self.modules().items():
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                inner = parameter.ndim == 2 and prefix != "head" and ("blocks." in name or "block." in name)
                inner = inner and "relative_attention_bias" not in name
                (matrices if inner else others).append(parameter)
        return Muon(matrices, others, beta=0.95, weight_decay=0.01)

    def save(self, name: str, facts: dict[str, float | int | str]) -> None:
        save_weights(self.run.folder / f"{name}.safetensors", self.modules(), facts)

    def load(self, name: str) -> None:
        load_weights(self.run.folder / f"{name}.safetensors", self.modules())

    def load_autoencoder(self) -> None:
        if self.run.device.type == "cuda":
            ACTIVATION.compile()
        load_weights(self.run.folder / "video_vae.safetensors", {"vae": self.vae, "scale": self.scale})

    @torch.no_grad()
    def sample(self, ids: torch.Tensor, lengths: torch.Tensor, layout: Layout, *, steps: int, guidance: float,
               first: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:  # fmt: skip
        """Clips for token ids, drawn as the pipeline's scheduler draws them; `first` (B, 3, H, W) are first frames."""
        device, B = self.run.device, ids.shape[0]
        ids, lengths = fit_text(ids, lengths)
        x = torch.randn(B, *layout.latent_shape, generator=torch.Generator().manual_seed(seed)).to(device)
        given = torch.full((B,), first is not None, device=device)
        times = [*shifted(torch.linspace(1, 1 / steps, steps)).tolist(), 0.0]
        with self.run.autocast():
            start = x[:, :, :1]
            if first is not None:
                start = self.scale.normalise(encode_moments(self.vae, first[:, :, None])[0])
            text, empty = self.text(ids, lengths, 512), self.text(*drop_text(ids, lengths, 1.0), 512)
            for now, after in itertools.pairwise(times):
                time = torch.full((B,), now, device=device)
                if first is not None:
                    x = torch.cat([start, x[:, :, 1:]], 2)
                v, _ = self.denoiser(x, time, given, *text)
                if guidance != 1:
                    base, _ = self.denoiser(x, time, given, *empty)
                    v = base + guidance * (v - base)
                x = x + (after - now) * v
            if first is not None:
                x = torch.cat([start, x[:, :, 1:]], 2)
            return decode_latents(self.vae, self.scale.restore(x)).clamp(-1, 1)

    def close(self) -> None:
        for feed in self._feeds.values():
            feed.close()


def frame_error(v: torch.Tensor, target: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the frames that were not given."""
    error = (v - target).square().mean((1, 3, 4))
    weight = torch.ones_like(error)
    weight[:, 0] = (~given).float()
    return (error * weight).sum() / weight.sum()


def drop_text(ids: torch.Tensor, lengths: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace a share of the prompts by the empty one."""
    empty = torch.zeros_like(ids)
    empty[:, 0] = END_ID
    dropped = torch.rand(ids.shape[0], device=ids.device) < share
    return torch.where(dropped[:, None], empty, ids), torch.where(dropped, 1, lengths)


def fit_text(ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids cut to TEXT_COLUMNS, the end mark kept."""
    ids, lengths = ids[:, :TEXT_COLUMNS].clone(), lengths.clamp_max(TEXT_COLUMNS)
    ids[torch.arange(ids.shape[0], device=ids.device), lengths - 1] = END_ID
    return ids, lengths
