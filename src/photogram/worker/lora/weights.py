"""The weights of one module as they are now, and how they change: merged in place, restored bit for bit.

Merged is always computed from the base, in fp32 and in the set's order, and rounded once: the same set gives the same
bits whatever was merged before. Where the base comes from depends on where the weights live:

- On the device, or layer by layer from host memory: base values are copied before they are first touched, on a GPU into
  pinned memory of the host, where they stay; the base never changes, so a copy is good for every later switch.
- Coming and going whole: what waits in host memory is the base and stays so. They are merged on the device, as they
  arrive or while they are there, and going forgets what was merged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from ...core.errors import RequestError
from ..host_memory import HostMemory, lay_out
from .changes import Change
from .ferry import Ferry
from .sets import BASE, ModuleLoras

logger = logging.getLogger(__name__)

# Bytes a second that a switch is guessed to move before one was timed.
_GUESSED_RATE = {"cuda": 20e9, "cpu": 2e9}


class Home(Protocol):
    """Who holds weights that are in host memory between calls, and used as they are there."""

    def changing(self) -> AbstractContextManager[None]:
        """Let them be read and written inside, so that it lasts."""


class Visitor(Protocol):
    """Who brings a module's weights to the device from host memory, where they stay as they are, and lets them go."""

    on_arrival: Callable[[], None] | None

    @property
    def is_present(self) -> bool: ...

    def present(self) -> AbstractContextManager[None]:
        """Have them on the device inside; `on_arrival` is run where they have just come."""

    def base(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return what waits of a parameter in host memory."""

    def leave(self) -> None:
        """Let go of what is on the device."""


class ModuleWeights:
    """Owns the parameters of one module as far as LoRAs change them. `device` is where the arithmetic is done; the
    parameters may lie elsewhere. `share` is told the names of those that have changed, where other ranks hold the
    module too; it must leave them with the same values or raise DeviceLost."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        device: torch.device,
        share: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self.name = name
        self.merged: ModuleLoras = BASE
        self.num_switches = 0
        self._module = module
        self._device = device
        self._share = share
        # Read now: what is away may have no elements.
        self._sizes = {name: parameter.nbytes for name, parameter in module.named_parameters(remove_duplicate=False)}
        self._home: Home | None = None
        self._visitor: Visitor | None = None
        self._kept: dict[str, torch.Tensor] = {}
        self._rate = _GUESSED_RATE.get(device.type, 2e9)
        self._ferry = Ferry(device)

    def wait_in(self, home: Home) -> None:
        """Let the weights, the base as yet, be changed in host memory from now on."""
        assert self.merged.key == BASE.key
        self._home = home

    def come_and_go(self, visitor: Visitor) -> None:
        """Let the weights, the base as yet, be changed on the device only from now on: always when they arrive."""
        assert self.merged.key == BASE.key
        assert self._share is None, "ranks that share a module have it on their devices for good"
        self._visitor = visitor
        visitor.on_arrival = self._merge_as_they_arrive

    def changing(self) -> AbstractContextManager[None]:
        """Have the parameters where they can be read, with what is merged, whatever their way of coming and going."""
        if self._visitor is not None:
            return self._visitor.present()
        return nullcontext() if self._home is None else self._home.changing()

    def switch_s(self, wanted: ModuleLoras) -> float:
        """Return how long a switch should take, besides bringing in weights that are away."""
        return self._bytes(self.merged.changes.keys() | wanted.changes.keys()) / self._rate

    def switch(self, wanted: ModuleLoras) -> None:
        """Make the weights the base with `wanted` merged.

        Raises RequestError for changes that take a weight out of its precision's range, and what the device raises;
        the weights are then what they were.
        """
        if wanted.key == self.merged.key:
            return
        touched = sorted(self.merged.changes.keys() | wanted.changes.keys())
        started = self._now()
        if self._visitor is not None:
            says_rate = self._visitor.is_present
            self._switch_on_visit(self._visitor, touched, wanted)
        else:
            says_rate = self._kept.keys() >= set(touched)
            self._switch_in_place(touched, wanted)
        self.num_switches += 1
        if self._share is not None:
            self._share(touched)
        seconds = self._now() - started
        if touched and says_rate and seconds > 0:
            self._rate = self._bytes(touched) / seconds
        logger.info("%s: %d parameters switched in %.3f s", self.name, len(touched), seconds)

    # --- where the base is kept here

    def _switch_in_place(self, touched: Sequence[str], wanted: ModuleLoras) -> None:
        before = self.merged
        with self.changing():
            self._keep(wanted.changes.keys())
            try:
                self._write(self._ferry.bring((name, self._kept[name]) for name in touched), wanted)
            except Exception:
                self._put_back(touched, before)
                raise
        self.merged = wanted
        if self._device.type == "cpu":
            # Copying again is as fast as restoring, and a laptop's memory is short.
            self._kept = {name: base for name, base in self._kept.items() if name in wanted.changes}

    def _keep(self, names: Iterable[str]) -> None:
        """Copy the base values of parameters that were never touched."""
        missing = {name: self._module.get_parameter(name).detach() for name in names if name not in self._kept}
        if self._device.type != "cuda":
            self._kept |= {name: parameter.clone() for name, parameter in missing.items()}
            return
        if not missing:
            return
        places, num_bytes = lay_out(missing.values())
        memory = HostMemory(num_bytes)
        memory.pin(touch=True)
        copies = [place.of(memory.flat) for place in places]
        for copy, parameter in zip(copies, missing.values(), strict=True):
            copy.copy_(parameter, non_blocking=True)
        torch.cuda.synchronize(self._device)
        self._kept |= dict(zip(missing, copies, strict=True))

    def _put_back(self, touched: Iterable[str], before: ModuleLoras) -> None:
        """After a failure: the base first, which needs no memory, then what was merged before.

        Other ranks have not heard of the attempt; they do where what was merged before cannot come back.
        """
        for name in touched:
            self._module.get_parameter(name).data.copy_(self._kept[name])
        self.merged = BASE
        if before is BASE:
            return
        try:
            names = sorted(before.changes)
            self._write(self._ferry.bring((name, self._kept[name]) for name in names), before)
            self.merged = before
        except Exception:
            # Every call asks for the weights it needs, so the base is a safe place to be.
            for name in before.changes:
                self._module.get_parameter(name).data.copy_(self._kept[name])
            if self._share is not None:
                self._share(sorted(before.changes))
            logger.exception("%s: what was merged before could not be merged again; the base is in place", self.name)

    # --- where the base is what waits in host memory

    def _switch_on_visit(self, visitor: Visitor, touched: Sequence[str], wanted: ModuleLoras) -> None:
        before, self.merged = self.merged, wanted
        try:
            if visitor.is_present:
                with visitor.present():
                    bases = ((name, visitor.base(self._module.get_parameter(name))) for name in touched)
                    self._write(self._ferry.bring(bases), wanted)
            elif wanted.changes:
                # They are needed next anyway; merged as they arrive, they show whether they can be.
                with visitor.present():
                    pass
        except Exception:
            self.merged = before
            visitor.leave()  # and come as they were before
            raise

    def _merge_as_they_arrive(self) -> None:
        names = sorted(self.merged.changes)
        if names:
            self._write(((name, self._module.get_parameter(name).data) for name in names), self.merged)

    # --- the arithmetic

    def _write(self, bases: Iterable[tuple[str, torch.Tensor]], wanted: ModuleLoras) -> None:
        """Make the named parameters what they are with `wanted`, of their base values on the device."""
        out_of_range = torch.zeros((), device=self._device)
        try:
            for name, base in bases:
                weight = self._module.get_parameter(name).data
                changes = wanted.changes.get(name)
                if changes is None:
                    self._ferry.take(base, weight)
                    continue
                merged = _merged(base, changes)
                # A sum of finite numbers times zero is zero: one flag for all, read once at the end.
                out_of_range += merged.sum(dtype=torch.float32) * 0
                self._ferry.take(merged, weight)
        finally:
            self._ferry.finish()
        if out_of_range.isnan():
            raise RequestError(
                "the LoRAs at these strengths give weights that are no numbers in this model's precision.",
                param="strength",
                code="invalid_lora",
            )

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(self._sizes[name] for name in names)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _merged(base: torch.Tensor, changes: Iterable[tuple[Change, float]]) -> torch.Tensor:
    """Return base and changes in the base's precision, with its elements in the base's order."""
    total = base.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for change, strength in changes:
        change.add_to(total, strength)
    return torch.empty_like(base).copy_(total)
