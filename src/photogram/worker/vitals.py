"""How the worker is, for those who watch the server: told while it works, and once when there is nothing left to do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..core.messages import DeviceMemory, Vitals

PERIOD_S = 1.0


class VitalSigns:
    """Says when the host is to hear of them. Reads the allocator's own books, so no call waits for the device."""

    def __init__(self, device: torch.device, num_lora_switches: Callable[[], int]) -> None:
        self._device = device
        self._num_lora_switches = num_lora_switches
        self._last: Vitals | None = None
        self._told_at = float("-inf")

    def news(self, now: float, *, is_idle: bool) -> Vitals | None:
        """Return what has changed since it was told last: at most once a second, but for a worker that falls idle."""
        if not is_idle and now - self._told_at < PERIOD_S:
            return None
        self._told_at = now
        vitals = Vitals(num_lora_switches=self._num_lora_switches(), memory=self._memory())
        if vitals == self._last:
            return None
        self._last = vitals
        return vitals

    def _memory(self) -> DeviceMemory | None:
        if self._device.type != "cuda":
            return None
        return DeviceMemory(
            allocated_bytes=torch.cuda.memory_allocated(self._device),
            reserved_bytes=torch.cuda.memory_reserved(self._device),
            total_bytes=torch.cuda.get_device_properties(self._device).total_memory,
        )
