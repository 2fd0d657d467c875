"""A call's arguments on their way to the other ranks: an outline as msgpack, and the tensors by broadcast.

Nothing is pickled. What is neither a tensor nor plain data cannot be sent and fails the call on the leader alone,
before any other rank has heard of it.
"""

from __future__ import annotations

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


def send(tensors: list[torch.Tensor], mesh: Mesh) -> None:
    """Broadcast an outline's tensors from the leader."""
    for tensor in tensors:
        dist.broadcast(_carried(tensor.contiguous()), src=0, group=mesh.everyone)


def receive(described: Outline, mesh: Mesh) -> Any:
    """Return the value that the leader described, its tensors received in order."""
    match described:
        case TensorOutline(dtype=dtype, shape=shape, on_device=on_device):
            device = mesh.device if on_device else torch.device("cpu")
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            dist.broadcast(_carried(tensor), src=0, group=mesh.everyone)
            return tensor
        case Plain(value=value):
            return value
        case DType(name=name):
            return getattr(torch, name)
        case Items(kind=kind, items=items):
            values = [receive(item, mesh) for item in items]
            return values if kind == "list" else tuple(values)
        case Fields(fields=fields):
            return {key: receive(item, mesh) for key, item in fields.items()}


def _carried(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory in a type that every transport knows (booleans and fp8 are not among gloo's)."""
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.view(-1).to(torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
