"""What `photogram doctor` asks of the process that reads checkpoints, and what that answers: JSON both ways."""

from __future__ import annotations

import msgspec

from .worker_config import WorkerConfig


class PlanQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """What to plan for. `default_precision` is the device's, where no flag says otherwise."""

    config: WorkerConfig
    memory_bytes: int
    host_bytes: int
    default_precision: str


class PlanAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The plan in words, or the reason why there is none."""

    fits: bool
    lines: tuple[str, ...]
    problem: str | None = None
