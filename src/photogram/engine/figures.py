"""What one place for a worker has seen since the server's start, whichever workers had it."""

from __future__ import annotations

from collections import Counter

from ..core.messages import Began, DeviceMemory, Vitals


class WorkerFigures:
    """Counts from the worker's messages; a few dictionary look-ups for each pass.

    `passes` counts forward passes by module and by the calls that shared one. `memory` is None on a CPU, and while
    there is no worker.
    """

    def __init__(self) -> None:
        self.passes: Counter[tuple[str, int]] = Counter()
        self.memory: DeviceMemory | None = None
        self._switches_before = 0  # by workers that have ended
        self._switches_now = 0

    @property
    def num_lora_switches(self) -> int:
        """How often the LoRAs merged into a module's weights were changed."""
        return self._switches_before + self._switches_now

    def began(self, message: Began) -> None:
        self.passes[message.module, len(message.job_ids)] += 1

    def told(self, message: Vitals) -> None:
        self._switches_now = message.num_lora_switches
        self.memory = message.memory

    def ended(self) -> None:
        """The worker is gone, and what it held; the next one counts from nothing."""
        self._switches_before += self._switches_now
        self._switches_now = 0
        self.memory = None
