"""A call's arguments on their way to the other ranks: an outline as msgpack, and the tensors by broadcast.

Nothing is pickled. What is neither a tensor nor plain data cannot be sent and fails the call on the leader alone,
before any other rank has heard of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec
import torch
import torch.distributed as dist

from .mesh import Mesh


class TensorOutline(msgspec.Struct, frozen=True, tag="tensor"):
    dtype: str
    shape: tuple[int, ...]
    on_device: bool


class Plain(msgspec.Struct, frozen=True, tag="plain"):
    value: bool | int | float | str | None


class DType(msgspec.Struct, frozen=True, tag="dtype"):
    name: str


class Items(msgspec.Struct, frozen=True, tag="items"):
    kind: Literal["list", "tuple"]
    items: tuple[Outline, ...]


class Fields(msgspec.Struct, frozen=True, tag="fields"):
    fields: dict[str, Outline]


Outline = TensorOutline | Plain | DType | Items | Fields


def outline(value: Any, tensors: list[torch.Tensor]) -> Outline:
    """Describe a value and append its tensors to `tensors` in the order of the description. Raises TypeError."""
    match value:
        case torch.Tensor():
            tensors.append(value)
            return TensorOutline(_name(value.dtype), tuple(value.shape), value.device.type != "cpu")
        case None | bool() | int() | float() | str():
            return Plain(value)
        case torch.dtype():
            return DType(_name(value))
        case list() | tuple():
            kind: Literal["list", "tuple"] = "list" if isinstance(value, list) else "tuple"
            return Items(kind, tuple(outline(item, tensors) for item in value))
        case dict():
            return Fields({str(key): outline(item, tensors) for key, item in value.items()})
    raise TypeError(f"{type(value).__name__} cannot be sent to the other devices")


Arrive = Callable[[torch.Tensor], object]
"""Fills a tensor of bytes with the next one that is sent."""


def send(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Broadcast an outline's tensors from the leader."""
    for tensor in tensors:
        dist.broadcast(_carried(tensor.contiguous()), src=0, group=group)


def send_to_leader(tensors: list[torch.Tensor], mesh: Mesh) -> None:
    """Send a result's tensors to the leader alone."""
    for tensor in tensors:
        dist.send(_carried(tensor.contiguous()), dst=0, group=mesh.to_group[mesh.cfg_index])


def receive(described: Outline, mesh: Mesh) -> Any:
    """Return the value that the leader described, its tensors received in order."""
    group = mesh.to_group[mesh.cfg_index]
    return _receive(described, mesh.device, lambda tensor: dist.broadcast(tensor, src=0, group=group))


def receive_from(described: Outline, cfg_index: int, mesh: Mesh) -> Any:
    """Return a result that the first rank of another CFG group has sent to the leader."""
    group, sender = mesh.to_group[cfg_index], cfg_index * mesh.size
    return _receive(described, mesh.device, lambda tensor: dist.recv(tensor, src=sender, group=group))


def _receive(described: Outline, own_device: torch.device, arrive: Arrive) -> Any:
    match described:
        case TensorOutline(dtype=dtype, shape=shape, on_device=on_device):
            device = own_device if on_device else torch.device("cpu")
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            arrive(_carried(tensor))
            return tensor
        case Plain(value=value):
            return value
        case DType(name=name):
            return getattr(torch, name)
        case Items(kind=kind, items=items):
            values = [_receive(item, own_device, arrive) for item in items]
            return values if kind == "list" else tuple(values)
        case Fields(fields=fields):
            return {key: _receive(item, own_device, arrive) for key, item in fields.items()}


def receive_into(tensor: torch.Tensor, mesh: Mesh) -> None:
    """Take over the values of a tensor of the same type and shape that the leader sends, whatever its layout here."""
    arriving = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    dist.broadcast(_carried(arriving), src=0, group=mesh.world)
    tensor.copy_(arriving)


def _carried(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory in a type that every transport knows (booleans and fp8 are not among gloo's)."""
    flat = tensor.view(-1)
    if not flat.numel():
        return flat.to(torch.uint8)
    if flat.stride(0) != 1:  # one value, expanded: contiguous, and yet no view of its bytes
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
