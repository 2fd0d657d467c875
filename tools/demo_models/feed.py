"""Worker processes that invent scenes and captions, and the ring buffers that keep their latents on the GPU."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from random import Random

import numpy as np
import torch

Batch = dict[str, np.ndarray]
MAX_TOKENS = 64  # the longest captions have some sixty


def _encode(tokenizer_file: str, end_id: int) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Padded ids (B, MAX_TOKENS) and lengths (B,), end mark included."""
        ids = np.zeros((len(texts), MAX_TOKENS), np.int64)
        lengths = np.zeros(len(texts), np.int64)
        for i, one in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False)):
            row = [*one.ids[: MAX_TOKENS - 1], end_id]
            ids[i, : len(row)], lengths[i] = row, len(row)
        return ids, lengths

    return encode


def _prefixed(prefix: str, arrays: Batch) -> Batch:
    return {prefix + key: value for key, value in arrays.items()}


def make_batch(
    kind: str, rng: Random, size: int, encode: Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
) -> Batch:
    """Packed scenes and token ids of `size` prompts, edits or clips ("clip17": of 17 frames).

    Raises ValueError for another kind.
    """
    if kind == "prompt":
        from .render import pack
        from .scenes import trainable_prompt

        pairs = [trainable_prompt(rng) for _ in range(size)]
        ids, lengths = encode([text for _, text in pairs])
        return {**_prefixed("target.", pack([scene for scene, _ in pairs])), "ids": ids, "lengths": lengths}
    if kind == "edit":
        from .edits import random_edit
        from .render import pack

        edits = [random_edit(rng) for _ in range(size)]
        ids, lengths = encode([edit.text for edit in edits])
        return {
            **_prefixed("target.", pack([edit.target for edit in edits])),
            **_prefixed("source.", pack([edit.source for edit in edits])),
            "ids": ids, "lengths": lengths,
        }  # fmt: skip
    if kind.startswith("clip"):
        from .video_render import pack_clips
        from .video_scenes import trainable_clip

        samples = [trainable_clip(rng) for _ in range(size)]
        ids, lengths = encode([caption for _, caption, _ in samples])
        short_ids, short_lengths = encode([short for _, _, short in samples])
        return {
            **_prefixed("target.", pack_clips([clip for clip, _, _ in samples], int(kind.removeprefix("clip")))),
            "ids": ids, "lengths": lengths, "short_ids": short_ids, "short_lengths": short_lengths,
        }  # fmt: skip
    raise ValueError(f"kind {kind!r}: must be prompt, edit, or clip and a number of frames.")


def _work(kind: str, seed: int, size: int, tokenizer_file: str, end_id: int, queue: "Queue[Batch]") -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    encode, rng = _encode(tokenizer_file, end_id), Random(seed)
    while True:
        queue.put(make_batch(kind, rng, size, encode))


class Feed:
    """Batches of one kind from worker processes. Start it before CUDA: the workers are forks."""

    def __init__(self, kind: str, num_workers: int, size: int, tokenizer: Path, end_id: int, seed: int) -> None:
        context = multiprocessing.get_context("fork")
        self._queue: Queue[Batch] = context.Queue(24)
        file = str(tokenizer / "tokenizer.json")
        self._workers = [
            context.Process(
                target=_work, args=(kind, seed * 1000 + i, size, file, end_id, self._queue), daemon=True
            )
            for i in range(num_workers)
        ]  # fmt: skip
        for worker in self._workers:
            worker.start()

    def get(self, device: torch.device) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(v).to(device, non_blocking=True) for key, v in self._queue.get().items()}

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()


def group(batch: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The part of a batch under one prefix, the prefix dropped."""
    return {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}


class Ring:
    """The last `capacity` samples on the device: floats kept in half precision, drawn at random."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._data: dict[str, torch.Tensor] = {}
        self._next = 0
        self.count = 0

    def add(self, **samples: torch.Tensor) -> None:
        size = next(iter(samples.values())).shape[0]
        device = next(iter(samples.values())).device
        if not self._data:
            for key, value in samples.items():
                dtype = torch.float16 if value.is_floating_point() else value.dtype
                self._data[key] = torch.zeros(self._capacity, *value.shape[1:], dtype=dtype, device=device)
        where = (torch.arange(size, device=device) + self._next) % self._capacity
        for key, value in samples.items():
            self._data[key][where] = value.to(self._data[key].dtype)
        self._next = (self._next + size) % self._capacity
        self.count = min(self._capacity, self.count + size)

    def draw(self, size: int) -> dict[str, torch.Tensor]:
        device = next(iter(self._data.values())).device
        index = torch.randint(0, self.count, (size,), device=device)
        return {k: v[index].float() if v.is_floating_point() else v[index] for k, v in self._data.items()}
