"""Reads a LoRA file: its header checked as `core/lora_file` has it, and all of it from one descriptor.

What a path may be is the host's affair; whether the content fits a model is found out in `adapter`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...core.errors import RequestError
from ...core.lora_file import TensorEntry, open_lora, read_header

MAX_CONFIG_BYTES = 1 << 20

_PARAM = "lora_path"
_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By safetensors' names; those that a checked header may have."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Tells whether a path still holds the file that was read."""

    size: int
    modified_ns: int
    changed_ns: int
    inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """`settings`: what the file says of ranks and alphas as a whole, by the module's name; "" is every module."""

    stamp: Stamp
    tensors: dict[str, torch.Tensor]
    settings: dict[str, dict[str, Any]]


def refused(message: str) -> RequestError:
    return RequestError(message, param=_PARAM, code="invalid_lora")


def stamp_of(path: str) -> Stamp | None:
    """Return the present stamp of a path; None where nothing can be read."""
    try:
        return _stamp(os.stat(path))
    except (OSError, ValueError):
        return None


def read(path: str, max_bytes: int) -> LoraFile:
    """Read a LoRA. Raises RequestError: ``lora_not_found`` without a file, ``invalid_lora`` for one of no use."""
    with open_lora(path, shown=path, param=_PARAM) as file:
        before = _stamp(os.fstat(file.fileno()))
        header = read_header(file, shown=path, max_bytes=max_bytes, param=_PARAM)
        by_place = sorted(header.tensors.items(), key=lambda item: item[1].data_offsets)
        try:
            tensors = {name: _tensor(file, entry, path) for name, entry in by_place}
        except OSError as error:
            raise refused(f"LoRA '{path}' cannot be read: {error.strerror}.") from None
        if _stamp(os.fstat(file.fileno())) != before:
            raise _changed(path)
    for name, tensor in tensors.items():
        # float8 has no isfinite on the CPU.
        if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
            raise refused(f"LoRA '{path}': '{name}' holds NaN or infinite values.")
    settings = _settings(header.metadata, path) or _peft_settings(Path(path))
    return LoraFile(stamp=before, tensors=tensors, settings=settings)


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _tensor(file: BinaryIO, entry: TensorEntry, path: str) -> torch.Tensor:
    """Read the next tensor into memory of its own: a file as a whole would be kept alive by the last part in use."""
    first, after = entry.data_offsets
    content = torch.empty(after - first, dtype=torch.uint8)
    if file.readinto(content.numpy()) != after - first:  # type: ignore[attr-defined]
        raise _changed(path)
    return content.view(_DTYPES[entry.dtype]).reshape(entry.shape)


def _changed(path: str) -> RequestError:
    return refused(f"LoRA '{path}': the file changed while it was read; try again.")


def _settings(metadata: dict[str, str], path: str) -> dict[str, dict[str, Any]]:
    """What diffusers wrote into the header, as one dict for each module."""
    try:
        flat = json.loads(metadata.get(_DIFFUSERS_METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise refused(f"LoRA '{path}': its metadata '{_DIFFUSERS_METADATA}' cannot be read ({error}).") from None
    if not isinstance(flat, dict):
        raise refused(f"LoRA '{path}': its metadata '{_DIFFUSERS_METADATA}' is no JSON object.")
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        module, _, name = key.partition(".")
        settings.setdefault(module, {})[name] = value
    return settings


def _peft_settings(file: Path) -> dict[str, dict[str, Any]]:
    """What peft keeps beside its weights: without it, their alphas are not known."""
    config = file.with_name(_PEFT_CONFIG)
    if file.name != _PEFT_WEIGHTS or not config.is_file():
        return {}
    try:
        with config.open("rb") as stream:
            values = json.loads(stream.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise refused(f"LoRA '{file}': {_PEFT_CONFIG} cannot be read ({reason}).") from None
    if not isinstance(values, dict):
        raise refused(f"LoRA '{file}': {_PEFT_CONFIG} is no JSON object.")
    return {"": values}
