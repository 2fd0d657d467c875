"""Carries weights between host memory and the device: up on one stream, down on another, a few at a time.

Knows tensors and streams; what is computed of them in between is `weights.py`'s affair.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch

# Tensors on their way at once. Enough to keep the bus busy in between; and as the CPU is far ahead of the bus, all
# weights would soon be on the device a second time if it were not made to wait.
_ON_THEIR_WAY = 3


class Ferry:
    """Brings tensors to the device and takes them to where they belong. On a CPU they are used where they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._up = torch.cuda.Stream(device) if on_gpu else None
        self._down = torch.cuda.Stream(device) if on_gpu else None
        self._leaving: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def bring(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Give each tensor on the device, ready for the current stream, while the next ones come.

        A tensor may be used by that stream, and handed to `take`, until the next one is asked for.
        """
        if self._up is None:
            yield from tensors
            return
        running = torch.cuda.current_stream(self._device)
        coming: deque[tuple[str, torch.Tensor, torch.cuda.Event]] = deque()
        # Held until nothing reads them: the allocator knows of the stream they came by alone.
        in_use: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

        def arrived() -> Iterator[tuple[str, torch.Tensor]]:
            name, tensor, copied = coming.popleft()
            running.wait_event(copied)
            yield name, tensor
            in_use.append((tensor, running.record_event()))

        try:
            for name, source in tensors:
                if len(in_use) >= _ON_THEIR_WAY:
                    in_use.popleft()[1].synchronize()
                with torch.cuda.stream(self._up):
                    coming.append((name, source.to(self._device, non_blocking=True), self._up.record_event()))
                if len(coming) >= _ON_THEIR_WAY:
                    yield from arrived()
            while coming:
                yield from arrived()
        finally:
            running.synchronize()

    def take(self, tensor: torch.Tensor, weight: torch.Tensor) -> None:
        """Copy a tensor of the current stream into a weight; into host memory meanwhile, until `finish`."""
        if self._down is None or weight.device == tensor.device:
            weight.copy_(tensor)
            return
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            weight.copy_(tensor, non_blocking=True)
            self._leaving.append((tensor, self._down.record_event()))
        if len(self._leaving) > _ON_THEIR_WAY:
            self._leaving.popleft()[1].synchronize()

    def finish(self) -> None:
        """Wait until all that was to be taken is where it belongs."""
        if self._down is not None:
            self._down.synchronize()
            self._leaving.clear()
