"""Where weights live: on the device always, or in host memory and on the device for their calls.

Knows tensors and copies; what is offloaded is the settings' affair (`placement.py`). A component's weights lie one
after the other in one piece of host memory, pinned where that can be had, so that bringing them in is one copy at the
bus's own speed, and taking them out is none but for what was changed on the device meanwhile (by merging a LoRA).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

_ALIGNMENT = 256  # bytes; what vectorised kernels want of a tensor's address


@dataclass(frozen=True, slots=True)
class _Piece:
    """One tensor of a component and its place in the flat memory."""

    tensor: torch.Tensor
    offset: int
    num_bytes: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return this tensor as a view of a flat copy."""
        piece = flat[self.offset : self.offset + self.num_bytes].view(self.dtype)
        return piece.as_strided(self.shape, self.stride, piece.storage_offset())


class HostWeights:
    """The tensors of some modules in host memory.

    While they are away, each tensor's data is its host copy (so that merging a LoRA changes what is brought in next)
    or, where host and device are one, nothing at all: whoever touches a parked weight is told so by its shape.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], device: torch.device, *, pin: bool) -> None:
        """Move the weights out. `pin` asks for pinned memory, which is given up with a warning when refused."""
        self._device = device
        self._pieces: list[_Piece] = []
        seen: set[int] = set()
        end = 0
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                if id(tensor) in seen or tensor.numel() == 0:
                    continue
                seen.add(id(tensor))
                data = tensor.data
                stride = data.stride() if _is_dense(data) else torch.empty(data.shape, device="meta").stride()
                num_bytes = data.numel() * data.element_size()
                self._pieces.append(_Piece(tensor, end, num_bytes, data.shape, stride, data.dtype))
                end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = end
        self._host = torch.empty(end, dtype=torch.uint8)
        for piece in self._pieces:
            piece.of(self._host).copy_(piece.tensor.data)
        self.is_pinned = pin and device.type == "cuda" and _pin(self._host)
        self.is_present = False
        self._changed: set[int] = set()  # ids of tensors whose copy on the device is newer than the host's
        self.leave()

    def copy_to(self, flat: torch.Tensor) -> None:
        """Copy the weights into device memory of at least `num_bytes`, on the current stream."""
        flat[: self.num_bytes].copy_(self._host, non_blocking=True)

    def arrive(self, flat: torch.Tensor) -> None:
        """Let every tensor be its copy in `flat`."""
        for piece in self._pieces:
            piece.tensor.data = piece.of(flat)
        self.is_present = True

    def leave(self) -> None:
        """Let every tensor be in host memory again; the device's copy is free once nothing uses it."""
        is_same = self._device.type == "cpu"
        for piece in self._pieces:
            if id(piece.tensor) in self._changed:
                piece.of(self._host).copy_(piece.tensor.data)
            piece.tensor.data = torch.empty(0, dtype=piece.dtype) if is_same else piece.of(self._host)
        self._changed.clear()
        self.is_present = False

    @contextmanager
    def changing(self, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
        """Let these be read and written inside, wherever they are; the change outlasts the next coming and going.

        What is on the device is changed there, and goes to host memory when it leaves.
        """
        if self.is_present:
            self._changed.update(map(id, parameters))
            yield
            return
        self.arrive(self._host)
        try:
            yield
        finally:
            self.leave()


class Visitor:
    """A component that is on the device for its calls only.

    One that `stays` waits there until a visitor that needs the room arrives: a denoiser is called many times in a
    row. The others leave after every call.
    """

    def __init__(self, name: str, module: torch.nn.Module, device: torch.device, *, pin: bool, stays: bool) -> None:
        self.name = name
        self.stays = stays
        self._device = device
        self.weights = HostWeights([module], device, pin=pin)
        self._depth = 0

    def enter(self) -> None:
        self._depth += 1
        if not self.weights.is_present:
            flat = torch.empty(self.weights.num_bytes, dtype=torch.uint8, device=self._device)
            self.weights.copy_to(flat)
            self.weights.arrive(flat)

    def exit(self) -> None:
        self._depth -= 1
        if self._depth == 0 and not self.stays:
            self.weights.leave()

    def changing(self, parameters: Iterable[torch.Tensor]) -> AbstractContextManager[None]:
        """Let these parameters of the component be changed inside; not to be entered during a call."""
        return self.weights.changing(parameters)

    def make_room(self) -> None:
        if self._depth == 0 and self.weights.is_present:
            self.weights.leave()


class Visitors:
    """All offloaded components of one worker; at most one that stays is on the device at a time."""

    def __init__(self) -> None:
        self.all: list[Visitor] = []

    def add(self, visitor: Visitor) -> None:
        self.all.append(visitor)

    @property
    def largest_bytes(self) -> int:
        """Return the device memory that must be left for them."""
        return max((visitor.weights.num_bytes for visitor in self.all), default=0)

    def calls_of(self, visitor: Visitor, real: Callable[..., Any]) -> Callable[..., Any]:
        """Return `real` with the visitor's weights brought in around it."""

        def present(*args: Any, **kwargs: Any) -> Any:
            for other in self.all:
                if other is not visitor:
                    other.make_room()
            visitor.enter()
            try:
                return real(*args, **kwargs)
            finally:
                visitor.exit()

        return present


class Layerwise:
    """A denoiser whose blocks pass through two slots on the device, the next one copied while this one computes."""

    def __init__(self, blocks: Sequence[torch.nn.Module], device: torch.device, *, pin: bool) -> None:
        self._weights = [HostWeights([block], device, pin=pin) for block in blocks]
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
    def changing(self, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
        """Let these parameters of the denoiser be changed inside; not to be entered during a call.

        What was fetched ahead is fetched again: it may be of before the change.
        """
        if self._copying is not None:
            self._copying.synchronize()
        self._held = [None, None]
        touched = list(parameters)
        with ExitStack() as stack:
            for weights in self._weights:
                stack.enter_context(weights.changing(touched))
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


def _is_dense(tensor: torch.Tensor) -> bool:
    """Say whether a tensor's elements fill its memory without gaps or overlaps, in whatever order (channels last)."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _pin(memory: torch.Tensor) -> bool:
    """Make host memory pinned where it lies: torch's own pinned allocator would round it up to a power of two."""
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(code) != 0:
        logger.warning("%.1f GB of host memory could not be pinned (code %d); copies will be slower",
                       memory.numel() / 1e9, int(code))  # fmt: skip
        return False
    return True
