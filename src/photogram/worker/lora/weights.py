"""The weights of one module as they are now, and how they change: merged in place, restored bit for bit.

Merged is always computed from the kept base, in fp32 and in the set's order, and rounded once: the same set gives the
same bits whatever was merged before. Base values are copied before they are first touched, on a GPU into pinned
memory of the host, where they stay: the base never changes, so a copy is good for every later switch.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from ...core.errors import RequestError
from .changes import Change
from .sets import BASE, ModuleLoras

logger = logging.getLogger(__name__)

_PREFETCHED = 3  # base tensors on their way to the GPU at once
# Bytes a second that a switch is guessed to move before one was timed.
_GUESSED_RATE = {"cuda": 20e9, "cpu": 2e9}


class Home(Protocol):
    """Who holds weights that come to the device and go."""

    def changing(self, parameters: Iterable[torch.Tensor]) -> AbstractContextManager[None]:
        """Let these be read and written inside so that it lasts, wherever they are."""


class ModuleWeights:
    """Owns the parameters of one module as far as LoRAs change them. `device` is where the arithmetic is done; the
    parameters may lie elsewhere, with a `home` if they come and go. `share` is told the names of those that have
    changed, where other ranks hold the module too; it must leave them with the same values or raise DeviceLost."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        device: torch.device,
        share: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self.name = name
        self.merged: ModuleLoras = BASE
        self.home: Home | None = None
        self._module = module
        self._device = device
        self._share = share
        self._kept: dict[str, torch.Tensor] = {}
        self._rate = _GUESSED_RATE.get(device.type, 2e9)
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def switch_s(self, wanted: ModuleLoras) -> float:
        """Return how long a switch should take."""
        return self._bytes(self.merged.changes.keys() | wanted.changes.keys()) / self._rate

    def switch(self, wanted: ModuleLoras) -> None:
        """Make the weights the base with `wanted` merged.

        Raises RequestError for changes that take a weight out of its precision's range, and what the device raises;
        the weights are then what they were.
        """
        if wanted.key == self.merged.key:
            return
        before, touched = self.merged, self.merged.changes.keys() | wanted.changes.keys()
        started = self._now()
        is_first = not self._kept.keys() >= touched
        with self._changing(touched):
            moved_bytes = self._bytes(touched)
            self._keep(wanted.changes.keys())
            try:
                self._write(touched, wanted)
            except Exception:
                self._put_back(touched, before)
                raise
        self.merged = wanted
        if self._share is not None:
            self._share(sorted(touched))
        seconds = self._now() - started
        if touched and not is_first and seconds > 0:
            self._rate = moved_bytes / seconds
        if self._device.type == "cpu":
            # Copying again is as fast as restoring, and a laptop's memory is short.
            self._kept = {name: base for name, base in self._kept.items() if name in wanted.changes}
        logger.info("%s: %d parameters switched in %.3f s", self.name, len(touched), seconds)

    def _changing(self, names: Iterable[str]) -> AbstractContextManager[None]:
        if self.home is None:
            return nullcontext()
        return self.home.changing([self._module.get_parameter(name) for name in names])

    def _keep(self, names: Iterable[str]) -> None:
        """Copy the base values of parameters that were never touched."""
        missing = [name for name in names if name not in self._kept]
        copies = {name: _copy_on_host(self._module.get_parameter(name), self._copy_stream) for name in missing}
        if self._copy_stream is not None and copies:
            torch.cuda.synchronize(self._device)
        self._kept |= copies

    def _write(self, names: Iterable[str], wanted: ModuleLoras) -> None:
        out_of_range = torch.zeros((), device=self._device)
        for name, base in self._bases(sorted(names)):
            weight = self._module.get_parameter(name).data
            changes = wanted.changes.get(name)
            if changes is None:
                weight.copy_(base, non_blocking=True)
                continue
            merged = _merged(base, changes)
            # A sum of finite numbers times zero is zero: one flag for all, read once at the end.
            out_of_range += merged.sum(dtype=torch.float32) * 0
            weight.copy_(merged, non_blocking=True)
        if out_of_range.isnan():
            raise RequestError(
                "the LoRAs at these strengths give weights that are no numbers in this model's precision.",
                param="strength",
                code="invalid_lora",
            )

    def _bases(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Give the base values on the device of the arithmetic; on a GPU the next ones are copied meanwhile."""
        if self._copy_stream is None:
            yield from ((name, self._kept[name]) for name in names)
            return
        running = torch.cuda.current_stream(self._device)
        on_their_way: deque[tuple[str, torch.Tensor, torch.cuda.Event]] = deque()
        for name in [*names, *[None] * _PREFETCHED]:
            if name is not None:
                with torch.cuda.stream(self._copy_stream):
                    base = self._kept[name].to(self._device, non_blocking=True)
                    on_their_way.append((name, base, self._copy_stream.record_event()))
            if len(on_their_way) > _PREFETCHED or (name is None and on_their_way):
                arrived, base, copied = on_their_way.popleft()
                running.wait_event(copied)
                base.record_stream(running)
                yield arrived, base

    def _put_back(self, touched: Iterable[str], before: ModuleLoras) -> None:
        """After a failure: the base first, which needs no memory, then what was merged before.

        Other ranks have not heard of the attempt; they do where what was merged before cannot come back.
        """
        for name in touched:
            if name in self._kept:
                self._module.get_parameter(name).data.copy_(self._kept[name])
        self.merged = BASE
        if before is BASE:
            return
        try:
            self._write(before.changes.keys(), before)
            self.merged = before
        except Exception:
            # Every call asks for the weights it needs, so the base is a safe place to be.
            for name in before.changes:
                self._module.get_parameter(name).data.copy_(self._kept[name])
            if self._share is not None:
                self._share(sorted(before.changes))
            logger.exception("%s: what was merged before could not be merged again; the base is in place", self.name)

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(parameter.nbytes for parameter in map(self._module.get_parameter, names))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _merged(base: torch.Tensor, changes: Iterable[tuple[Change, float]]) -> torch.Tensor:
    """Return base and changes in the base's precision."""
    total = base.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for change, strength in changes:
        change.add_to(total, strength)
    return total.to(base.dtype)


def _copy_on_host(parameter: torch.Tensor, stream: torch.cuda.Stream | None) -> torch.Tensor:
    if stream is None:
        return parameter.detach().clone()
    try:
        kept = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=True)
    except RuntimeError:
        logger.warning("no more memory can be pinned: switching LoRAs will be slower")
        kept = torch.empty(parameter.shape, dtype=parameter.dtype)
    return kept.copy_(parameter.detach(), non_blocking=True)
