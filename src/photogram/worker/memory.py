"""What a foreign exception says about the device: out of memory, lost for good, or neither."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from ..core.errors import ConfigError, OutOfMemory
from ..core.host_memory import available_memory_bytes, total_memory_bytes


class DeviceLost(Exception):
    """A sticky device error: every later call in this process would fail, so the process must be replaced."""


# Of the device's free memory, the share that passes may take; the rest is fragmentation and other people's programs.
USABLE_SHARE = 0.9


def free_bytes(device: torch.device, reserved: int = 0) -> int | None:
    """Return what passes may take on a GPU once the model is loaded, but for the `reserved` bytes of weights that come
    and go; None on a CPU, where it is not known."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, int(USABLE_SHARE * (free + cached)) - reserved)


def memory_of(device: torch.device) -> int:
    """Return the bytes that a model and its work may take on a device where nothing of it is yet."""
    if device.type != "cuda":
        return available_memory_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def total_memory_of(device: torch.device) -> int:
    """Return all bytes of a device, whoever has them now: what is beyond them will never fit."""
    if device.type != "cuda":
        return total_memory_bytes()
    _, total = torch.cuda.mem_get_info(device)
    return total


class PeakMemory:
    """Tells how much memory a pass took beyond what was held before it. Costs no waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._held = 0

    def begin(self) -> None:
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._held = torch.cuda.memory_allocated(self._device)

    def taken(self) -> int | None:
        """Return the bytes taken since `begin`; None on a CPU."""
        return None if self._device is None else torch.cuda.max_memory_allocated(self._device) - self._held

    def highest(self) -> int | None:
        """Return the most bytes that were allocated at once since `begin`, weights included; None on a CPU."""
        return None if self._device is None else torch.cuda.max_memory_allocated(self._device)


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


def limit_memory(extra_bytes: int) -> None:
    """Let this process take `extra_bytes` beyond what it holds now, and no more.

    A job too large then fails alone, where the kernel would otherwise end the whole process.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise ConfigError("--worker-memory-gb: this system does not tell how much memory a process holds.")
    (held_kib,) = (int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmData:"))
    limit_bytes = held_kib * 1024 + extra_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _first_sentence(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else "no memory left"
    return line.split("DefaultCPUAllocator: ")[-1].rstrip(". ") + "."
