"""What a foreign exception says about the device: out of memory, lost for good, or neither."""

from __future__ import annotations

import resource

import torch

from ..core.errors import OutOfMemory


class DeviceLost(Exception):
    """A sticky device error: every later call in this process would fail, so the process must be replaced."""


def device_error(error: Exception, device: torch.device) -> Exception:
    """Return OutOfMemory or DeviceLost where that is what happened, else the error itself."""
    if isinstance(error, OutOfMemory | DeviceLost):
        return error
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return OutOfMemory(
            f"Out of memory on {device}: {_first_sentence(text)} Ask for a smaller size or fewer frames."
        )
    # torch.AcceleratorError since 2.8; illegal access, launch failures and ECC errors do not go away.
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in text):
        return DeviceLost(_first_sentence(text))
    return error


def limit_memory(limit_bytes: int) -> None:
    """Cap this process's memory, so that a job too large fails alone instead of waking the kernel's killer."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _first_sentence(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else "no memory left"
    return line.split("DefaultCPUAllocator: ")[-1].rstrip(". ") + "."
