"""Where the batch lies in a call's arguments, learned and never guessed.

Two calls of the same code are compared, one made with one prompt and one with two: the axis of a tensor that doubled
is its batch axis, a list that doubled is a list over the batch, a 0-dim tensor is a scalar, all else is shared.
Shapes alone would lie: a landscape and a portrait picture have equal token counts and different position ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .digest import DigestMemo, Unhashable, value_key

# Of these a model reads row 0 only, though there may be a batch axis: rows must be equal to be stacked.
POSITION_SUFFIXES = ("_ids", "_shapes", "_coords", "rotary_emb")


class NotStackable(Exception):
    """The arguments do not show where the batch lies; says why."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Equal for every row; a value or a tensor without a batch axis."""


@dataclass(frozen=True, slots=True)
class ScalarTensor:
    """A 0-dim tensor (SDXL's timestep); becomes one entry a row when stacked."""


@dataclass(frozen=True, slots=True)
class BatchAxis:
    axis: int
    position: bool


@dataclass(frozen=True, slots=True)
class BatchList:
    """A list with an entry a row (Z-Image's latents, Qwen-Image's shapes)."""

    position: bool


@dataclass(frozen=True, slots=True)
class Nested:
    """A dict, list or tuple whose entries have layouts of their own."""

    entries: tuple[tuple[Any, Layout], ...]


Layout = Shared | ScalarTensor | BatchAxis | BatchList | Nested


def structure(value: Any) -> Any:
    """Return the outline of an argument: names, kinds and numbers of dimensions, no sizes and no values.

    Calls of one outline share a layout.
    """
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dim(), value.dtype)
    if isinstance(value, dict):
        return ("dict", tuple((key, structure(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        kinds = {structure(item) for item in value}
        return (type(value).__name__, tuple(sorted(map(repr, kinds))))
    return type(value).__name__


def learn(one: Any, two: Any, path: str = "") -> Layout:
    """Compare an argument of a one-prompt call with the same argument of a two-prompt call.

    Raises NotStackable where the two differ in a way that is no batch.
    """
    position = path.endswith(POSITION_SUFFIXES)
    if type(one) is not type(two):
        raise NotStackable(f"{path}: {type(one).__name__} became {type(two).__name__}")
    if isinstance(one, torch.Tensor):
        return _learn_tensor(one, two, path, position)
    if isinstance(one, dict):
        if one.keys() != two.keys():
            raise NotStackable(f"{path}: other keys")
        return Nested(tuple((key, learn(one[key], two[key], f"{path}.{key}")) for key in one))
    if isinstance(one, list | tuple):
        if len(one) == len(two):
            return Nested(tuple((i, learn(a, b, path)) for i, (a, b) in enumerate(zip(one, two, strict=True))))
        if isinstance(one, list) and len(two) == 2 * len(one):
            return BatchList(position)
        raise NotStackable(f"{path}: {len(one)} entries became {len(two)}")
    try:
        memo = DigestMemo()
        if value_key(one, memo) != value_key(two, memo):
            raise NotStackable(f"{path}: {one!r} became {two!r}")
    except Unhashable as error:
        raise NotStackable(f"{path}: values of type {error} cannot be compared") from None
    return Shared()


def _learn_tensor(one: torch.Tensor, two: torch.Tensor, path: str, position: bool) -> Layout:
    if one.dim() != two.dim() or one.dtype != two.dtype:
        raise NotStackable(f"{path}: {tuple(one.shape)} {one.dtype} became {tuple(two.shape)} {two.dtype}")
    if one.dim() == 0:
        return ScalarTensor()
    changed = [axis for axis, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
    if not changed:
        return Shared()
    if len(changed) == 1 and two.shape[changed[0]] == 2 * one.shape[changed[0]]:
        return BatchAxis(changed[0], position)
    raise NotStackable(f"{path}: {tuple(one.shape)} became {tuple(two.shape)}")


def stack_key(layout: Layout, value: Any, digest: DigestMemo) -> Any:
    """Return what must be equal in two calls for their arguments to be stacked. Raises Unhashable."""
    match layout:
        case Shared():
            return value_key(value, digest)
        case ScalarTensor():
            return (value.dtype, value.device)
        case BatchAxis(axis, position):
            shape = tuple(value.shape[:axis]) + tuple(value.shape[axis + 1 :])
            row = digest(value, 0) if position and axis == 0 else None
            if position and axis != 0:
                row = digest(value)
            return (value.dtype, value.device, shape, row)
        case BatchList(position):
            if position:
                return value_key(value[0], digest)
            return tuple(sorted({repr(structure(item)) for item in value}))
        case Nested(entries):
            return tuple((key, stack_key(entry, value[key], digest)) for key, entry in entries)


def rows(layout: Layout, value: Any) -> set[int]:
    """Return the numbers of rows that the batched leaves of an argument have."""
    match layout:
        case BatchAxis(axis, _):
            return {value.shape[axis]}
        case BatchList(_):
            return {len(value)}
        case Nested(entries):
            return set().union(*(rows(entry, value[key]) for key, entry in entries))
    return set()


def stack(layout: Layout, values: list[Any], num_rows: list[int]) -> Any:
    """Put the arguments of several calls into one, call after call, so that each call's rows stay together."""
    match layout:
        case Shared():
            return values[0]
        case ScalarTensor():
            return torch.cat([value.expand(count) for value, count in zip(values, num_rows, strict=True)])
        case BatchAxis(axis, _):
            return torch.cat(values, dim=axis)
        case BatchList(_):
            return [item for value in values for item in value]
        case Nested(entries):
            stacked = {key: stack(entry, [value[key] for value in values], num_rows) for key, entry in entries}
            first = values[0]
            return stacked if isinstance(first, dict) else type(first)(stacked[i] for i in range(len(first)))


def divide(layout: Layout, value: Any, num_rows: list[int]) -> list[Any]:
    """Cut an argument of one call into those of calls with so many rows each: the way back of `stack`."""
    match layout:
        case BatchAxis(axis, _):
            return list(value.split(num_rows, dim=axis))
        case BatchList(_):
            ends = [sum(num_rows[: i + 1]) for i in range(len(num_rows))]
            return [value[end - count : end] for end, count in zip(ends, num_rows, strict=True)]
        case Nested(entries):
            parts = {key: divide(entry, value[key], num_rows) for key, entry in entries}
            if not isinstance(value, list | tuple):
                return [{key: part[i] for key, part in parts.items()} for i in range(len(num_rows))]
            return [type(value)(parts[key][i] for key in range(len(value))) for i in range(len(num_rows))]
    return [value] * len(num_rows)


def join(results: list[Any]) -> Any:
    """Put the results of calls into one, row after row: the way back of `split`. Raises NotStackable."""
    first = results[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(results)
    if isinstance(first, list):
        return [item for result in results for item in result]
    if isinstance(first, tuple):
        return tuple(join(list(fields)) for fields in zip(*results, strict=True))
    if isinstance(first, dict):  # a ModelOutput
        return type(first)(**{name: join([result[name] for result in results]) for name in first})
    raise NotStackable(f"a result of type {type(first).__name__}")


def split(result: Any, num_rows: list[int]) -> list[Any]:
    """Cut a stacked call's result into one per call. Raises NotStackable for a result with no rows."""
    total = sum(num_rows)
    if isinstance(result, torch.Tensor):
        if result.dim() == 0 or result.shape[0] != total:
            raise NotStackable(f"a result of shape {tuple(result.shape)} for {total} rows")
        return list(result.split(num_rows))
    if isinstance(result, list):
        if len(result) != total:
            raise NotStackable(f"a result of {len(result)} entries for {total} rows")
        ends = [sum(num_rows[: i + 1]) for i in range(len(num_rows))]
        return [result[end - count : end] for end, count in zip(ends, num_rows, strict=True)]
    if isinstance(result, tuple):
        fields = [split(field, num_rows) for field in result]
        return [tuple(parts) for parts in zip(*fields, strict=True)]
    if isinstance(result, dict):  # a ModelOutput
        parts = {name: split(field, num_rows) for name, field in result.items()}
        return [type(result)(**{name: part[i] for name, part in parts.items()}) for i in range(len(num_rows))]
    raise NotStackable(f"a result of type {type(result).__name__}")


def distance(result: Any, reference: Any) -> float:
    """Return the largest root-mean-square difference of two results' tensors, over the reference's."""
    if isinstance(result, torch.Tensor):
        scale = reference.float().pow(2).mean().sqrt().item()
        gap = (result.float() - reference.float()).pow(2).mean().sqrt().item()
        return gap / scale if scale > 0 else gap
    if isinstance(result, dict):
        return max(distance(result[name], reference[name]) for name in result)
    return max(distance(a, b) for a, b in zip(result, reference, strict=True))
