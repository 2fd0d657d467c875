"""Opens a LoRA file once and reads all of it from that one descriptor, within bounds.

What a path may be is the host's affair; what is in the file is checked here and, against the model, in `adapter`.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ...core.errors import RequestError

MAX_FILE_BYTES = 16 << 30
MAX_TENSORS = 100_000
MAX_CONFIG_BYTES = 1 << 20

# In the order of preference: diffusers' name and peft's.
_FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PEFT_CONFIG = "adapter_config.json"
_DIFFUSERS_METADATA = "lora_adapter_metadata"


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
    return RequestError(message, param="lora_path", code="invalid_lora")


def missing(message: str) -> RequestError:
    return RequestError(message, param="lora_path", code="lora_not_found")


def find(path: str) -> Path:
    """Return the file that a path means: itself, or the one to take from a folder. Raises RequestError."""
    place = Path(path)
    if not place.is_dir():
        return place
    for name in _FILE_NAMES:
        if (place / name).is_file():
            return place / name
    found = sorted(entry for entry in place.iterdir() if entry.suffix == ".safetensors")
    if len(found) == 1:
        return found[0]
    if not found:
        raise missing(f"LoRA '{path}': the folder holds no .safetensors file.")
    names = ", ".join(entry.name for entry in found[:10])
    raise refused(f"LoRA '{path}': the folder holds several .safetensors files, name one of them ({names}).")


def stamp_of(path: str) -> Stamp | None:
    """Return the present stamp of a path; None where nothing can be read."""
    try:
        return _stamp(find(path).stat())
    except (OSError, ValueError, RequestError):
        return None


def read(path: str) -> LoraFile:
    """Read a LoRA. Raises RequestError: ``lora_not_found`` without a file, ``invalid_lora`` for one of no use."""
    try:
        file = find(path)
        # Opened without waiting: a named pipe would never answer.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise missing(f"LoRA '{path}': {_reason(error)}.") from None
    with os.fdopen(descriptor, "rb") as stream:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise refused(f"LoRA '{path}': not a regular file.")
        if before.st_size > MAX_FILE_BYTES:
            raise refused(f"LoRA '{path}': {before.st_size} bytes are over the limit of {MAX_FILE_BYTES}.")
        content = stream.read(before.st_size + 1)
        if len(content) != before.st_size or _stamp(os.fstat(descriptor)) != _stamp(before):
            raise refused(f"LoRA '{path}': the file changed while it was read; try again.")
    tensors = _tensors(content, path)
    settings = _settings(content, path) or _peft_settings(file)
    return LoraFile(stamp=_stamp(before), tensors=tensors, settings=settings)


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _tensors(content: bytes, path: str) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise refused(f"LoRA '{path}': not a valid safetensors file ({_reason(error)}).") from None
    if not 0 < len(tensors) <= MAX_TENSORS:
        raise refused(f"LoRA '{path}': {len(tensors)} tensors; from 1 to {MAX_TENSORS} are read.")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and tensor.numel() > 1:
            raise refused(f"LoRA '{path}': '{name}' is of type {tensor.dtype}, not floating point.")
        # float8 has no isfinite on the CPU.
        if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
            raise refused(f"LoRA '{path}': '{name}' holds NaN or infinite values.")
    return tensors


def _settings(content: bytes, path: str) -> dict[str, dict[str, Any]]:
    """What diffusers wrote into the header, as one dict for each module."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        flat = json.loads(header.get("__metadata__", {}).get(_DIFFUSERS_METADATA, "{}"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise refused(f"LoRA '{path}': not a valid safetensors file ({_reason(error)}).") from None
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
    if file.name != "adapter_model.safetensors" or not config.is_file():
        return {}
    try:
        with config.open("rb") as stream:
            values = json.loads(stream.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise refused(f"LoRA '{file}': {_PEFT_CONFIG} cannot be read ({_reason(error)}).") from None
    if not isinstance(values, dict):
        raise refused(f"LoRA '{file}': {_PEFT_CONFIG} is no JSON object.")
    return {"": values}


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
