"""Where weights live: on the device always, or in host memory and on the device for their calls.

Knows tensors and copies; what is offloaded is the settings' affair (`placement.py`). A component's weights lie one
after the other in one piece of host memory, pinned where that can be had, so that bringing them in is one copy at the
bus's own speed, and taking them out is none: what is changed on the device is changed in the copy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .host_memory import HostMemory, Place, lay_out


class HostWeights:
    """The tensors of some modules in host memory.

    While they are away, each tensor's data is its host copy or, where host and device are one, nothing at all:
    whoever touches a parked weight is told so by its shape.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], device: torch.device, *, pin: bool) -> None:
        """Move the weights out. `pin` asks for pinned memory, which is given up with a warning when refused."""
        self._device = device
        found = (tensor for module in modules for tensor in _tensors_of(module))
        tensors = list({id(tensor): tensor for tensor in found if tensor.numel()}.values())
        places, self.num_bytes = lay_out(tensor.data for tensor in tensors)
        self._places: dict[torch.Tensor, Place] = dict(zip(tensors, places, strict=True))  # by identity
        memory = HostMemory(self.num_bytes)
        self._host = memory.flat
        for tensor, place in self._places.items():
            place.of(self._host).copy_(tensor.data)
            tensor.data = place.of(self._host)  # what it was is given back before the next is copied
        self.is_pinned = pin and device.type == "cuda" and memory.pin()
        self.is_present = False
        self.leave()

    def copy_to(self, flat: torch.Tensor) -> None:
        """Copy the weights into device memory of at least `num_bytes`, on the current stream."""
        flat[: self.num_bytes].copy_(self._host, non_blocking=True)

    def arrive(self, flat: torch.Tensor) -> None:
        """Let every tensor be its copy in `flat`."""
        for tensor, place in self._places.items():
            tensor.data = place.of(flat)
        self.is_present = True

    def leave(self) -> None:
        """Let every tensor be in host memory again; the device's copy is free once nothing uses it."""
        is_same = self._device.type == "cpu"
        for tensor, place in self._places.items():
            tensor.data = torch.empty(0, dtype=place.dtype) if is_same else place.of(self._host)
        self.is_present = False

    def in_host_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the host's copy of one of the tensors, wherever that is now."""
        return self._places[tensor].of(self._host)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let the weights, which must be away, be read and written inside where they wait."""
        self.arrive(self._host)
        try:
            yield
        finally:
            self.leave()


class Visitor:
    """A component that is on the device for its calls only.

    One that `stays` waits there until a visitor that needs the room arrives: a denoiser is called at every step. The
    others leave once any other component is called: a prompt and its negative prompt are encoded one after the other,
    and so are the pictures of several jobs decoded. `on_arrival` is run when the weights have come as they wait in
    host memory, and may change them where they are then; what it raises sends them back.
    """

    def __init__(
        self, visitors: Visitors, name: str, module: torch.nn.Module, device: torch.device, *, pin: bool, stays: bool
    ) -> None:
        self.name = name
        self.stays = stays
        self.weights = HostWeights([module], device, pin=pin)
        self.on_arrival: Callable[[], None] | None = None
        self._visitors = visitors
        self._device = device
        self._depth = 0

    @property
    def is_present(self) -> bool:
        return self.weights.is_present

    @contextmanager
    def present(self) -> Iterator[None]:
        """Have the component on the device inside, and others gone that are not in use."""
        self._visitors.make_room_for(self)
        if not self.is_present:
            self._arrive()
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth -= 1
            if not self.stays:
                self.leave()  # what failed for want of memory leaves none taken
            raise
        self._depth -= 1

    def base(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return what a parameter is before `on_arrival` changed it, in host memory."""
        return self.weights.in_host_memory(parameter)

    def leave(self) -> None:
        """Go, and let go of what was changed on the device; not while in use."""
        if self._depth == 0 and self.is_present:
            self.weights.leave()

    def _arrive(self) -> None:
        flat = torch.empty(self.weights.num_bytes, dtype=torch.uint8, device=self._device)
        self.weights.copy_to(flat)
        self.weights.arrive(flat)
        if self.on_arrival is not None:
            try:
                self.on_arrival()
            except BaseException:
                self.weights.leave()
                raise


class Visitors:
    """All offloaded components of one worker; at most one that stays is on the device at a time."""

    def __init__(self) -> None:
        self.all: list[Visitor] = []

    def add(self, name: str, module: torch.nn.Module, device: torch.device, *, pin: bool, stays: bool) -> Visitor:
        """Move a component out and let it come for its calls."""
        visitor = Visitor(self, name, module, device, pin=pin, stays=stays)
        self.all.append(visitor)
        return visitor

    @property
    def largest_bytes(self) -> int:
        """Return the device memory that must be left for them."""
        return max((visitor.weights.num_bytes for visitor in self.all), default=0)

    def make_room_for(self, visitor: Visitor) -> None:
        for other in self.all:
            if other is not visitor:
                other.leave()

    def make_way_for(self, name: str) -> None:
        """A component is about to be called: those leave that have come for calls of their own."""
        for visitor in self.all:
            if visitor.name != name and not visitor.stays:
                visitor.leave()

    def calls_of(self, visitor: Visitor, real: Callable[..., Any]) -> Callable[..., Any]:
        """Return `real` with the visitor's weights brought in around it."""

        def present(*args: Any, **kwargs: Any) -> Any:
            with visitor.present():
                return real(*args, **kwargs)

        return present


class Layerwise:
    """A network whose blocks pass through two slots on the device, the next one copied while this one computes.

    What is outside the blocks is on the device for good.
    """

    def __init__(
        self, network: torch.nn.Module, blocks: Sequence[torch.nn.Module], device: torch.device, *, pin: bool
    ) -> None:
        self._weights = [HostWeights([block], device, pin=pin) for block in blocks]
        # Not `network.to(device)`: for a while it would need the room of all blocks.
        inside = {id(tensor) for block in blocks for tensor in _tensors_of(block)}
        for tensor in _tensors_of(network):
            if id(tensor) not in inside:
                tensor.data = tensor.data.to(device)
        self._device = device
        self.slot_bytes = max(weights.num_bytes for weights in self._weights)
        self._slots = [torch.empty(self.slot_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        on_gpu = device.type == "cuda"
        self._copying = torch.cuda.Stream(device) if on_gpu else None
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._used: list[torch.cuda.Event | None] = [None, None]
        self._held: list[int | None] = [None, None]  # which block each slot has, or is being given
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._before(index))
            block.register_forward_hook(self._after(index), always_call=True)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let the network's weights be changed inside, the blocks' in host memory; not to be entered during a call.

        What was fetched ahead is fetched again: it may be of before the change.
        """
        if self._copying is not None:
            self._copying.synchronize()
        self._held = [None, None]
        with ExitStack() as stack:
            for weights in self._weights:
                stack.enter_context(weights.changing())
            yield

    @property
    def is_pinned(self) -> bool:
        return all(weights.is_pinned for weights in self._weights)

    def _before(self, index: int) -> Callable[..., None]:
        def before(*_: Any) -> None:
            self._fetch(index)
            slot = index % 2
            if (copied := self._copied[slot]) is not None:
                torch.cuda.current_stream(self._device).wait_event(copied)
            self._weights[index].arrive(self._slots[slot])
            following = (index + 1) % len(self._weights)
            if following % 2 != slot:
                self._fetch(following)

        return before

    def _after(self, index: int) -> Callable[..., None]:
        def after(*_: Any) -> None:
            self._weights[index].leave()
            if self._copying is not None:
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self._device))
                self._used[index % 2] = event

        return after

    def _fetch(self, index: int) -> None:
        """Begin to copy a block into its slot, once what used the slot before is done."""
        slot = index % 2
        if self._held[slot] == index:
            return
        self._held[slot] = index
        if self._copying is None:
            self._weights[index].copy_to(self._slots[slot])
            return
        with torch.cuda.stream(self._copying):
            if (used := self._used[slot]) is not None:
                self._copying.wait_event(used)
            self._weights[index].copy_to(self._slots[slot])
            event = torch.cuda.Event()
            event.record(self._copying)
            self._copied[slot] = event


def _tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
